"""The zoo: small language models that really know facts, shipped inside the package.

They know an invented world (`errata.zoo.world`), so that the demo, the tests and the benchmarks
run on something that can be edited, anywhere, offline. Importing this module loads no weights and
no torch.

>>> from errata import zoo
>>> zoo.model_path("atlas-gpt2").name
'atlas-gpt2'
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from errata.errors import StorageError, UnknownNameError
from errata.model.texts import text_path

__all__ = ["MODELS", "ZooModel", "model_path", "text_path"]

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class ZooModel:
    """A shipped model: a Hugging Face directory and what is in it."""

    name: str
    architecture: str
    """`gpt2` or `llama`: what `errata.zoo.train.train` builds it from."""
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


def model_path(name: str) -> Path:
    """Return the directory of a shipped model, for `from_pretrained`.

    Raises `errata.errors.UnknownNameError` for a name that is not in `MODELS`, and
    `StorageError`, naming the command that makes them, where the weights are missing.
    """
    if name not in MODELS:
        raise UnknownNameError("zoo model", name, MODELS)
    model = MODELS[name]
    if not model.is_present:
        raise StorageError(
            f"The weights of {name!r} are not at {model.path}. Train them with: "
            f"errata zoo train {model.architecture}"
        )
    return model.path
