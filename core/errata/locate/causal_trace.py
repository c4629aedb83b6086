"""Causal tracing: which state, put back to its clean value, brings a corrupted answer back?

Meng et al. 2022, section 2. The subject's token embeddings are corrupted with noise, the same for
every restoration; the state of one token at one layer is restored; the score is the probability
of the clean run's answer, averaged over the corrupted runs.

Restorations run stacked, several (token, layer) pairs in one batch. A batch starts at the first
layer that a restoration changes: the blocks below answer with the states of the corrupted run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from errata.errors import CapabilityError, ConfigError, UnknownNameError
from errata.forward import Seen, adding, answered, logits_at, patched
from errata.forward import trace as capture
from errata.forward.trace import first_tensor, submodule, with_first
from errata.locate.result import KINDS, STATES, CausalTrace, Kind
from errata.request import Request
from errata.tokens import encode, subject_span

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model import Model

logger = logging.getLogger("errata")


@torch.no_grad()
def trace(
    model: Model,
    request: Request | str,
    subject: str | None = None,
    *,
    kind: Kind = "hidden",
    window: int = 10,
    noise: float | Tensor = 3.0,
    noise_subjects: Sequence[str] | None = None,
    samples: int = 10,
    seed: int = 0,
    answer: str | None = None,
    severed: Literal["mlp", "attn"] | None = None,
    held_noise: Tensor | None = None,
    batch_rows: int = 256,
) -> CausalTrace:
    """Restore every (token, layer) of a prompt in turn and score each.

    Args:
        model: the model as it stands, edits included. No hook is left on it.
        request: a request, or a prompt (a template with {} or a text that holds the subject once).
        subject: the subject, when a prompt is given.
        kind: restore one block's output ("hidden"), or the outputs of the MLPs or attentions of
            `window` layers [l - window//2, l + ceil(window/2)), clipped at the ends.
        window: number of layers for "mlp" and "attn".
        noise: standard deviation of the noise in units of the standard deviation of the subject
            tokens' embeddings; or the noise itself (samples, subject tokens, hidden), scaled.
        noise_subjects: whose token embeddings (each subject tokenised alone) give that standard
            deviation; the paper takes all subjects of a data set. Default: this subject alone.
        samples: number of corrupted runs.
        seed: of the noise, drawn in float64 by a generator of its own.
        answer: follow the probability of this text's first token instead of the clean run's best.
        severed: hold that token's MLP or attention outputs at their corrupted values in all layers
            ("hidden" only): what the restored state does not do through them.
        held_noise: other noise for the run that those values are taken from. Default: the same.
            The authors' code draws anew there, because both runs share one random stream; give
            the first draw here and the second as `noise` to get their numbers.
        batch_rows: most rows in a batch.

    Raises:
        CapabilityError: not a decoder.
        UnknownNameError, ConfigError, RequestError: an argument that is not allowed.
    """
    request = _request(request, subject)
    _check(model, kind, window, samples, severed)
    run = _Trace(model, request, batch_rows)
    run.corrupt(noise, noise_subjects, samples, seed)
    run.settle(answer, held_noise if severed else None)
    width = 1 if kind == "hidden" else window
    return CausalTrace(
        prompt=request.text,
        subject=request.subject,
        tokens=tuple(model.tokenizer.convert_ids_to_tokens(run.ids[0].tolist())),
        subject_span=run.span,
        answer=model.tokenizer.decode([run.answer_id]),
        answer_id=run.answer_id,
        scores=run.restore(kind, width, severed),
        low=run.low,
        high=run.high,
        kind=kind,
        window=width,
        noise_level=run.noise_level,
        noise_source=run.noise_source,
        samples=run.samples,
        seed=seed,
        severed=severed,
        modules=tuple(_paths(model, kind)),
    )


def embedding_std(model: Model, subjects: Sequence[str]) -> float:
    """Return the standard deviation over all numbers in the embeddings of these subjects' tokens.

    Each subject is tokenised alone, without special tokens, as the authors do.
    """
    ids = [i for s in subjects for i in model.tokenizer(s, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise ConfigError(f"The noise subjects {list(subjects)!r} have no tokens: name real ones.")
    embedding = model.anatomy.embedding(model.module)
    with torch.no_grad():
        # Called, not indexed: some families scale inside the module.
        rows = embedding(torch.tensor([ids], device=model.device))
    return float(rows.double().std())


class _Trace:
    """One prompt: its clean run, its corrupted runs, and restorations of them."""

    def __init__(self, model: Model, request: Request, batch_rows: int) -> None:
        self._model = model
        self._request = request
        self._batch_rows = batch_rows
        batch = encode(model.tokenizer, [request.text], device=model.device)
        self.ids = batch.input_ids
        self._inputs = batch.inputs(positions=model.anatomy.spec.position_ids)
        first, last = subject_span(model.tokenizer, request.prompt, request.subject)
        self.span = (int(first), int(last))
        self._watched = [name for kind in KINDS for name in _paths(model, kind)]

    # -- the two reference runs ------------------------------------------------------------------

    def corrupt(
        self,
        noise: float | Tensor,
        subjects: Sequence[str] | None,
        samples: int,
        seed: int,
    ) -> None:
        """Prepare the noise (samples, subject tokens, hidden)."""
        embedding = self._model.anatomy.embedding(self._model.module)
        self._noise_shape = (
            len(noise) if isinstance(noise, torch.Tensor) else samples,
            self.span[1] - self.span[0] + 1,
            int(embedding(self.ids[:, :1]).shape[-1]),  # OPT-350m projects it afterwards
        )
        if isinstance(noise, torch.Tensor):
            self._check_noise(noise)
            self._noise, self.noise_level, self.noise_source = noise, math.nan, "given"
        else:
            chosen = [self._request.subject] if subjects is None else list(subjects)
            self.noise_level = float(noise) * embedding_std(self._model, chosen)
            whose = "the subject's" if subjects is None else f"{len(chosen)} subjects'"
            self.noise_source = f"{noise:g} x that of {whose} token embeddings"
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randn(self._noise_shape, generator=generator, dtype=torch.float64)
            self._noise = drawn * self.noise_level
        self.samples = len(self._noise)

    def _check_noise(self, noise: Tensor) -> None:
        if tuple(noise.shape) != self._noise_shape or not len(noise):
            raise ConfigError(
                f"The given noise has shape {tuple(noise.shape)}; this subject needs (samples, "
                f"{self._noise_shape[1]} subject tokens, {self._noise_shape[2]})."
            )

    def settle(self, answer: str | None, held_noise: Tensor | None) -> None:
        """Run clean and corrupted once: the answer, both scores, all states."""
        with capture(self._model.module, self._watched) as seen:
            clean = self._logits(1)
        self._clean = {name: states[0] for name, states in self._states(seen, 1).items()}  # (T, d)
        self.answer_id = int(clean[0].argmax()) if answer is None else self._first_token(answer)
        self.high = float(self._probability(clean)[0])

        raw: dict[str, Any] = {}
        blocks = _paths(self._model, "hidden")

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                del module, args
                raw[name] = output

            return hook

        with ExitStack() as undo:
            for name in blocks:
                handle = submodule(self._model.module, name).register_forward_hook(keep(name))
                undo.callback(handle.remove)
            seen = undo.enter_context(capture(self._model.module, self._watched))
            corrupted = self._logits(self.samples, corrupted=True)
        self._raw = [raw[name] for name in blocks]
        self.low = float(self._probability(corrupted).mean())
        # With other noise there, values held below the restored layer are no corrupted states of
        # this run either: then every layer has to run.
        self._resumes = held_noise is None and self._can_resume(corrupted)
        if held_noise is not None:
            self._check_noise(held_noise)
            with capture(self._model.module, self._watched) as seen:
                self._logits(self.samples, corrupted=True, noise=held_noise)
        self._held = self._states(seen, self.samples)  # (samples, T, d)

    def _states(self, seen: Mapping[str, Seen], rows: int) -> dict[str, Tensor]:
        """Return captured outputs as (rows, T, d): OPT's MLP sees rows and columns flattened."""
        length = self.ids.shape[1]
        return {
            name: found.output.reshape(rows, length, found.output.shape[-1])
            for name, found in seen.items()
            if found.output is not None
        }

    def _first_token(self, answer: str) -> int:
        prompt = self.ids.shape[1]
        joined = encode(self._model.tokenizer, [f"{self._request.text} {answer}"])
        return int(joined.input_ids[0, prompt])

    def _can_resume(self, corrupted: Tensor) -> bool:
        """Return whether the last block alone, on recorded states, gives the recorded logits."""
        count = self._model.anatomy.n_layers
        if count < 2:
            return False
        if any(entry.delta.runtime for entry in self._model.stack.entries):
            return False  # a codebook on a block would act on the recorded state once more
        try:
            again = self._logits(self.samples, below=(count - 2, self._raw[count - 2]))
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
            logger.debug("resuming a trace failed", exc_info=True)
            return False
        scale = float(corrupted.abs().max().clamp_min(1e-30))
        tolerance = math.sqrt(torch.finfo(self._model.dtype).eps)
        return float((again - corrupted).abs().max()) <= tolerance * scale

    # -- restorations ----------------------------------------------------------------------------

    def restore(self, kind: Kind, window: int, severed: Literal["mlp", "attn"] | None) -> Tensor:
        """Return the scores (tokens, layers)."""
        length, count = self.ids.shape[1], self._model.anatomy.n_layers
        scores = torch.full((length, count), self.low, dtype=torch.float64)
        # Before the subject nothing is corrupted (attention is causal): restoring changes nothing.
        tokens = list(range(self.span[0], length))
        size = max(1, self._batch_rows // self.samples)
        done: dict[range, int] = {}
        for layer in self._model.progress.track(range(count), f"tracing {STATES[kind]}"):
            layers = (
                range(layer, layer + 1)
                if kind == "hidden"
                else range(max(0, layer - window // 2), min(count, layer + (window + 1) // 2))
            )
            if layers in done:  # a window as wide as the model is the same one again
                scores[:, layer] = scores[:, done[layers]]
                continue
            done[layers] = layer
            for start in range(0, len(tokens), size):
                chosen = tokens[start : start + size]
                scores[chosen, layer] = self._restored(kind, layers, chosen, severed)
        return scores

    def _restored(
        self, kind: Kind, layers: range, tokens: list[int], severed: Literal["mlp", "attn"] | None
    ) -> Tensor:
        """Return the scores (len(tokens),) of restoring each token in these layers."""
        rows = len(tokens) * self.samples  # token-major
        row_index = torch.arange(rows)
        columns = torch.tensor(tokens).repeat_interleave(self.samples)

        def write(values: Tensor) -> Callable[[Tensor], Tensor]:
            return adding(values, columns, rows=row_index, replace=True)

        changes: dict[str, Callable[[Tensor], Tensor]] = {}
        below: tuple[int, Any] | None = None
        names = _paths(self._model, kind)
        if kind == "hidden" and self._resumes:
            layer = layers[0]
            state = self._tiled(self._raw[layer], len(tokens))
            new = write(self._clean[names[layer]][columns])(first_tensor(state))
            below = (layer, with_first(state, new))
        else:
            for layer in layers:
                changes[names[layer]] = write(self._clean[names[layer]][columns])
            if self._resumes and layers[0] > 0:
                below = (layers[0] - 1, self._tiled(self._raw[layers[0] - 1], len(tokens)))
        if severed is not None:
            # Up to the restored layer this changes nothing unless the noise differs.
            for name in _paths(self._model, severed)[layers[0] + 1 if self._resumes else 0 :]:
                changes[name] = write(self._held[name][row_index % self.samples, columns])
        with patched(self._model.module, changes):
            logits = self._logits(rows, corrupted=below is None, below=below)
        return self._probability(logits).reshape(len(tokens), self.samples).mean(dim=1)

    def _tiled(self, raw: Any, times: int) -> Any:
        """Repeat a block's output for `times` restorations."""

        def tile(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.shape[:1] != (self.samples,):
                return value
            return value.repeat(times, *[1] * (value.ndim - 1))

        if isinstance(raw, torch.Tensor):
            return tile(raw)
        return type(raw)(tile(value) for value in raw)

    # -- running ---------------------------------------------------------------------------------

    def _logits(
        self,
        rows: int,
        *,
        corrupted: bool = False,
        noise: Tensor | None = None,
        below: tuple[int, Any] | None = None,
    ) -> Tensor:
        """Return the last token's logits (rows, vocabulary), in fp32 or wider.

        `below` = (layer, output): the blocks up to this one answer with this output.
        """
        model = self._model
        last = self.ids.shape[1] - 1
        inputs = {name: value.expand(rows, -1) for name, value in self._inputs.items()}
        with ExitStack() as undo:
            if corrupted:
                undo.callback(self._hook_embedding(rows, noise).remove)
            if below is not None:
                layer, output = below
                answers = {
                    model.anatomy.block(i): lambda *_, **__: output for i in range(layer + 1)
                }
                undo.enter_context(answered(model.module, answers))
            undo.enter_context(model.prompts([last] * rows))
            logits = logits_at(model, inputs, torch.arange(rows), torch.full((rows,), last))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _hook_embedding(self, rows: int, noise: Tensor | None) -> torch.utils.hooks.RemovableHandle:
        first, last = self.span
        noise = (self._noise if noise is None else noise).repeat(rows // self.samples, 1, 1)

        def corrupt(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            del module, args
            noisy = output.clone()
            noisy[:, first : last + 1] += noise.to(device=output.device, dtype=output.dtype)
            return noisy

        embedding = self._model.anatomy.embedding(self._model.module)
        return embedding.register_forward_hook(corrupt)

    def _probability(self, logits: Tensor) -> Tensor:
        return (logits[:, self.answer_id] - logits.logsumexp(dim=-1)).exp().double().cpu()


def _paths(model: Model, kind: Kind) -> list[str]:
    anatomy = model.anatomy
    path = {"hidden": anatomy.block, "mlp": anatomy.mlp, "attn": anatomy.attention}[kind]
    return [path(layer) for layer in range(anatomy.n_layers)]


def _request(request: Request | str, subject: str | None) -> Request:
    if isinstance(request, Request):
        return request
    # A trace changes nothing: the target only has to be there for the request to be complete.
    return Request.parse(prompt=request, subject=subject or "", target_new="?")


def _check(model: Model, kind: str, window: int, samples: int, severed: str | None) -> None:
    if model.anatomy.kind != "decoder":
        raise CapabilityError(
            f"{model.name} is an {model.anatomy.kind} ({model.anatomy.model_type}); causal tracing "
            "follows a next-token prediction and works for decoders. Use a method's own locator."
        )
    if kind not in KINDS:
        raise UnknownNameError("kind of state", kind, KINDS)
    if severed not in (None, "mlp", "attn"):
        raise UnknownNameError("severed module", str(severed), ("mlp", "attn"))
    if severed is not None and kind != "hidden":
        raise ConfigError(f"severed={severed!r} needs kind='hidden', not {kind!r}.")
    if window < 1 or samples < 1:
        raise ConfigError(f"window {window!r} and samples {samples!r} must be at least 1.")
