"""The recorded model and what the authors' code of closed-form methods gave on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file
from torch import Tensor

from errata.edits.request import Request
from errata.edits.stack import Stack
from errata.kit.closed_form.matrices import NormalMatrix
from errata.kit.metric import Whitening
from errata.kit.second_moments import SecondMoment
from errata.model import Model
from errata.model.anatomy import Anatomy
from errata.model.artifacts import Artifacts
from tests.families import architectures
from tests.helpers import GOLDEN


def golden_model(directory: Path) -> Model:
    """Return the recorded model, its artifacts in `directory`."""
    folder = GOLDEN / "model"
    module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    anatomy = Anatomy.of(module, architectures())
    return Stack.on(Model(module, tokenizer, anatomy, artifacts=Artifacts(directory)))


def second_moment(layer: int) -> SecondMoment:
    """Return the recorded C of a layer."""
    moments = load_file(GOLDEN / "1_second_moment" / "second_moment.safetensors")
    return SecondMoment(moments[f"C.{layer}"].double(), 69700, layer)


def known_keys(layers: tuple[int, ...]) -> dict[int, NormalMatrix]:
    """Return the recorded C of some layers, as the formulas take it."""
    return {layer: NormalMatrix(Whitening(second_moment(layer))) for layer in layers}


def recorded(name: str) -> tuple[dict[str, Tensor], dict[str, Any], list[Request], dict[str, Any]]:
    """Return (tensors, JSON, requests, hyper-parameters that all these methods share)."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    about = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    requests = [
        Request(prompt=fact["prompt"], subject=fact["subject"], target_new=fact["new"])
        for fact in about["facts"]
    ]
    contexts = tuple(context for group in about["context_templates"] for context in group)
    given = about["hparams"]
    settings = {
        "layers": tuple(given["layers"]),
        "contexts": contexts,
        "steps": given["v_num_grad_steps"],
        "lr": given["v_lr"],
        "weight_decay": given["v_weight_decay"],
        "clamp": given["clamp_norm_factor"],
        "kl_factor": given["kl_factor"],
        "loss_layer": given["v_loss_layer"],
    }
    return tensors, about, requests, settings


def relative(given: Tensor, expected: Tensor) -> float:
    """Return ‖given − expected‖ / ‖expected‖."""
    return float((given.double() - expected.double()).norm() / expected.double().norm())
