"""The example script, killed at random moments: it goes on where it was, nothing twice or lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from errata.edits.delta_kinds import DeltaKinds
from errata.edits.ledger import Ledger
from errata.edits.request import KINDS
from tests.helpers import ROOT

pytestmark = pytest.mark.slow
EDITS = 20


def start(ledger: Path, edits: int = EDITS) -> subprocess.Popen[str]:
    script = ROOT / "examples" / "sequential.py"
    command = [sys.executable, str(script), "--ledger", str(ledger), "-n", str(edits)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def finish(ledger: Path, edits: int = EDITS) -> None:
    process = start(ledger, edits)
    _, err = process.communicate()
    assert process.returncode == 0, err


def test_killed_and_started_again_it_finishes_every_edit_once(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    moments = random.Random(0)
    reported: list[str] = []
    for _ in range(4):
        process = start(ledger)
        assert process.stdout is not None
        for _line in range(moments.randint(1, 4)):
            words = process.stdout.readline().split()
            if len(words) > 1 and "/" in words[0]:
                reported.append(words[1])
        time.sleep(moments.random())
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        lines = [line.split() for line in rest.splitlines()]
        reported += [words[1] for words in lines if len(words) > 1 and "/" in words[0]]
    done = start(ledger)
    out, err = done.communicate()
    assert done.returncode == 0, err
    assert "bit for bit" in out
    with Ledger.open(ledger, kinds=DeltaKinds()) as opened:
        edits = opened.edits()
        assert opened.verify() == []
    assert set(reported) <= {edit.id for edit in edits}
    digests = Counter(request.digest for edit in edits for request in edit.requests)
    assert len(digests) == EDITS
    assert set(digests.values()) == {1}
    assert {edit.method for edit in edits} == {"rome", "grace", "memit", "ft", "adalora"}
    assert {edit.requests[0].kind for edit in edits} == set(KINDS) - {"label"}


def test_a_request_whose_edit_is_off_the_model_is_edited(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    finish(ledger, 2)
    with Ledger.open(ledger, kinds=DeltaKinds()) as opened:
        first, second = opened.ids()
        opened.deactivate([first])  # as an edit is that was taken back from its file
    finish(ledger, 2)
    with Ledger.open(ledger, kinds=DeltaKinds()) as opened:
        assert opened.active_ids()[0] == second
        assert len(opened.active_ids()) == 2
