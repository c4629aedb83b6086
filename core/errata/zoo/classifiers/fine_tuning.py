"""Fine-tuning of an encoder of the zoo as a classifier of sentences; seeded, and resumable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.common.foreign_noise import quiet_loading
from errata.common.progress import Progress
from errata.edits.outputs import check_folder
from errata.zoo.meter import TrainedModel, TrainingMeter
from errata.zoo.state import STATE, load_state, save_state

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class ClassifierRecipe:
    """How an encoder is fine-tuned; what a text and its class are is a subclass's to say."""

    base: str = "minilm"
    steps: int = 600
    rows: int = 32
    learning_rate: float = 2e-4
    warmup: int = 30
    seed: int = 0


def fine_tune(
    rows: Sequence[tuple[str, int]],
    labels: Sequence[str],
    out: Path,
    recipe: ClassifierRecipe,
    *,
    resume: bool = True,
    progress: Progress | None = None,
    save_every: int = 100,
) -> tuple[Any, Any, TrainedModel]:
    """Fine-tune on (text, class) rows into the Hugging Face directory `out`.

    Returns the model in evaluation mode, its tokenizer, and how training ended. An interrupted
    call goes on where it stopped.

    Args:
        rows: texts with their classes, as numbers.
        labels: names of the classes.
        out: the folder.
        recipe: base, schedule and seed.
        resume: go on from a state that is there.
        progress: told how far it is.
        save_every: steps between two saved states.

    Raises `ConfigError` for a state of another recipe.
    """
    import torch

    if not (out / STATE).is_dir():
        check_folder(out, overwrite=True)
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = _base(recipe, labels)
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    state = out / STATE
    done = load_state(state, asdict(recipe), model, [optimiser]) if resume else 0
    model.train()
    meter = TrainingMeter(Progress.of(progress), "Training the classifier", recipe.steps)
    for step in meter.left(done):
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        chosen = torch.randint(len(rows), (recipe.rows,), generator=generator).tolist()
        logits = logits_of(model, tokenizer, [rows[index][0] for index in chosen])
        classes = torch.tensor([rows[index][1] for index in chosen])
        loss = torch.nn.functional.cross_entropy(logits, classes)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rise = min(1.0, (step + 1) / recipe.warmup)
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * rise * (1 - step / recipe.steps)
        optimiser.step()
        model.zero_grad(set_to_none=True)
        meter.loss = float(loss.detach())
        if (step + 1) % save_every == 0 or step + 1 == recipe.steps:
            save_state(state, asdict(recipe), model, [optimiser], step + 1)
    model.eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return model, tokenizer, TrainedModel(out, recipe.steps, meter.loss)


def logits_of(model: Any, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Return the class scores (n, classes) of texts."""
    batch = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True)
    logits: torch.Tensor = model(**batch).logits
    return logits


def _base(recipe: ClassifierRecipe, labels: Sequence[str]) -> tuple[Any, Any]:
    """Return the encoder with a new head, without dropout, and its tokenizer."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from errata.zoo import model_path

    folder = model_path(recipe.base) if not Path(recipe.base).is_dir() else Path(recipe.base)
    names = dict(enumerate(labels))
    with torch.random.fork_rng(devices=[]), quiet_loading(), _no_report():
        torch.manual_seed(recipe.seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=len(labels), id2label=names, dtype=torch.float32,
            label2id={name: index for index, name in names.items()},
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, trust_remote_code=False,
        )  # fmt: skip
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@contextmanager
def _no_report() -> Iterator[None]:
    """Keep transformers from reporting that the head is new."""
    from transformers.utils import logging

    former = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(former)
