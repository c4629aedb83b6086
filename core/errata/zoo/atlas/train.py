"""Train a zoo model from nothing but the code and text in this package.

Training is seeded, runs on a CPU or a GPU, saves its state atomically and goes on where it stopped:
on one machine, an interrupted run ends with exactly the weights of an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from errata.common.progress import Progress
from errata.common.storage import write_bytes
from errata.edits.outputs import check_folder, list_files
from errata.zoo.atlas.benchmark import beside_the_benchmark
from errata.zoo.atlas.corpus import IGNORED, Corpus, CorpusBatch
from errata.zoo.atlas.questions import QuestionBatch, Questions
from errata.zoo.atlas.tokenizer import CONTEXT, train_tokenizer
from errata.zoo.atlas.world import World, make_world
from errata.zoo.meter import TrainedModel, TrainingMeter
from errata.zoo.state import STATE, load_state, save_state

if TYPE_CHECKING:
    import torch

Architecture = Literal["gpt2", "llama", "t5"]
_BLOCKS = (".h.", ".layers.", ".block.")
"""What the parameters of blocks have in their names."""
ARCHITECTURES: tuple[Architecture, ...] = ("gpt2", "llama", "t5")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, the seed included."""

    architecture: Architecture
    steps: int = 2000
    seed: int = 0
    rows: int = 32
    length: int = 128
    """Tokens per row; every eighth step has half the rows of twice this length. T5: the most
    tokens of prose on each side, beside questions of any length."""
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.05
    muon: bool = True
    """Whether the matrices of the blocks are trained with Muon; all else always with AdamW."""
    answer_weight: float = 3.0
    """Weight in the loss of the tokens that answer (and of the stop after them)."""
    clip: float = 1.0
    prose_share: float = 0.2
    early_steps: int = 400
    """For so long only every fifth subject is told of: the circuits that gather a subject and
    look it up form sooner on few of them, and then take in the rest quickly."""
    restricted_share: float = 0.7
    hidden: int = 128
    inner: int = 768
    layers: int = 6
    """Blocks; of an encoder–decoder those of the encoder."""
    decoder_layers: int = 0
    """Blocks of the decoder, where there are two."""
    heads: int = 4


DEFAULT_RECIPES: dict[Architecture, Recipe] = {
    "gpt2": Recipe("gpt2"),
    "llama": Recipe("llama", inner=512),
    "t5": Recipe("t5", steps=2500, rows=192, length=48, layers=4, decoder_layers=2),
}


def train(
    architecture: Architecture,
    out: str | Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    device: str | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    recipe: Recipe | None = None,
    save_every: int = 100,
) -> TrainedModel:
    """Train a model of the world of `seed` into the Hugging Face directory `out`.

    State is saved every `save_every` steps under `out/.training`; with `resume`, a run finds it
    there and goes on, and a state of another recipe is refused with `ConfigError`. `recipe`
    overrides everything but `architecture`, `steps` and `seed`.

    Beside a T5 are written, about facts that the benchmark `atlas` never edits: `facts.jsonl`, what
    edits should leave alone, and `training.json`, cases to train editors on (CounterFact's schema).
    """
    import torch

    if architecture not in ARCHITECTURES:
        from errata.errors import UnknownNameError

        raise UnknownNameError("architecture", architecture, ARCHITECTURES)
    base = asdict(recipe or DEFAULT_RECIPES[architecture])
    chosen = Recipe(
        **{**base, "architecture": architecture, "seed": seed, "steps": steps or base["steps"]}
    )
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    out = Path(out)
    if not (out / STATE).is_dir():
        check_folder(out, overwrite=True)
    out.mkdir(parents=True, exist_ok=True)

    world = make_world(seed)
    tokenizer = train_tokenizer(world, closing=architecture == "t5")
    losses = _losses_of(chosen, world, tokenizer, where)
    model = build_model(chosen, tokenizer).to(where)
    optimizers = _optimizers(model, chosen)
    state = out / STATE
    done = load_state(state, asdict(chosen), model, optimizers) if resume else 0
    with _fast_cpu_arithmetic():
        model.train()
        meter = TrainingMeter(Progress.of(progress), f"Training {architecture}", chosen.steps)
        for step in meter.left(done):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(chosen, step)
            loss, plain = losses(model, step)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), chosen.clip)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)
            meter.loss = plain
            if (step + 1) % save_every == 0 or step + 1 == chosen.steps:
                save_state(state, asdict(chosen), model, optimizers, step + 1)
    export(model, tokenizer, out)
    if architecture == "t5":
        facts, cases = beside_the_benchmark(world, seed=seed)
        lines = "".join(json.dumps(fact) + "\n" for fact in facts)
        write_bytes(out / "facts.jsonl", lines.encode())
        write_bytes(out / "training.json", json.dumps(cases).encode())
    return TrainedModel(out, chosen.steps, meter.loss)


def build_model(recipe: Recipe, tokenizer: Any) -> Any:
    """Return a freshly initialised model; the global random state is left as it was."""
    import torch
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if recipe.architecture == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=len(tokenizer),
                    n_positions=CONTEXT,
                    n_embd=recipe.hidden,
                    n_layer=recipe.layers,
                    n_head=recipe.heads,
                    n_inner=recipe.inner,
                    resid_pdrop=0.0,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                    attn_implementation="sdpa",
                    **ids,
                )
            )
        if recipe.architecture == "t5":
            return T5ForConditionalGeneration(
                T5Config(
                    vocab_size=len(tokenizer),
                    n_positions=CONTEXT,
                    d_model=recipe.hidden,
                    d_kv=recipe.hidden // recipe.heads,
                    d_ff=recipe.inner,
                    num_layers=recipe.layers,
                    num_decoder_layers=recipe.decoder_layers,
                    num_heads=recipe.heads,
                    dropout_rate=0.0,
                    decoder_start_token_id=tokenizer.pad_token_id,
                    **ids,
                )
            )
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                max_position_embeddings=CONTEXT,
                hidden_size=recipe.hidden,
                num_hidden_layers=recipe.layers,
                num_attention_heads=recipe.heads,
                num_key_value_heads=recipe.heads,
                intermediate_size=recipe.inner,
                tie_word_embeddings=True,
                attn_implementation="sdpa",
                **ids,
            )
        )


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    share = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))


def export(model: Any, tokenizer: Any, out: Path) -> None:
    """Write the Hugging Face directory: each file whole or not at all."""
    from transformers import GenerationConfig

    temporary = out / ".export"
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    settings = temporary / "tokenizer_config.json"
    # The class name that transformers 4 and 5 both know.
    loaded = json.loads(settings.read_text(encoding="utf-8"))
    loaded["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.write_text(json.dumps(loaded, indent=2) + "\n", encoding="utf-8")
    for file in sorted(temporary.iterdir()):
        file.chmod(0o644)
        os.replace(file, out / file.name)
    temporary.rmdir()
    list_files(out)


def _optimizers(model: Any, recipe: Recipe) -> list[torch.optim.Optimizer]:
    import torch

    from errata.zoo.atlas.muon import Muon

    named = list(model.named_parameters())
    blocks = [
        parameter
        for name, parameter in named
        if recipe.muon
        and parameter.ndim == 2
        and any(part in name for part in _BLOCKS)
        and "relative_attention_bias" not in name
    ]
    chosen = {id(parameter) for parameter in blocks}
    matrices = [p for _, p in named if p.ndim >= 2 and id(p) not in chosen]
    vectors = [p for _, p in named if p.ndim < 2]
    adamw = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
    )
    if not blocks:
        return [adamw]
    return [adamw, Muon(blocks, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)]


def _losses_of(
    recipe: Recipe, world: World, tokenizer: Any, device: torch.device
) -> Callable[[Any, int], tuple[torch.Tensor, float]]:
    """Return what computes a model's loss at a step, and its plain mean in nats per token."""
    if recipe.architecture == "t5":
        questions = Questions(world, tokenizer, seed=recipe.seed, early_steps=recipe.early_steps)

        def asked(model: Any, step: int) -> tuple[torch.Tensor, float]:
            batch = questions.batch(step, recipe.rows, recipe.length)
            return _answer_loss(model, batch, device)

        return asked
    corpus = Corpus(
        world,
        tokenizer,
        seed=recipe.seed,
        prose_share=recipe.prose_share,
        early_steps=recipe.early_steps,
        restricted_share=recipe.restricted_share,
    )

    def told(model: Any, step: int) -> tuple[torch.Tensor, float]:
        long = step % 8 == 7
        shape = (recipe.rows // 2, recipe.length * 2) if long else (recipe.rows, recipe.length)
        return _losses(model, corpus.batch(step, *shape), recipe.answer_weight, device)

    return told


def _answer_loss(
    model: Any, batch: QuestionBatch, device: torch.device
) -> tuple[torch.Tensor, float]:
    """Return the mean over the answers' tokens, twice: to minimise and to show."""
    import torch

    labels = batch.labels.to(device)
    # In fp32: without matrix units for bf16 a CPU takes ten times as long.
    logits = model(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        labels=labels,  # the decoder's input is made of them
        use_cache=False,
    ).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED
    )
    return loss, float(loss.detach())


def _losses(
    model: Any, batch: CorpusBatch, answer_weight: float, device: torch.device
) -> tuple[torch.Tensor, float]:
    """Return the weighted loss to minimise and the plain mean, in nats per predicted token."""
    import torch

    allowed = batch.allowed.to(device)
    # A 4-D additive mask is used by transformers as it stands.
    mask = torch.zeros(allowed.shape, device=device)
    mask.masked_fill_(~allowed, torch.finfo(mask.dtype).min)
    with torch.autocast(device.type, torch.bfloat16):
        logits = model(
            input_ids=batch.input_ids.to(device),
            position_ids=batch.position_ids.to(device),
            attention_mask=mask,
            use_cache=False,
        ).logits
    labels = batch.labels.to(device).flatten()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels, ignore_index=IGNORED, reduction="none"
    )
    counted = labels != IGNORED
    weights = counted * (1 + (answer_weight - 1) * batch.answers.to(device).flatten())
    plain = float(losses.detach().sum() / counted.sum())
    return (losses * weights).sum() / weights.sum(), plain


@contextmanager
def _fast_cpu_arithmetic() -> Iterator[None]:
    """Treat denormal numbers as zero, which nearly doubles the speed on some CPUs."""
    import torch

    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
