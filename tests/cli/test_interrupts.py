"""Ctrl-C while a command imports, and twice: in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")

BEGINS = """
import os, signal, time
from pathlib import Path
os.kill(os.getpid(), signal.SIGINT)
"""
ENDS = """
Path("imported").touch()

class Slow:
    def __init__(self):
        time.sleep(60)  # whatever comes after the import
"""


def interrupted(folder: Path, module: str) -> subprocess.CompletedProcess[str]:
    """Run a command that imports a method of another package; the module says what happens."""
    (folder / "errata_slow.py").write_text(module)
    info = folder / "errata_slow-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: errata-slow\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[errata.methods]\nslow = errata_slow:Slow\n")
    return subprocess.run(
        [sys.executable, "-c", "from errata.cli import main; main()", "methods", "slow"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
        # A test run in the background of a shell ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.parametrize("between", ["", "time.sleep(0.02)\nos.kill(os.getpid(), signal.SIGINT)\n"])
def test_ctrl_c_waits_for_an_import_and_ends_in_order_once(tmp_path: Path, between: str) -> None:
    # Raised inside, it would end a process whose C++ code is importing.
    done = interrupted(tmp_path, BEGINS + between + ENDS)
    assert done.returncode == 130
    assert (tmp_path / "imported").exists()
    assert done.stderr.startswith("Interrupted.")
    assert "Traceback" not in done.stderr


def test_a_later_ctrl_c_ends_what_does_not_end(tmp_path: Path) -> None:
    later = "time.sleep(1.1)\nos.kill(os.getpid(), signal.SIGINT)\n"
    done = interrupted(tmp_path, BEGINS + later + ENDS)
    assert (done.returncode, done.stderr.strip()) == (130, "Interrupted.")
    assert not (tmp_path / "imported").exists()
