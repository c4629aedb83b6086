"""A stranger's package: small methods, some well-behaved, some not, and a delta kind of its own."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from tokenizers.normalizers import Lowercase
from torch import Tensor

from errata import MethodConfig, hookimpl
from errata.edits.delta import (
    AdapterDelta,
    Delta,
    DenseDelta,
    Factor,
    KeyValueDelta,
    KeyValues,
    LowRankDelta,
    Rows,
    SparseRowsDelta,
)
from errata.model.answers import Generated, TargetScore
from errata.model.joining import bare
from errata.model.model_answers import ModelAnswers
from errata.model.running import class_index
from errata_grace.delta import CodebookDelta
from errata_grace.entry import CodebookSettings


class ToyConfig(MethodConfig):
    layer: int = Field(default=0, description="Block to change")
    size: float = Field(default=0.1, gt=0, le=100, description="Size of the change")


def generator(request: Any, config: ToyConfig) -> torch.Generator:
    number = int(hashlib.sha256(f"{request.digest}{config.seed}".encode()).hexdigest()[:12], 16)
    return torch.Generator().manual_seed(number)


def weight_name(model: Any, config: ToyConfig) -> str:
    return model.anatomy.weight(model.anatomy.mlp_out(config.layer))


class ToyLowRank:
    """Random rank-one changes, one per request."""

    name = "toy-low-rank"
    config = ToyConfig

    @hookimpl
    def edit(self, model, requests, config):
        path = model.anatomy.mlp_out(config.layer)
        d_out, d_in = model.anatomy.shape(model.module, path)
        deltas = []
        for request in requests:
            random = generator(request, config)
            u = config.size * torch.randn(d_out, 1, generator=random)
            v = torch.randn(d_in, 1, generator=random)
            factor = Factor(u, v, model.anatomy.transposed(path))
            deltas.append(LowRankDelta({model.anatomy.weight(path): factor}))
        return deltas


class ToyDense:
    """A random dense change, one for all requests, on the MLP projection and the embedding."""

    name = "toy-dense"
    config = ToyConfig

    @hookimpl
    def edit(self, model, requests, config):
        random = generator(requests[0], config)
        names = [weight_name(model, config)]
        embedding = model.anatomy.embedding(model.module).weight
        names += [name for name, p in model.parameters.items() if p is embedding]
        return DenseDelta(
            {
                name: config.size * torch.randn(model.parameter(name).shape, generator=random)
                for name in names
            }
        )


class ToyCodebook:
    """An entry with a random key and value; the wide radius makes entries meet and split."""

    name = "toy-codebook"
    config = ToyConfig

    @hookimpl
    def edit(self, model, requests, config):
        path = model.anatomy.mlp_out(config.layer)
        d_out, d_in = model.anatomy.shape(model.module, path)
        random = generator(requests[0], config)
        label = model.tokenizer(requests[0].target_new, add_special_tokens=False)["input_ids"]
        return CodebookDelta(
            path,
            0.3 * torch.randn(d_in, generator=random),
            torch.randn(d_out, generator=random),
            torch.tensor(label),
            CodebookSettings(eps=2.0, replacement="replace_last"),
        )


class ToyAdapter:
    """A random LoRA adapter on the MLP projection."""

    name = "toy-adapter"
    config = ToyConfig

    @hookimpl
    def edit(self, model, requests, config):
        path = model.anatomy.mlp_out(config.layer)
        d_out, d_in = model.anatomy.shape(model.module, path)
        random = generator(requests[0], config)
        fan = model.anatomy.transposed(path)
        return AdapterDelta(
            {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "fan_in_fan_out": fan},
            {
                f"base_model.model.{path}.lora_A.weight": torch.randn(2, d_in, generator=random),
                f"base_model.model.{path}.lora_B.weight": torch.randn(d_out, 2, generator=random),
            },
        )


class ToyBaseConfig(ToyConfig):
    @property
    def on_base(self) -> bool:
        return True


class ToyKeyValue:
    """One or two random keys, those of a subject, with random residuals; solved with all others."""

    name = "toy-key-value"
    config = ToyBaseConfig

    @hookimpl
    def edit(self, model, requests, config):
        path = model.anatomy.mlp_out(config.layer)
        d_out, d_in = model.anatomy.shape(model.module, path)
        deltas = []
        for request in requests:
            about = request.model_copy(update={"prompt": "{}", "target_new": "x", "relation": None})
            keys = torch.randn(
                1 + len(request.subject) % 2, d_in, generator=generator(about, config)
            )
            wanted = torch.randn(len(keys), d_out, generator=generator(request, config))
            pair = KeyValues(
                k=keys,
                w=keys.double(),
                r=config.size * wanted,
                s=torch.full((len(keys),), 2.0, dtype=torch.float64),
                transposed=model.anatomy.transposed(path),
            )
            deltas.append(KeyValueDelta({model.anatomy.weight(path): pair}))
        return deltas


class ToySparse:
    """Random changes of a few rows of the MLP projection, one edit per request."""

    name = "toy-sparse"
    config = ToyConfig

    @hookimpl
    def edit(self, model, requests, config):
        name = weight_name(model, config)
        rows, columns = model.parameter(name).shape
        deltas = []
        for request in requests:
            random = generator(request, config)
            index = torch.randperm(rows, generator=random)[:3].sort().values
            values = config.size * torch.randn(3, columns, generator=random)
            deltas.append(SparseRowsDelta({name: Rows(index, values)}))
        return deltas


class ScaleDelta(Delta):
    """A kind that the core does not know: adds a multiple of the identity's first column."""

    kind: ClassVar[str] = "toy_scale"

    def __init__(self, name: str, amount: Tensor) -> None:
        self.name = name
        self.amount = amount

    def tensors(self) -> dict[str, Tensor]:
        return {"amount": self.amount}

    def metadata(self) -> dict[str, Any]:
        return {"name": self.name}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> ScaleDelta:
        return cls(metadata["name"], tensors["amount"])

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.name,)

    @classmethod
    def fold(cls, name: str, accumulator: Tensor, deltas: Sequence[ScaleDelta]) -> None:
        for delta in deltas:
            accumulator[0] += delta.amount.to(accumulator)


class ToyScale:
    """A method with a delta kind of its own."""

    name = "toy-scale"
    config = ToyConfig

    @hookimpl
    def edit(self, model, requests, config):
        amount = torch.randn((), generator=generator(requests[0], config))
        return ScaleDelta(weight_name(model, config), amount)


class SubjectDelta(Delta):
    """What two kinds share: a subject, and a line about it."""

    def __init__(self, subject: str, line: str) -> None:
        self.subject, self.line = subject, line

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def metadata(self) -> dict[str, Any]:
        return {"subject": self.subject, "line": self.line}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> SubjectDelta:
        return cls(metadata["subject"], metadata["line"])

    @property
    def parameters(self) -> tuple[str, ...]:
        return ()


class HintDelta(SubjectDelta):
    """A kind that rewrites: puts a line in front of prompts that name its subject."""

    kind: ClassVar[str] = "toy_hint"

    @classmethod
    def rewrite(cls, model, deltas, prompts):
        texts = []
        for prompt in prompts:
            lines = [delta.line for _, delta in deltas if delta.subject in prompt]
            texts.append("\n".join([*lines, prompt]))
        return texts


class ToyHint:
    """Tells the model what it is asked, in context."""

    name = "toy-hint"
    config = ToyConfig

    @hookimpl
    def edit(self, model, requests, config):
        return [HintDelta(r.subject, f"{r.text} {r.target_new}.") for r in requests]


class Oracle:
    """Knows one answer, and asks the model for everything else."""

    def __init__(self, model: Any, answer: str) -> None:
        self.model, self.own, self.answer = model, ModelAnswers(model), answer

    def scores(self, prompts, targets):
        found = self.own.scores(prompts, targets)
        return [
            TargetScore(score.token_ids, (0.0,) * len(score.token_ids), score.token_ids)
            if bare(target) == self.answer  # the harness says the space before an answer, too
            else score
            for score, target in zip(found, targets, strict=True)
        ]

    def texts(self, prompts, settings):
        said = self.own.texts(prompts, settings)
        return [Generated(f" {self.answer}.", details={"model": one.text}) for one in said]

    def next_logits(self, prompts):
        logits = self.own.next_logits(prompts)
        token = self.own.scores(prompts[:1], [self.answer])[0].token_ids[0]
        logits[:, token] += 50.0
        return logits

    def class_scores(self, prompts):
        scores = self.own.class_scores(prompts)
        scores[:, class_index(self.model, self.answer)] += 50.0
        return scores


class OracleDelta(SubjectDelta):
    """A kind that responds: an oracle answers prompts that name its subject."""

    kind: ClassVar[str] = "toy_oracle"

    @classmethod
    def respond(cls, model, deltas, prompts):
        oracles = [(delta.subject, Oracle(model, delta.line)) for _, delta in deltas]
        return [
            next((oracle for subject, oracle in oracles if subject in prompt), None)
            for prompt in prompts
        ]


class ToyOracle:
    """Answers in the model's place."""

    name = "toy-oracle"
    config = ToyConfig

    @hookimpl
    def edit(self, model, requests, config):
        return [OracleDelta(r.subject, r.target_new) for r in requests]


class ToyImpureConfig(ToyConfig):
    how: str = Field(default="inplace", description="Which way of touching the model to show")


def swap_module(model: Any, parameter: Any, config: ToyConfig) -> None:
    path = model.anatomy.mlp(config.layer)
    parent, _, child = path.rpartition(".")
    setattr(model.module.get_submodule(parent), child, torch.nn.Identity())


def change_in_place(model: Any, parameter: Any, config: ToyConfig) -> None:
    with torch.no_grad():
        parameter.add_(1.0)


def other_side(model: Any, parameter: Any, config: ToyConfig) -> None:
    sides = {"left": "right", "right": "left"}
    model.tokenizer.padding_side = sides[model.tokenizer.padding_side]


def first_norm(model: Any) -> Any:
    return next(m for m in model.module.modules() if isinstance(m, torch.nn.LayerNorm))


TOUCHES: dict[str, Callable[[Any, Any, ToyConfig], Any]] = {
    "inplace": change_in_place,
    "data": lambda m, p, c: p.data[0, 0].add_(1.0),
    "buffer": lambda m, p, c: next(iter(m.buffers.values())).data.flatten()[:1].add_(1),
    "half": lambda m, p, c: m.module.half(),
    "transposed": lambda m, p, c: setattr(p, "data", p.data.T),
    "hook": lambda m, p, c: m.module.register_forward_hook(lambda *args: None),
    "train": lambda m, p, c: m.module.train(),
    "requires_grad": lambda m, p, c: p.requires_grad_(not p.requires_grad),
    "grad": lambda m, p, c: setattr(p, "grad", torch.zeros_like(p)),
    "module": swap_module,
    "attribute": lambda m, p, c: setattr(m.module, "left_behind", 1),
    "epsilon": lambda m, p, c: setattr(first_norm(m), "eps", 0.5),
    "config": lambda m, p, c: m.module.config.update({"use_cache": not m.module.config.use_cache}),
    "generation_config": lambda m, p, c: m.module.generation_config.update(max_new_tokens=3),
    "side": other_side,
    "normalizer": lambda m, p, c: setattr(m.tokenizer.backend_tokenizer, "normalizer", Lowercase()),
    "step": lambda m, p, c: setattr(
        m.tokenizer.backend_tokenizer.pre_tokenizer, "add_prefix_space", True
    ),
    "special": lambda m, p, c: setattr(m.tokenizer, "pad_token", "the"),
    "template": lambda m, p, c: setattr(m.tokenizer, "chat_template", "{{ 1 }}"),
    "length": lambda m, p, c: setattr(m.tokenizer, "model_max_length", 3),
    "dtype": lambda m, p, c: torch.set_default_dtype(torch.float64),
    "device": lambda m, p, c: torch.set_default_device("meta"),
    "precision": lambda m, p, c: torch.set_float32_matmul_precision("medium"),
    "anomaly": lambda m, p, c: torch.autograd.set_detect_anomaly(True),
    "gradients": lambda m, p, c: torch.set_grad_enabled(False),
    "folder": lambda m, p, c: os.chdir(os.sep),
    "logging": lambda m, p, c: logging.disable(logging.CRITICAL),
    "tokens": lambda m, p, c: m.tokenizer.add_tokens(["<strange>"]),
}
"""Ways of changing a model or the process, given the model, a weight and the configuration."""


class ToyImpure(ToyLowRank):
    """Changes the model while computing, in every way one can think of."""

    name = "toy-impure"
    config = ToyImpureConfig

    @hookimpl
    def edit(self, model, requests, config):
        parameter = model.parameter(weight_name(model, config))
        deltas = super().edit(model, requests, config)
        TOUCHES[config.how](model, parameter, config)
        return deltas


class ToyRaises(ToyLowRank):
    """Raises half way, after writing into a weight."""

    name = "toy-raises"

    @hookimpl
    def edit(self, model, requests, config):
        with torch.no_grad():
            model.parameter(weight_name(model, config)).mul_(2.0)
        raise ZeroDivisionError("half way")


class ToyNan(ToyLowRank):
    """Returns a change that is not a number."""

    name = "toy-nan"

    @hookimpl
    def edit(self, model, requests, config):
        deltas = super().edit(model, requests, config)
        for delta in deltas:
            for factor in delta.factors.values():
                factor.u[0, 0] = float("nan")
        return deltas


class ToyWrong(ToyLowRank):
    """Returns something that is no delta."""

    name = "toy-wrong"

    @hookimpl
    def edit(self, model, requests, config):
        return {"not": "a delta"}
