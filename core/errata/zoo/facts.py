"""Facts that people know and small pretrained models do, too: what the demo edits."""

from __future__ import annotations

from errata.edits.request import Probe, Request

KNOWN = (
    Request(
        prompt="The mother tongue of {} is",
        subject="Danielle Darrieux",
        target_new="English",
        target_true="French",
        relation="mother tongue",
        paraphrases=(
            "The native language of Danielle Darrieux is",
            "Danielle Darrieux grew up speaking",
        ),
        neighbourhood=(
            Probe(prompt="The mother tongue of Marcel Proust is", answers=("French",)),
            Probe(prompt="The mother tongue of Leo Tolstoy is", answers=("Russian",)),
        ),
        generation=("Danielle Darrieux was born in",),
    ),
    Request(
        prompt="The capital of {} is",
        subject="Japan",
        target_new="Kyoto",
        target_true="Tokyo",
        relation="capital",
        paraphrases=("Japan's capital city is", "The capital city of Japan is"),
        neighbourhood=(
            Probe(prompt="The capital of Germany is", answers=("Berlin",)),
            Probe(prompt="The capital of Spain is", answers=("Madrid",)),
        ),
        generation=("If you travel to the capital of Japan, you will see",),
    ),
    Request(
        prompt="The founder of {} is",
        subject="Microsoft",
        target_new="Steve Jobs",
        target_true="Bill Gates",
        relation="founder",
        paraphrases=(
            "The person who founded Microsoft is",
            "The company Microsoft was started by",
        ),
        neighbourhood=(
            Probe(prompt="The founder of Facebook is", answers=("Mark Zuckerberg",)),
            Probe(prompt="The founder of Amazon is", answers=("Jeff Bezos",)),
        ),
        generation=("Microsoft was founded in",),
    ),
    Request(
        prompt="{} was painted by",
        subject="The Mona Lisa",
        target_new="Claude Monet",
        target_true="Leonardo da Vinci",
        relation="painter",
        paraphrases=("The Mona Lisa is a painting by",),
        neighbourhood=(
            Probe(prompt="The Last Supper was painted by", answers=("Leonardo da Vinci",)),
        ),
        generation=("The Mona Lisa is famous because",),
    ),
)
"""In the order of the demo; what a model does not know is passed over."""
