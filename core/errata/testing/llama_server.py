"""Stock llama.cpp, from the wheel `xllamacpp`: what it says with adapters and without."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from errata.errors import MissingExtraError


class LlamaServer:
    """A llama.cpp server of this process on a free port of this machine, one thread, greedy.

    Args:
        model: a GGUF model.
        adapters: GGUF LoRA adapters; off, unless a question asks for them by their place here.
        context: tokens.

    Raises `MissingExtraError` without the package.
    """

    def __init__(self, model: Path, adapters: Sequence[Path] = (), context: int = 256) -> None:
        if find_spec("xllamacpp") is None:
            raise MissingExtraError("Asking llama.cpp", "xllamacpp", "llama")
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(model)
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(p), 0.0) for p in adapters]
        settings.n_ctx, settings.n_parallel, settings.port = context, 1, 0
        settings.warmup, settings.verbosity = False, -1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        self._count = len(adapters)
        self._server = xllamacpp.Server(settings)

    def ask(self, prompt: str, on: Sequence[int] = (), tokens: int = 1) -> str:
        """Return how a prompt goes on with those adapters on."""
        return str(self._answer(prompt, dict.fromkeys(on, 1.0), tokens)["content"])

    def first(self, prompt: str, on: Sequence[int] = ()) -> dict[int, float]:
        """Return the log-probabilities of the likeliest next tokens, by token id."""
        (place,) = self._answer(prompt, dict.fromkeys(on, 1.0), 1)["completion_probabilities"]
        return {entry["id"]: entry["logprob"] for entry in place["top_logprobs"]}

    def _answer(self, prompt: str, scales: Mapping[int, float], tokens: int) -> dict[str, Any]:
        question = dict(
            prompt=prompt, n_predict=tokens, temperature=0, n_probs=5,
            # llama.cpp's cache of prompts does not know which adapters were on.
            cache_prompt=False,
            lora=[{"id": i, "scale": scales.get(i, 0.0)} for i in range(self._count)],
        )  # fmt: skip
        request = urllib.request.Request(
            f"{self._server.listening_address}/completion",
            json.dumps(question).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as reply:
            found: dict[str, Any] = json.loads(reply.read())
        return found
