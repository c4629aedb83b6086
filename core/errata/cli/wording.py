"""The library's messages in the words of the command line: options for arguments."""

from __future__ import annotations

import re

WORDS: tuple[tuple[str, str], ...] = (
    (r"pass overwrite=True", "pass --overwrite"),
    (r"trust_remote_code=True", "--trust-remote-code"),
    (r"supersede=True changes the model, apply=False does not",
     "--supersede changes the model, --no-apply does not"),
    (r"--skip-bad \(skip_bad=True\)|skip_bad=True", "--skip-bad"),
    (r"choose one with split=…", "choose one with --split"),
    (r"Editor\(…, training=requests\), or (`errata prepare [^`]*` once)", r"\1"),
    (r"Loosen the guard with guards=\{\.\.\.: 'warn'\} if you accept it",
     "Accept it with --guard NAME=warn"),
    (r"a prompt with \{\}, subject=… and target_new=…",
     "a prompt with {}, --subject and --target, or --file"),
    (r" \(the traceback shows where\)", " (--debug shows where)"),
    (r"errata\.datasets\.load\(NAME, records\) makes requests of them \([^)]*\)",
     "give --dataset NAME=PATH (`errata datasets` lists the names)"),
    (r"give a list of requests, each with its prompt, [^;]*; or errata\.datasets\.load\([^)]*\) "
     r"makes them of a mapping of such lists",
     "give --dataset NAME=PATH (counterfact or knowedit)"),
    (r"with export\(\)", "with `errata export`"),
    (r"Nothing was written: refresh, and try again",
     "Nothing was written: repeat the command"),
    (r"call `prepare` first, which", "run `errata prepare METHOD` first, which"),
    (r"Give other text \(Editor\(corpus=…\)\) or retain_documents=0",
     "Give --set retain_documents=0"),
    (r"Pass resume=False to start again", "Pass --fresh to start again"),
    (r"revert\(edit\) or revert\('id'\)", "errata revert ID"),
    (r"open that model, give this one another ledger, or revert them first",
     "give that model with --model, another ledger with --ledger, or first `errata revert --all`"),
    (r'\(base="owner/name"\)', "(--base OWNER/NAME)"),
    (r"\(base=…, --base FILE\)", "(--base FILE)"),
    # Every hyper-parameter and every setting of a locator is given by --set.
    (r"(?<![\w.'\"(-])(?<!--set )(\w+)=(True|False)(?=[.,;: ]|$)", r"--set \1=\2"),
    (r"(?<![\w.-])contexts=\(…\)", "--set contexts=[…]"),
)  # fmt: skip
"""What the library says → what the command line says (regular expressions)."""


def in_options(message: str) -> str:
    """Return a message of the library with options where it speaks of arguments.

    >>> in_options("out exists already: choose another place, or pass overwrite=True.")
    'out exists already: choose another place, or pass --overwrite.'
    """
    for pattern, words in WORDS:
        message = re.sub(pattern, words, message)
    return message
