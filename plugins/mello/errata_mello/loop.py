"""The loop: the model splits a question, and looks each part up among the edited facts.

    Question: …                               given
    Subquestion: …                            the model writes
    Generated answer: …                       the model writes
    Retrieved fact: …                         looked up by the sub-question
    Retrieved fact … contradicts …            the model writes, and goes on
    Final answer: …                           the model writes

It ends with a final answer ("final"), after text in another format ("format"), when as many facts
were looked up as allowed ("rounds"), or when the context is full ("length"). In a chat the worked
examples and the question are what the user says, and the model's turn is what follows. Against the
authors' code: what the model writes behind the last fact is read for a final answer, too, and
"Question" is spelt as in the examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from errata.model.chat import user_turn
from errata.model.model_answers import ModelAnswers
from errata.model.sampling import GenerationSettings
from errata.model.tokens import tokenise
from errata_mello.examples import EXAMPLES, FINAL, QUESTION, RETRIEVED, SUBQUESTION

if TYPE_CHECKING:
    from errata.model import Model
    from errata.model.answers import Generated

Ending = Literal["", "final", "format", "rounds", "length"]
_LEFT = 16
"""Tokens of context below which nothing more is written."""


@dataclass
class Trace:
    """How an answer came about.

    Attributes:
        question: what was asked; in a chat, what the user says.
        text: everything behind the worked examples, as it was read at the end; in a chat without
            what the template puts behind the question.
        facts: the facts that were looked up, in order.
        ending: why it ended; "" while it goes on.
        answer: the final answer; "" without one.
        frame: what the chat template put before and behind the question; "" in plain text.
    """

    question: str
    text: str
    facts: list[str] = field(default_factory=list)
    ending: Ending = ""
    answer: str = ""
    frame: tuple[str, str] = ("", "")

    @property
    def details(self) -> dict[str, Any]:
        """The trace as plain JSON, without the chat's frame."""
        trace = asdict(self)
        del trace["frame"]
        return {"mello": trace}


@dataclass(frozen=True)
class AnswerLoop:
    """The loop over one memory.

    Attributes:
        model: writes.
        look_up: returns the fact nearest to a sub-question.
        rounds, examples, max_new_tokens: as in `MelloConfig`.
    """

    model: Model
    look_up: Callable[[str], str]
    rounds: int
    examples: int
    max_new_tokens: int

    def run(self, prompts: Sequence[str]) -> list[Trace]:
        """Return the trace of each prompt; they are written as one batch."""
        head = self.head()
        traces = [self._begun(prompt) for prompt in prompts]
        stop = (f"\n{RETRIEVED.strip()}", f"\n{QUESTION.strip()}")
        for round_ in range(self.rounds + 1):
            for trace in traces:
                if not trace.ending and self._room(self.reading(trace, head)) < _LEFT:
                    trace.ending = "length"
            going = [trace for trace in traces if not trace.ending]
            if not going:
                break
            settings = GenerationSettings(max_new_tokens=self.max_new_tokens, stop=stop)
            texts = [self.reading(trace, head) for trace in going]
            for trace, chunk in zip(going, self._written(texts, settings), strict=True):
                self._take(trace, chunk.text, last=round_ == self.rounds)
        return traces

    def head(self) -> str:
        """Return the worked examples: as many as leave half of the context to the question."""
        limit = self.model.anatomy.context
        count = self.examples
        while count and limit is not None:
            (row,) = tokenise(self.model.tokenizer, ["".join(EXAMPLES[:count])])
            if len(row.ids) <= limit // 2:
                break
            count -= 1
        return "".join(EXAMPLES[:count])

    def reading(self, trace: Trace, head: str) -> str:
        """Return what the model reads of a trace behind the worked examples of `head`."""
        before, after = trace.frame
        if not after:
            return head + trace.text
        asked = f"{QUESTION}{trace.question}"
        written = trace.text.removeprefix(f"{asked}\n")
        return f"{before}{head}{asked}{after}{written}"

    def _begun(self, prompt: str) -> Trace:
        before, said, after = user_turn(self.model, prompt)
        question = said.strip() if after else said
        return Trace(question, f"{QUESTION}{question}\n", frame=(before, after))

    def _written(self, texts: Sequence[str], settings: GenerationSettings) -> list[Generated]:
        """Continue texts, together those that the context leaves enough room for.

        A batch is as long as its longest row, which must not cut the others short.
        """
        roomy = [text for text in texts if self._room(text) >= self.max_new_tokens]
        batches = [roomy, *([text] for text in texts if text not in roomy)]
        found: dict[str, Generated] = {}
        for batch in filter(None, batches):
            written = ModelAnswers(self.model).texts(batch, settings)
            found.update(zip(batch, written, strict=True))
        return [found[text] for text in texts]

    def _room(self, text: str) -> int:
        limit = self.model.anatomy.context
        if limit is None:
            return self.max_new_tokens
        return limit - len(tokenise(self.model.tokenizer, [text])[0].ids)

    def _take(self, trace: Trace, chunk: str, last: bool) -> None:
        """Read what was written in a round, and look the sub-question up."""
        trace.text += chunk
        lines = [line.strip() for line in chunk.strip().split("\n")]
        if lines[-1].startswith(FINAL.strip()):
            trace.answer = lines[-1][len(FINAL.strip()) :].strip()
            trace.ending = "final" if trace.answer else "format"
        elif len(lines) < 2 or not lines[-2].startswith(SUBQUESTION):
            trace.ending = "format"
        elif last:
            trace.ending = "rounds"
        else:
            fact = self.look_up(lines[-2].removeprefix(SUBQUESTION))
            trace.facts.append(fact)
            trace.text = f"{trace.text.rstrip()}\n{RETRIEVED}{fact}.\n"
