"""What mkdocs cannot know by itself: the navigation, and the pages that are made from code.

A method's page is its plugin's `page.md` (equations, when to use it, what other implementations get
wrong), with its paper, hyper-parameters and measured rows from the code, the registry and the pages
of results. A new plugin, result or page of the docs appears without a change here.
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))
from reference import (
    about,
    commands_page,
    hyper_parameters,
    method_names,
    package,
    registry_entry,
)

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
NAV: list[tuple[str, list[str]]] = [
    ("Start", ["index.md", "install.md", "first-edit.md", "choosing.md",
               "concepts.md"]),
    ("How to", ["checking.md", "thousands.md", "shipping.md", "serving.md", "server.md",
                "models.md", "plugin.md", "datasets.md", "locate.md", "protocols.md", "bench.md",
                "report.md", "notebooks.md"]),
    ("Methods", ["methods/index.md", "closed-form.md", "tuning.md", "trained.md", "memories.md",
                 "in-context.md", "both-sides.md"]),
    ("Coming from EasyEdit", ["easyedit.md"]),
    ("Reference", ["python.md", "cli.md", "commands.md"]),
    ("Results", []),
    ("About", ["architecture.md", "zoo.md", "contributing.md", "changelog.md", "security.md"]),
]  # fmt: skip
"""The pages by heading; one that is named here and not there yet is left out."""
ELSEWHERE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md",
             "security.md": "SECURITY.md"}  # fmt: skip
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
METHOD_PAGE = re.compile(r"plugins/(\w+)/page\.md")
MOST = 14  # rows of one table of results that a method's page repeats


def on_config(config: Any) -> Any:
    """Build the navigation from what is there."""
    made = generated()
    there = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")} | set(made)
    named = {page for _, pages in NAV for page in pages}
    config.nav = []
    for title, pages in NAV:
        own = [page for page in pages if page in there]
        if title == "Methods":
            own[1:1] = sorted(p for p in made if p.startswith("methods/") and p not in named)
        if title == "Results":
            own += sorted(p for p in there if p.startswith("results/"))
        if title == "How to":  # and whatever nobody has found a place for
            own += sorted(p for p in there if "/" not in p and p not in named)
        config.nav.append({title: own[0]} if len(own) == 1 else {title: own})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made from code or lie outside of docs."""
    for name, text in generated().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Show links to files that are not on the site as the paths that they are."""
    del config
    folder = posixpath.dirname(page.file.src_uri)

    def shown(match: re.Match[str]) -> str:
        text, target, place = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if files.get_file_from_path(path) is not None:
            return match[0]
        inside = path.removeprefix("../")
        method = METHOD_PAGE.fullmatch(inside)
        made = {f"methods/{method[1]}.md": inside} if method else {}
        for ours, theirs in (ELSEWHERE | made).items():
            if inside == theirs and files.get_file_from_path(ours) is not None:
                return f"[{text}]({posixpath.relpath(ours, folder or '.')}{place})"
        if path.startswith("../") and (ROOT / inside).exists():
            return text if inside in text else f"{text} (`{inside}`)"
        return match[0]  # mkdocs says that it leads nowhere

    return LINK.sub(shown, markdown)


# -- pages -----------------------------------------------------------------------------------------


def generated() -> dict[str, str]:
    """Return every page that is made here, by its place on the site."""
    pages = {f"methods/{name}.md": method_page(name) for name in method_names()}
    pages["methods/index.md"] = methods_index()
    pages["commands.md"] = commands_page()
    for ours, theirs in ELSEWHERE.items():
        if (ROOT / theirs).is_file():
            pages[ours] = _from_root((ROOT / theirs).read_text(encoding="utf-8"))
    return pages


def _from_root(text: str) -> str:
    """Return a page of the root with links as they are seen from docs."""
    return _relinked(text, lambda target: posixpath.relpath(target, "docs"))


def methods_index() -> str:
    """Return the list of methods, as the registry has it."""
    rows = []
    for name in method_names():
        entry = registry_entry(name)
        kinds = ", ".join(entry.capabilities.kinds)
        rows.append(f"| [{name}]({name}.md) | {entry.title} | {entry.family} | "
                    f"`{entry.delta_kind}` | {kinds} |")  # fmt: skip
    return (
        "# Methods\n\nEach is a plugin: `pip` installs it, the registry describes it, and every "
        "dataset, metric and command works with it. *Merge* methods are trained adapters, "
        "*intrinsic* ones change weights, *external* ones leave the weights alone and act while "
        "the model runs.\n\n| name | method | family | what it stores | kinds of request |\n"
        "|---|---|---|---|---|\n" + "\n".join(rows) + "\n\nA method of your own: "
        "[writing a method](../plugin.md).\n"
    )


def method_page(name: str) -> str:
    """Return one method's page."""
    entry = registry_entry(name)
    own = own_page(name)
    can = entry.capabilities
    facts = [
        ("paper", f"[{entry.paper}]({entry.url})" if entry.url else entry.paper),
        ("family", entry.family),
        ("stores", f"`{entry.delta_kind}`"),
        ("kinds of request", ", ".join(can.kinds)),
        ("models", ", ".join(can.architectures)),
        ("several requests in one call", "yes" if can.batch else "no"),
        ("needs", ", ".join(can.needs) or "nothing"),
        ("status", entry.status),
        (
            "evidence",
            f"[{entry.evidence}](../{entry.evidence})"
            if entry.evidence
            else "none: nothing is measured yet",
        ),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in facts)
    blocks = [
        f"# {name}",
        f"{entry.title}. {entry.summary or ''}".strip(),
        f"| | |\n|---|---|\n{table}",
        own.read_text(encoding="utf-8").strip() if own else f"## The method\n\n{about(name)}",
        "## Hyper-parameters",
        f"`errata methods {name} --model MODEL` shows the values for your model and where each "
        "comes from.",
        hyper_parameters(name),
        *measured(name),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def own_page(name: str) -> Path | None:
    """Return what a plugin's folder says about a method: NAME.md, or page.md for its only one."""
    folder = ROOT / "plugins" / package(name).removeprefix("errata_")
    return next((p for p in (folder / f"{name}.md", folder / "page.md") if p.is_file()), None)


def measured(name: str) -> Iterator[str]:
    """Yield the rows about a method of every table on the pages of results."""
    first = True
    for page in sorted((DOCS / "results").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        tables = [found for found in map(_table, text.split("\n\n")) if found is not None]
        title = text.partition("\n")[0].lstrip("# ")
        for head, rows in tables:
            own = [row for row in rows if re.match(rf"\|\s*`{re.escape(name)}`", row)]
            if not own:
                continue
            if first:
                yield "## Measured"
                yield "Rows about this method; the pages say how each number was measured."
                first = False
            more = f"\n\n… and {len(own) - MOST} more rows." if len(own) > MOST else ""
            yield f"**[{title}](../results/{page.name})**"
            yield _beside_results("\n".join([*head, *own[:MOST]]), page.name) + more


def _beside_results(rows: str, page: str) -> str:
    """Return rows of a page of results with links as they are seen from a method's page."""
    return _relinked(
        rows.replace("](#", f"]({page}#"), lambda target: posixpath.normpath(f"../results/{target}")
    )


def _relinked(text: str, moved: Callable[[str], str]) -> str:
    """Return Markdown whose links to other files go where `moved` says; what follows # stays."""
    return re.sub(
        r"\]\((?!https?:)([^)\s#]+)(#[^)\s]*)?\)",
        lambda match: f"]({moved(match[1])}{match[2] or ''})",
        text,
    )


def _table(block: str) -> tuple[list[str], list[str]] | None:
    lines = [line for line in block.splitlines() if line.startswith("|")]
    if len(lines) < 3 or not re.fullmatch(r"[|\s:-]+", lines[1]):
        return None
    return lines[:2], lines[2:]
