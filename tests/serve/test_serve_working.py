"""Long work of a server: seen while it goes on, and given up where nobody waits for it."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from errata import Editor
from errata.datasets import atlas

pytest.importorskip("fastapi", reason="needs errata[serve]")
pytest.importorskip("uvicorn", reason="needs errata[serve]")

from errata.serve import ServeSettings, create_app, looking
from errata.serve.batching import Waiting
from errata.serve.running import Server

FACT = atlas.requests(1)[0]
TOKEN = "a token of eight letters"
ASKED = {"prompt": FACT.text, "subject": FACT.subject}


class Steps:
    """A trace of many short steps, which says how many of them it made."""

    def __init__(self) -> None:
        self.made = 0
        self.ended = threading.Event()

    def __call__(self, editor: Editor, asked: Any) -> tuple[bytes, str]:
        del asked
        try:
            with editor.model.access.changing():
                for _ in editor.model.progress.track(range(600), "stepping"):
                    self.made += 1
                    time.sleep(0.05)
        finally:
            self.ended.set()
        return b"picture", ""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    made = Steps()
    monkeypatch.setattr(looking, "traced", made)
    return made


@pytest.fixture
def served() -> Iterator[tuple[int, Any, Editor]]:
    with Editor("atlas-gpt2") as editor, socket.create_server(("127.0.0.1", 0)) as listening:
        app = create_app(editor, ServeSettings(TOKEN))
        server = Server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.02)
        yield listening.getsockname()[1], server, editor
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def sent(port: int, path: str, body: Any = None) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json"}
    data = None if body is None else json.dumps(body)
    connection.request("GET" if data is None else "POST", path, data, headers)
    return connection


def answered(port: int, path: str, body: Any = None) -> dict[str, Any]:
    with closing(sent(port, path, body)) as connection:
        answer = connection.getresponse()
        assert answer.status == 200
        return json.loads(answer.read())  # type: ignore[no-any-return]


def begun(port: int, steps: Steps) -> http.client.HTTPConnection:
    connection = sent(port, "/errata/trace", ASKED)
    while steps.made < 3:
        time.sleep(0.02)
    return connection


def test_it_is_seen_and_ends_when_who_asked_goes_away(
    served: tuple[int, Any, Editor], steps: Steps
) -> None:
    port, _, _ = served
    connection = begun(port, steps)
    (job,) = answered(port, "/errata/working")["jobs"]
    assert (job["what"], job["step"], job["total"]) == ("A causal trace", "stepping", 600)
    assert 1 <= job["done"] < 600
    connection.close()
    assert steps.ended.wait(10)
    assert steps.made < 300
    while answered(port, "/errata/working")["jobs"]:
        time.sleep(0.02)
    answered(port, "/v1/completions", {"prompt": FACT.text, "max_tokens": 2})  # it is free again


def test_it_ends_when_the_server_does(served: tuple[int, Any, Editor], steps: Steps) -> None:
    port, server, editor = served
    heard = editor.model.progress
    with closing(begun(port, steps)) as connection:
        server.should_exit = True
        assert steps.ended.wait(15)
        answer = connection.getresponse()
        assert answer.status == 503
        assert "The server is being closed." in json.loads(answer.read())["error"]["message"]
    assert steps.made < 500
    while editor.model.progress is heard:  # who opened the editor listens again
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_is_told_that_the_server_is_being_closed(
    stream: bool,
    served: tuple[int, Any, Editor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    port, server, _ = served
    taken = threading.Event()

    def slowly(self: Waiting, text: str) -> bool:
        del text
        taken.set()
        time.sleep(0.05)
        return self.cancelled.is_set()  # it never ends by itself

    monkeypatch.setattr(Waiting, "take", slowly)
    monkeypatch.setattr("errata.model.generation.end_tokens", lambda _: frozenset())
    asked = {"prompt": FACT.text, "max_tokens": 100, "stream": stream}
    running = sent(port, "/v1/completions", asked)
    assert taken.wait(20)
    waiting = sent(port, "/v1/completions", asked)
    while answered(port, "/errata/working")["texts"] < 2:
        time.sleep(0.02)
    server.should_exit = True
    for connection in (running, waiting):
        with closing(connection):
            answer = connection.getresponse()
            assert answer.status == (200 if stream else 503)
            said = answer.read().decode().removeprefix("data: ")
            assert json.loads(said)["error"]["message"] == "The server is being closed."
    assert not [record for record in caplog.records if record.exc_info]


def test_a_streamed_text_ends_when_its_reader_goes_away(
    served: tuple[int, Any, Editor], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, _, _ = served
    taken: list[str] = []
    take = Waiting.take

    def slowly(self: Waiting, text: str) -> bool:
        taken.append(text)
        time.sleep(0.1)
        take(self, text)
        return self.cancelled.is_set()  # it never ends by itself

    monkeypatch.setattr(Waiting, "take", slowly)
    asked = {"prompt": FACT.text, "max_tokens": 100, "stream": True}
    with closing(sent(port, "/v1/completions", asked)) as connection:
        assert connection.getresponse().readline().startswith(b"data: ")
    while answered(port, "/errata/working")["texts"]:
        time.sleep(0.05)
    assert len(taken) < 60
