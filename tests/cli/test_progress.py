"""Long work says how far it is, through the log or a callable, and other libraries stay quiet."""

from __future__ import annotations

import io
import logging
import re
import threading

import pytest
import transformers

from errata import Editor
from errata.cli.progress import ConsoleProgress
from errata.cli.render import console
from errata.common import progress as module
from errata.common.foreign_noise import quiet_imports, quiet_loading
from errata.common.progress import Progress, Work
from errata.errors import ConfigError


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST", 0.01)
    monkeypatch.setattr(module, "EVERY", 0.01)


def lines_of(progress: Progress, heard: threading.Event) -> None:
    """Do two steps of which the second goes on until a line was said."""
    for index in progress.track([0, 1], "Counting"):
        if index:
            assert heard.wait(30)


def test_work_that_takes_long_is_reported_to_a_callable(at_once: None) -> None:
    said: list[str] = []
    heard = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        if text.startswith("Counting: 1 of 2"):
            heard.set()

    lines_of(Progress(say), heard)
    assert said[-1].startswith("Counting: done, 2 in")
    assert "about" in next(line for line in said if line.startswith("Counting: 1 of 2"))


def test_work_is_reported_in_the_log_at_info(
    at_once: None, caplog: pytest.LogCaptureFixture
) -> None:
    heard = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.set()

    handler = Listener()
    logger = logging.getLogger("errata")
    logger.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO, "errata"):
            lines_of(Progress(), heard)
    finally:
        logger.removeHandler(handler)
    assert any(line.startswith("Counting") for line in caplog.messages)


def test_what_has_only_just_begun_is_not_said_in_the_place_of_what_goes_on(
    at_once: None,
) -> None:
    said: list[str] = []
    heard = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        heard.set()

    progress = Progress(say)
    with progress.busy("Loading all"), progress.busy("Loading a part"):
        assert heard.wait(30)
    assert said[0].startswith("Loading all")


def test_every_line_begins_with_how_far_the_whole_is(
    at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "YOUNG", 0.0)
    said: list[str] = []
    heard = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        if "Measuring: 1 of 5" in text:
            heard.set()

    progress = Progress(say)
    for case in progress.track(range(3), "Editing and measuring"):
        for step in progress.track(range(5), "Measuring"):
            if (case, step) == (1, 1):
                assert heard.wait(30)
    assert all(line.startswith("Editing and measuring") for line in said)
    assert any(
        re.fullmatch(r"Editing and measuring: 1 of 3 \(.*\); Measuring: 1 of 5 \(.*\)", line)
        for line in said
    )


def test_nobody_listens_nothing_runs() -> None:
    before = threading.active_count()
    for _ in Progress().track([1], "Counting"):
        assert threading.active_count() == before


def test_the_command_line_says_plain_lines_without_a_terminal(at_once: None) -> None:
    stream = io.StringIO()
    heard = threading.Event()
    progress = ConsoleProgress(console(file=stream))
    say = progress.note

    def note(text: str) -> None:
        say(text)
        heard.set()

    progress.note = note  # type: ignore[method-assign]
    with progress.busy("Loading"):
        assert heard.wait(30)
    assert stream.getvalue().startswith("Loading … (0 s)\n")


def test_the_time_left_is_estimated_from_the_steps_done() -> None:
    assert (
        Work("Editing", 10, 4, started=0.0).line(20.0) == "Editing: 4 of 10 (20 s, about 30 s left)"
    )
    assert Work("Editing", 10, 0, started=0.0).line(20.0) == "Editing: 0 of 10 (20 s)"
    assert Work("Loading", started=0.0).line(600.0) == "Loading … (10 min)"


def test_an_editor_reports_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    with Editor("atlas-gpt2", progress=said.append) as editor:
        editor.model.progress.note("heard")
    assert said[-1] == "heard"
    assert capfd.readouterr() == ("", "")  # no loading bar of transformers


@pytest.mark.parametrize("given", [True, 3, "print"])
def test_progress_that_cannot_be_called_is_refused_at_once(given: object) -> None:
    with pytest.raises(ConfigError, match=rf"progress={given!r} is not allowed"):
        Editor("atlas-gpt2", progress=given)  # type: ignore[arg-type]


def test_what_a_callable_raises_does_not_end_the_work(
    caplog: pytest.LogCaptureFixture,
) -> None:
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        raise ValueError("no more paper")

    progress = Progress(say)
    for text in ("one", "two"):
        progress.note(text)
    assert said == ["one"]
    (line,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "raised ValueError: no more paper" in line.getMessage()

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Progress(interrupt).note("done")


def test_other_libraries_are_as_they_were_afterwards(caplog: pytest.LogCaptureFixture) -> None:
    bars = transformers.utils.logging
    was = bars.is_progress_bar_enabled()
    bars.enable_progress_bar()
    try:
        with quiet_loading():
            assert not bars.is_progress_bar_enabled()
        assert bars.is_progress_bar_enabled()
    finally:
        (bars.enable_progress_bar if was else bars.disable_progress_bar)()
    kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with quiet_imports():
        kernels.warning("no kernels")
    assert caplog.messages == []
    kernels.warning("a real problem")
    assert caplog.messages == ["a real problem"]
