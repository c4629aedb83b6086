"""Second moments of MLP keys: C = E[k kᵀ], uncentred, over the tokens of a text.

k is the input of a block's out projection (ROME, section 3.1, calls C the covariance of keys).
All layers asked for are measured in one pass that stops at the highest of them, in fp64, and
kept as artifacts. A pass that was killed goes on where it last saved its partial sums.

A few tokens per key dimension are enough (FastMEMIT, arXiv 2506.04226); the papers' 100,000
documents are a matter of `corpus` and `tokens="all"`.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch

from errata.errors import ConfigError, StorageError
from errata.model.forward.trace import trace
from errata.model.pristine import digest
from errata.model.prompts import pad
from errata.model.texts import text_path
from errata.model.tokens import tokenise

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model.model import Model

logger = logging.getLogger("errata")

TOKENS_PER_DIMENSION = 4
"""Tokens per dimension of the key that are measured when none are said."""

FEWEST_TOKENS_PER_DIMENSION = 2
"""With fewer, C is only just regular, and noise decides C⁻¹ k (docs/results/cost.md)."""

RIDGES = (1e-10, 1e-8, 1e-6, 1e-4)
"""What is added to a singular C, relative to its mean diagonal: the first that is enough."""

_CONTEXT = 1024  # longest piece of a document for a model without a bound of its own
_LONGEST = 4096  # and for one with a long context: attention is quadratic, keys hardly differ
_WINDOW_DOCUMENTS = 64  # documents between two chances to save; sorted by length within
_WINDOW_CHARACTERS = 200_000
_ORDER_SEED = 0


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """C of one layer.

    Attributes:
        matrix: (D, D) fp64, mean of k kᵀ over tokens.
        count: tokens measured.
        layer: block it belongs to.
        text: SHA-256 of the text it was measured on (`text_hash`), where known.
    """

    matrix: Tensor
    count: int
    layer: int
    text: str = ""

    @property
    def size(self) -> int:
        """Width D of the key."""
        return int(self.matrix.shape[0])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the matrix: edits that refer to one C say so by it."""
        return digest(self.matrix)

    @property
    def cholesky(self) -> Tensor:
        """Lower Cholesky factor of C (plus `ridge`), (D, D) fp64, computed once."""
        return self._factor[0]

    @property
    def ridge(self) -> float:
        """What was added to the diagonal to make C regular; 0.0 where it is."""
        return self._factor[1]

    def solve(self, k: Tensor) -> Tensor:
        """Return C⁻¹ k in fp64, on k's device; k is (D,) or (D, N).

        Where C is singular (fewer tokens than dimensions, neurons that never fire) the smallest
        ridge of `RIDGES` that makes it regular is added, and a warning says so.
        """
        if k.ndim not in (1, 2) or k.shape[0] != self.size:
            raise ConfigError(
                f"k has shape {tuple(k.shape)}; the second moment of layer {self.layer} takes "
                f"({self.size},) or ({self.size}, N)."
            )
        columns = k.detach().to(self.matrix).reshape(self.size, -1)
        return torch.cholesky_solve(columns, self.cholesky).reshape(k.shape).to(k.device)

    def to(self, device: torch.device | str) -> SecondMoment:
        """Return it on a device; factors are computed there."""
        return SecondMoment(self.matrix.to(device), self.count, self.layer, self.text)

    @cached_property
    def _factor(self) -> tuple[Tensor, float]:
        diagonal = self.matrix.diagonal()
        mean = float(diagonal.mean())
        for relative in (0.0, *RIDGES):
            ridge = relative * mean
            shifted = self.matrix.clone()  # D × D numbers each: no more temporary ones than needed
            shifted.diagonal().add_(ridge)
            factor, info = torch.linalg.cholesky_ex(shifted)
            # A pivot that is rounding error of its diagonal entry means a dependent column, even
            # where it happens to come out positive.
            share = factor.diagonal().square() / shifted.diagonal()
            if int(info) == 0 and float(share.min()) > self.size * torch.finfo(shifted.dtype).eps:
                if relative:
                    dead = int((diagonal == 0).sum())
                    logger.warning(
                        "The second moment of layer %d is singular: %d tokens for D = %d "
                        "dimensions, %d of which never fired. Using a ridge of %g of its mean "
                        "diagonal; measure more tokens to do without.",
                        self.layer, self.count, self.size, dead, relative,
                    )  # fmt: skip
                elif self.count < FEWEST_TOKENS_PER_DIMENSION * self.size:
                    logger.warning(
                        "The second moment of layer %d is of %d tokens for D = %d dimensions. Its "
                        "small singular values are noise, and what is written through them fails: "
                        "measure %d tokens at least.",
                        self.layer, self.count, self.size,
                        FEWEST_TOKENS_PER_DIMENSION * self.size,
                    )  # fmt: skip
                return factor, ridge
        raise ConfigError(
            f"The second moment of layer {self.layer} (mean diagonal {mean:g}) cannot be inverted "
            f"even with a ridge of {RIDGES[-1]:g}: the text gives this layer no keys to speak of."
        )


def second_moments(
    model: Model,
    layers: Sequence[int],
    *,
    corpus: Sequence[str] | None = None,
    tokens: int | Literal["all"] | None = None,
    batch_tokens: int = 2048,
    save_seconds: float = 60.0,
) -> dict[int, SecondMoment]:
    """Return C of some layers: from memory, from the artifacts, or measured in one pass.

    Every real token counts, a BOS that the tokenizer adds too, and padding never. Documents are
    visited in a fixed pseudo-random order, so that few tokens stand for the whole text; one that
    is longer than the model's context (or 4096 tokens) is split into pieces, not cut off. The
    decoder of an encoder-decoder reads the second half of each document, after the encoder has
    read the first.

    Args:
        model: the model; measuring needs it without active edits.
        layers: blocks; negative ones count from the end. The keys of the result count from 0.
        corpus: documents; by default `model.corpus`, else the text that ships with errata.
        tokens: how many to measure, exactly, while the text lasts; "all" for the whole text;
            by default `TOKENS_PER_DIMENSION` times D.
        batch_tokens: tokens per forward pass, padding included (one piece at least).
        save_seconds: least time between two saves of the partial sums.

    Raises:
        ConfigError: no text, active edits, a bad layer or number, or keys that are not finite.
        StorageError: the disk refuses the result (refusing partial sums is only logged).
    """
    wanted = sorted({model.anatomy.reader.layer(layer) for layer in layers})
    if not wanted:
        raise ConfigError("No layers were given: name at least one.")
    documents = documents_of(model, corpus)
    if tokens is None:
        tokens = TOKENS_PER_DIMENSION * model.anatomy.reader.key_size
    if tokens != "all" and (not isinstance(tokens, int) or tokens < 1):
        raise ConfigError(f"tokens={tokens!r} is not allowed: give a positive number or 'all'.")
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens={batch_tokens!r} must be positive.")
    text = text_hash(documents)
    # Kept for the model's life, so that each edit of a sequence reuses the Cholesky factors.
    held: dict[tuple[Any, ...], SecondMoment] = model.remembered("second moments", dict)
    found: dict[int, SecondMoment] = {}
    for layer in wanted:
        name = (model.fingerprint, layer, text, tokens)
        moment = held.get(name) or _load(model, layer, text, tokens)
        if moment is not None:
            found[layer] = held[name] = moment
    missing = [layer for layer in wanted if layer not in found]
    if missing:
        measured = _Pass(model, missing, documents, text, tokens, batch_tokens).run(save_seconds)
        for layer, moment in measured.items():
            name = (model.fingerprint, layer, text, tokens)
            found[layer] = held[name] = moment
    return {layer: found[layer] for layer in wanted}


def documents_of(model: Model, corpus: Sequence[str] | None = None) -> list[str]:
    """Return the documents to measure: those given, the model's, or the shipped text's lines."""
    given = corpus if corpus is not None else model.corpus
    if isinstance(given, str):
        raise ConfigError("corpus is one string; give a list of documents, [text].")
    if given is None:
        path = text_path("train")
        if not path.is_file():
            raise ConfigError(
                f"The text that ships with errata is not at {path}. Pass one of your own: "
                "corpus=[document, …], to the editor or to second_moments."
            )
        given = path.read_text(encoding="utf-8").splitlines()
    documents = [document for document in given if document.strip()]
    if not documents:
        raise ConfigError("corpus holds no text: give at least one document that is not empty.")
    return documents


def text_hash(documents: Sequence[str]) -> str:
    """SHA-256 over documents and where they end."""
    sha = hashlib.sha256()
    for document in documents:
        data = document.encode("utf-8", "surrogatepass")
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return sha.hexdigest()


def _key(model: Model, part: str, text: str, tokens: int | str) -> tuple[str, ...]:
    return ("second_moment", model.fingerprint, part, text, f"tokens-{tokens}")


def _load(model: Model, layer: int, text: str, tokens: int | str) -> SecondMoment | None:
    stored = model.artifacts.load(_key(model, f"layer-{layer}", text, tokens))
    if stored is None:
        return None
    tensors, metadata = stored
    size = model.anatomy.shape(model.module, model.anatomy.reader.mlp_out(layer))[1]
    matrix, count = tensors.get("C"), metadata.get("count")
    if matrix is None or matrix.shape != (size, size) or not isinstance(count, int):
        return None
    if matrix.dtype != torch.float64 or not bool(torch.isfinite(matrix).all()):
        return None
    return SecondMoment(matrix, count, layer, text)


class _Pass:
    """One pass over the documents, for some layers of one model."""

    def __init__(
        self, model: Model, layers: Sequence[int], documents: Sequence[str], text: str,
        tokens: int | Literal["all"], batch_tokens: int,
    ) -> None:  # fmt: skip
        if model.stack.entries:
            raise ConfigError(
                f"Measuring second moments needs the model without edits, but "
                f"{len(model.stack.entries)} are active ({', '.join(model.stack.ids[:3])}). Wrap "
                "the call in `with model.base_state():`, or prepare before the first edit."
            )
        self.model = model
        self.layers = list(layers)
        self.names = {layer: model.anatomy.reader.mlp_out(layer) for layer in layers}
        self.documents = documents
        self.text = text
        self.tokens = tokens
        self.batch_tokens = batch_tokens
        self.sums: dict[int, Tensor] = {}
        self.count = 0
        # Partial sums depend on the batches by rounding: another batch size does not resume them.
        self.partial = _key(model, f"partial-{batch_tokens}", text, tokens)

    def run(self, save_seconds: float) -> dict[int, SecondMoment]:
        """Measure, save and return the second moment of every layer."""
        windows = list(self._windows())
        done = self._resume()
        saved = time.monotonic()
        layers = ", ".join(map(str, self.layers))
        for number, window in enumerate(
            self.model.progress.track(
                windows[done:], f"second moments of layers {layers}", len(windows) - done
            ),
            start=done + 1,
        ):
            self._measure(window)
            if self._left() == 0:
                break
            if number < len(windows) and time.monotonic() - saved >= save_seconds:
                self._save_partial(number)
                saved = time.monotonic()
        return self._finish()

    def _left(self) -> float:
        return float("inf") if self.tokens == "all" else self.tokens - self.count

    def _windows(self) -> Iterator[list[str]]:
        """Cut the documents, in their fixed order, into lists to tokenise and save at once."""
        generator = torch.Generator().manual_seed(_ORDER_SEED)
        window: list[str] = []
        characters = 0
        for index in torch.randperm(len(self.documents), generator=generator).tolist():
            window.append(self.documents[index])
            characters += len(window[-1])
            if len(window) == _WINDOW_DOCUMENTS or characters >= _WINDOW_CHARACTERS:
                yield window
                window, characters = [], 0
        if window:
            yield window

    def _pieces(self, window: Sequence[str]) -> Iterator[list[int]]:
        """Tokenise documents and split those that are too long."""
        anatomy = self.model.anatomy
        limit = min(anatomy.context or _CONTEXT, _LONGEST)
        for row in tokenise(self.model.tokenizer, window):
            head, tail = row.ids[: row.begin], row.ids[row.stop :]
            body = row.ids[row.begin : row.stop]
            step = max(limit - len(head) - len(tail), 1)
            for start in range(0, len(body), step):
                yield [*head, *body[start : start + step], *tail]

    def _measure(self, window: Sequence[str]) -> None:
        """Add the keys of a window's tokens, up to what is left of the wanted number."""
        pieces: list[list[int]] = []
        left = self._left()
        for piece in self._pieces(window):
            if left <= 0:
                break
            piece = piece[: int(min(left, len(piece)))]
            left -= len(piece)
            pieces.append(piece)
        pieces.sort(key=len)
        batch: list[list[int]] = []
        for piece in pieces:
            if batch and len(piece) * (len(batch) + 1) > self.batch_tokens:
                self._add(batch)
                batch = []
            batch.append(piece)
        if batch:
            self._add(batch)

    def _add(self, pieces: Sequence[list[int]]) -> None:
        """Run one batch up to the highest layer and add k kᵀ of every real token."""
        model = self.model
        batch = pad(model.tokenizer, pieces, device=model.device)
        inputs = batch.inputs(positions=False)  # of an encoder-decoder only the encoder runs
        flags = {} if model.anatomy.kind == "encoder" else {"use_cache": False}
        names = list(self.names.values())
        with (
            torch.no_grad(),
            trace(model.module, names, inputs=True, outputs=False, stop=True) as seen,
        ):
            model.module(**inputs, **flags)
        for layer, name in self.names.items():
            given = seen[name].input
            if given is None:
                raise ConfigError(f"{name} is called without a tensor: it is no projection.")
            real = batch.attention_mask.to(given.device).bool().flatten()
            keys = given.flatten(0, -2)[real]  # (tokens, D); OPT's is flat already
            # In fp64; Apple's devices have none, there the CPU does the sum.
            keys = (keys.cpu() if keys.device.type == "mps" else keys).double()
            product = keys.T @ keys
            total = self.sums.get(layer)
            # Resumed sums come from the CPU; with device_map each layer has a device of its own.
            self.sums[layer] = product if total is None else total.to(product.device).add_(product)
        self.count += sum(batch.lengths)

    def _resume(self) -> int:
        """Take up the partial sums of a pass that was killed; return the windows it has done."""
        stored = self.model.artifacts.load(self.partial)
        if stored is None:
            return 0
        tensors, metadata = stored
        done, count = metadata.get("windows"), metadata.get("count")
        if not isinstance(done, int) or not isinstance(count, int):
            return 0
        for layer in self.layers:
            total = tensors.get(f"sum.{layer}")
            if total is None or total.dtype != torch.float64:
                self.sums = {}
                return 0  # saved for other layers
            self.sums[layer] = total
        self.count = count
        logger.info("Resuming second moments after %d tokens.", count)
        return done

    def _save_partial(self, windows: int) -> None:
        try:
            self.model.artifacts.save(
                self.partial,
                {f"sum.{layer}": total for layer, total in self.sums.items()},
                {"windows": windows, "count": self.count},
            )
        except StorageError as error:
            logger.warning("Partial sums were not saved, going on without: %s", error)

    def _finish(self) -> dict[int, SecondMoment]:
        if self.count == 0:
            raise ConfigError("corpus gives no token: give documents with text.")
        moments = {}
        for layer in self.layers:
            matrix = (self.sums[layer] / self.count).cpu()
            if not bool(torch.isfinite(matrix).all()):
                raise ConfigError(
                    f"The keys of layer {layer} are not finite on this text in {self.model.dtype}: "
                    "load the model in a wider dtype."
                )
            self.model.artifacts.save(
                _key(self.model, f"layer-{layer}", self.text, self.tokens),
                {"C": matrix},
                {"count": self.count, "layer": layer},
            )
            moments[layer] = SecondMoment(matrix, self.count, layer, self.text)
        self.model.artifacts.path(self.partial).unlink(missing_ok=True)
        return moments
