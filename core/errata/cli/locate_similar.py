"""`errata locate --similar`: how alike prompts that belong together are located."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.locate_views import edits_on, similarity_view
from errata.cli.pictures import say_pictures
from errata.cli.render import count
from errata.edits.request import Request
from errata.errors import RequestError, UnknownNameError

if TYPE_CHECKING:
    from errata.cli.session import Session

NEEDED = {
    "paraphrases": "requests with paraphrases that name the subject once",
    "relations": "requests with a relation, several about each",
    "chains": "requests with portability probes that ask through the fact and name its subject "
    "once (types reasoning, two_hop, multi_hop, single_hop: KnowEdit, MQuAKE, atlas)",
}
"""Kind of sets (`errata.locate.related_prompts.SETS`) → the requests that it takes."""


def similar(
    session: Session,
    requests: Sequence[Request],
    kind: str,
    by: str,
    settings: dict[str, Any],
    plot: Path | None,
) -> None:
    """Say how alike prompts of one set are located: RSim, and the overlap of the layers named."""
    from errata.locate.layer_overlap import layer_overlap
    from errata.locate.related_prompts import SETS
    from errata.locate.similarity import located_sets, place_similarity

    if kind not in SETS:
        raise UnknownNameError("kind of sets", kind, SETS)
    sets = SETS[kind](requests)
    if len(sets) < 2:
        raise RequestError(
            f"The {count(len(requests), 'request')} make {count(len(sets), 'set')} of {kind}; RSim "
            f"needs at least two. It takes {NEEDED[kind]}."
        )
    with session.editor() as editor:
        located = located_sets(editor.model, sets, by, **settings)
        name, active = editor.model.name, editor.model.stack.entries
    found = place_similarity(located, by)
    profiles = [[one.profile for one in group] for group in located]
    overlap = layer_overlap(profiles, protocol=f"layer overlap: the k highest layers by {by}")
    drawn: list[Path] = []
    if plot is not None:
        from errata import plots

        heading = f"{by} on {name}"
        drawn = [plots.save(plots.layer_overlaps({kind: overlap}, heading), plot)]
    if session.json:
        session.emit(
            {
                "model": name,
                "sets_of": kind,
                "locator": by,
                "edits": [edit.id for edit in active],
                **found.as_json(),
                "layers": overlap.as_json(),
                "pictures": [str(path) for path in drawn],
            }
        )
        return
    session.show(*similarity_view(name, kind, found, overlap, edits_on(active)))
    say_pictures(session, drawn)
