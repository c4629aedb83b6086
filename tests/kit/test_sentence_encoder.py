"""Sentence encoders of their own: states are pooled as the encoder's folder declares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.errors import ConfigError
from errata.kit.sentence_encoder import ForeignEncoder, sentence_encoder
from errata.model import Model
from tests.families import build, build_model

TEXTS = ["The capital of France is", "Rome", "Once upon a time"]
SWITCHES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens",
            "weightedmean_tokens", "lasttoken")  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return build_model("gpt2", tmp_path_factory.mktemp("cache"))


def folder(path: Path, pooling: Any = None, *behind: str) -> Path:
    """Return a tiny BERT's folder as sentence-transformers writes it."""
    module, tokenizer = build("bert")
    module.bert.save_pretrained(path)  # type: ignore[operator,union-attr]
    tokenizer.save_pretrained(path)
    if pooling is not None:
        names = ["Transformer", "Pooling", *behind]
        modules = [
            {"type": f"sentence_transformers.models.{name}", "path": f"{i}_{name}" if i else ""}
            for i, name in enumerate(names)
        ]
        (path / "modules.json").write_text(json.dumps(modules))
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return path


def switches(*on: str) -> dict[str, Any]:
    modes = {f"pooling_mode_{name}": name in on for name in SWITCHES}
    return {"word_embedding_dimension": 32, **modes, "include_prompt": True}


def states(encoder: ForeignEncoder, text: str) -> Tensor:
    """Return the last states (T, d) of a text's tokens."""
    with torch.no_grad():
        found: Tensor = encoder.module(**encoder.tokenizer(text, return_tensors="pt"))[0]
    return found[0]


@pytest.mark.parametrize(
    ("declared", "pooled"),
    [
        (None, lambda s: s.mean(dim=0)),
        (switches("mean_tokens"), lambda s: s.mean(dim=0)),
        (switches("cls_token"), lambda s: s[0]),
        (switches("max_tokens"), lambda s: s.amax(dim=0)),
        (switches("lasttoken"), lambda s: s[-1]),
        ({"embedding_dimension": 32, "pooling_mode": "cls"}, lambda s: s[0]),
        ({"embedding_dimension": 32, "pooling_mode": ["max"]}, lambda s: s.amax(dim=0)),
    ],
    ids=["nothing", "mean", "cls", "max", "last token", "named", "listed"],
)
def test_states_are_pooled_as_the_folder_declares(
    declared: Any, pooled: Any, model: Model, tmp_path: Path
) -> None:
    encoder = sentence_encoder(model, str(folder(tmp_path, declared, "Normalize")))
    assert isinstance(encoder, ForeignEncoder)
    wanted = torch.stack([pooled(states(encoder, text)) for text in TEXTS])
    wanted = torch.nn.functional.normalize(wanted, dim=1)
    torch.testing.assert_close(encoder.encode(TEXTS), wanted, rtol=1e-4, atol=1e-5)
    together = encoder.unit_vectors(TEXTS)  # padding counts for nothing
    torch.testing.assert_close(together, wanted, rtol=1e-4, atol=1e-5)


def test_the_same_weights_pooled_otherwise_are_another_encoder(
    model: Model, tmp_path: Path
) -> None:
    plain, mean, first = (
        sentence_encoder(model, str(folder(tmp_path / name, declared))).digest
        for name, declared in (
            ("a", None), ("b", switches("mean_tokens")), ("c", switches("cls_token")),
        )
    )  # fmt: skip
    assert plain == mean != first


@pytest.mark.parametrize(
    ("declared", "behind", "told"),
    [
        (switches("weightedmean_tokens"), (), "pooling_mode_weightedmean_tokens"),
        ({"pooling_mode": "attention"}, (), "by attention"),
        (switches("cls_token", "mean_tokens"), (), "by cls, mean"),
        (switches("cls_token"), ("Dense",), "by Dense"),
        ([1], (), "cannot be read"),
    ],
)
def test_what_is_pooled_in_another_way_is_refused(
    declared: Any, behind: tuple[str, ...], told: str, model: Model, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        sentence_encoder(model, str(folder(tmp_path, declared, *behind)))
