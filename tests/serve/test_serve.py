"""A served model: right answers for every choice of edits, nothing lost, and who may do what."""

from __future__ import annotations

import json
import random
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from errata import Editor
from errata.cli.app import app as command_line
from errata.datasets import atlas
from errata.edits.edit import Edit
from errata.edits.ledger import Ledger
from errata.errors import ConfigError
from errata.serve.settings import ServeSettings

pytest.importorskip("fastapi", reason="needs errata[serve]")
pytest.importorskip("uvicorn", reason="needs errata[serve]")
from fastapi.testclient import TestClient

from errata.serve import create_app
from errata.serve.batching import Batcher, BusyError, TextPart, Waiting

FACTS = atlas.requests(4)
TOKEN = "a token of eight letters"
BASE = "http://127.0.0.1:8000"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


def opened(branch: bool = False) -> tuple[Editor, list[Edit]]:
    editor = Editor("atlas-gpt2", guards={"perplexity": "off"}, branch=branch)
    return editor, [editor.edit(fact, method="rome") for fact in FACTS[:3]]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[TestClient, Editor, list[Edit]]]:
    editor, edits = opened()
    settings = ServeSettings(TOKEN, allow_edits=True, max_new_tokens=24)
    with editor, TestClient(create_app(editor, settings), base_url=BASE) as client:
        yield client, editor, edits


def complete(client: TestClient, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def streamed(client: TestClient, path: str, **fields: Any) -> list[dict[str, Any]]:
    with client.stream("POST", path, json={**fields, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


# -- answers ---------------------------------------------------------------------------------------


def test_each_request_takes_the_edits_that_it_asks_for(
    served: tuple[TestClient, Editor, list[Edit]],
) -> None:
    client, editor, edits = served
    fact, one = FACTS[0], edits[0].id
    name = editor.model.name
    asked = {"prompt": fact.text, "max_tokens": 6}
    with editor.disabled():
        base = editor.generate(fact.text, max_new_tokens=6)
    edited = editor.generate(fact.text, max_new_tokens=6)
    assert fact.target_new in edited
    assert fact.target_new not in base
    for choice, wanted, ids in (
        ({}, edited, [e.id for e in edits]),
        ({"model": name}, edited, [e.id for e in edits]),
        ({"errata": {"only": []}}, base, []),
        ({"model": f"{name}@base"}, base, []),
        ({"errata": {"only": [one]}}, None, [one]),
        ({"model": f"{name}@{one}"}, None, [one]),
        ({"errata": {"without": [one[:8]]}}, None, [e.id for e in edits[1:]]),
    ):
        answer = complete(client, **asked, **choice)
        assert answer["errata"]["edits"] == ids
        if wanted is None:
            with editor.only(*ids):
                wanted = editor.generate(fact.text, max_new_tokens=6)
        assert answer["choices"][0]["text"] == wanted
        assert answer["choices"][0]["finish_reason"] in ("stop", "length")
        assert answer["usage"]["completion_tokens"] <= 6
    assert editor.model.stack.ids == [e.id for e in edits]
    assert editor.verify() == []
    assert {m["id"] for m in client.get("/v1/models").json()["data"]} >= {name, f"{name}@base"}


def test_what_is_on_is_said_right_while_another_request_has_its_own_edits_on(
    served: tuple[TestClient, Editor, list[Edit]],
) -> None:
    client, editor, edits = served
    ids = [edit.id for edit in edits]
    on, go_on = threading.Event(), threading.Event()

    def other() -> None:
        with editor.only(ids[0]):
            on.set()
            assert go_on.wait(60)

    def asked() -> dict[str, Any]:
        return complete(client, prompt=FACTS[0].text, max_tokens=1, errata={"without": [ids[1]]})

    with ThreadPoolExecutor(2) as pool:
        holding = pool.submit(other)
        assert on.wait(60)
        answer = pool.submit(asked)
        try:
            state = client.get("/errata/state").json()
            rows = client.get("/errata/edits").json()["edits"]
            named = {m["id"].partition("@")[2] for m in client.get("/v1/models").json()["data"]}
        finally:
            go_on.set()
        assert state["active"] == ids
        assert all(row["active"] for row in rows)
        assert named >= set(ids)
        assert answer.result()["errata"]["edits"] == [ids[0], ids[2]]
        holding.result()


def test_a_stream_adds_up_to_the_whole_answer(
    served: tuple[TestClient, Editor, list[Edit]],
) -> None:
    client, _, edits = served
    asked = {"prompt": FACTS[0].text, "max_tokens": 12, "errata": {"only": [edits[0].id]}}
    whole = complete(client, **asked)["choices"][0]
    parts = streamed(client, "/v1/completions", **asked)
    assert "".join(p["choices"][0]["text"] for p in parts) == whole["text"]
    assert parts[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]
    assert len(parts) > 2


def test_several_prompts_and_stop_strings(served: tuple[TestClient, Editor, list[Edit]]) -> None:
    client, editor, _ = served
    prompts = [fact.text for fact in FACTS]
    whole = editor.generate(prompts, max_new_tokens=8)
    found = complete(client, prompt=prompts, max_tokens=8)
    assert [c["text"] for c in found["choices"]] == whole
    mark = whole[0][2:4]
    short = complete(client, prompt=prompts[0], max_tokens=8, stop=[mark])["choices"][0]
    assert short["text"] == whole[0].partition(mark)[0]
    assert short["finish_reason"] == "stop"
    parts = streamed(client, "/v1/completions", prompt=prompts[0], max_tokens=8, stop=mark)
    assert "".join(p["choices"][0]["text"] for p in parts) == short["text"]
    drawn = [
        complete(client, prompt=prompts[0], temperature=1, seed=5)["choices"][0]["text"]
        for _ in range(2)
    ]
    assert (
        drawn[0]
        == drawn[1]
        == editor.generate(prompts[0], max_new_tokens=16, do_sample=True, seed=5)
    )


def test_half_a_stop_string_is_held_back() -> None:
    said: list[TextPart] = []
    one = Waiting("", 9, said.append, stop=("END",))
    for text in ("a", "aE", "aEN", "aENx", "aENx\ufffd", "aENxé", "aENxéEN", "aENxéEND"):
        ended = one.take(text)
    assert ended
    one.end("aENxéEND", full=False)
    assert [piece.text for piece in said] == ["a", "ENx", "é", ""]
    assert said[-1].finish == "stop"


@pytest.mark.parametrize(
    ("path", "fields", "status", "said"),
    [
        ("completions", {"prompt": "a", "n": 2}, 400, "n is not supported"),
        ("completions", {"prompt": "a", "logprobs": 3}, 400, "logprobs"),
        ("completions", {"prompt": [[1, 2]]}, 400, "prompt"),
        ("completions", {}, 400, "prompt"),
        ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ("completions", {"prompt": "a b " * 3000}, 400, ". Shorten it."),
        ("completions", {"prompt": "a", "max_tokens": 100_000}, 400, "at most 24"),
        ("completions", {"prompt": "a", "top_k": 5}, 400, "top_k is not supported"),
        ("completions", {"prompt": "a", "repetition_penalty": 1.2}, 400, "repetition_penalty is"),
        ("completions", {"prompt": "a", "ignore_eos": True}, 400, "ignore_eos is not supported"),
        ("completions", {"prompt": "a", "guided_json": {}}, 400, "Unknown field 'guided_json'"),
        ("completions", {"prompt": "a", "max_token": 9}, 400, "Did you mean 'max_tokens'?"),
        ("completions", {"prompt": "a", "temprature": 1}, 400, "Did you mean 'temperature'?"),
        ("completions", {"prompt": "\ud83d"}, 400, "half a character"),
        ("completions", {"prompt": "a", "stop": ["a", "\ud83d"]}, 400, "half a character"),
        ("completions", {"prompt": "a", "model": "\ud83d"}, 400, "half a character"),
        ("completions", {"prompt": "a", "\ud83d": 1}, 400, "half a character"),
        ("completions", {"prompt": "a", "errata": {"only": ["\ud83d"]}}, 400, "half a character"),
        ("chat/completions", {"messages": [{"role": "user", "content": "\ud83d"}]}, 400, "half a"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}]},
            400,
            "half a",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a", "name": "Bo"}]},
            400,
            "name of a message is not supported",
        ),
        (
            "chat/completions",
            {
                "messages": [{"role": "user", "content": "a"}],
                "max_tokens": 3,
                "max_completion_tokens": 4,
            },
            400,
            "they differ",
        ),
        ("completions", {"prompt": "a", "model": "gpt-4"}, 404, "Unknown model"),
        ("completions", {"prompt": "a", "errata": {"only": ["beef"]}}, 404, "beef"),
        ("completions", {"prompt": "a", "errata": {"only": [], "without": []}}, 400, "only or"),
        ("completions", {"prompt": "a", "errata": {"olny": []}}, 400, "olny"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}, 400, "template"),
        ("chat/completions", {"messages": []}, 400, "messages"),
    ],
)
def test_what_cannot_be_done_is_said_as_openai_says_it(
    path: str, fields: dict[str, Any], status: int, said: str,
    served: tuple[TestClient, Editor, list[Edit]],
) -> None:  # fmt: skip
    sent = {"content": json.dumps(fields), "headers": {"Content-Type": "application/json"}}
    answer = served[0].post(f"/v1/{path}", **sent)
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize("header", [None, "application/x-www-form-urlencoded", "text/plain"])
def test_json_is_taken_whatever_it_is_called(
    header: str | None, served: tuple[TestClient, Editor, list[Edit]]
) -> None:
    content = json.dumps({"prompt": FACTS[0].text, "max_tokens": 2}).encode()
    headers = {} if header is None else {"Content-Type": header}
    answer = served[0].post("/v1/completions", content=content, headers=headers)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "a",}', "no JSON: Illegal trailing comma|no JSON: Expecting property name"),
        (b"{nope", r"no JSON: Expecting property name .*\(at character 2\)"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, "prompt: Field required"),
        (b"", "must be a JSON object"),
        (b"[1]", "must be a JSON object"),
        (b'"prompt"', "must be a JSON object"),
    ],
)
def test_a_body_that_cannot_be_read_is_told_why(
    content: bytes, said: str, served: tuple[TestClient, Editor, list[Edit]]
) -> None:
    answer = served[0].post("/v1/completions", content=content)
    assert answer.status_code == 400
    assert re.search(said, answer.json()["error"]["message"]), answer.text


def test_what_clients_send_and_changes_no_answer_is_taken(
    served: tuple[TestClient, Editor, list[Edit]],
) -> None:
    client, _, _ = served
    asked = {"prompt": FACTS[0].text, "max_tokens": 4}
    plain = complete(client, **asked)["choices"]
    idle = {
        "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "n": 1,
        "logit_bias": {}, "top_k": -1, "repetition_penalty": 1.0, "tool_choice": "auto",
        "stream_options": None,
    }  # fmt: skip
    assert complete(client, **asked, **idle)["choices"] == plain
    parts = streamed(client, "/v1/completions", **asked, stream_options={"include_usage": True})
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"] == complete(client, **asked)["usage"]
    assert "".join(part["choices"][0]["text"] for part in parts[:-1]) == plain[0]["text"]
    for path in ("offset=-1", "ofset=1"):
        assert client.get(f"/errata/edits?{path}").status_code == 400
    for path, more in (("compare", {}), ("trace", {"subject": "a"})):
        broken = {"content": json.dumps({"prompt": "a\ud83d", **more})}
        said = client.post(
            f"/errata/{path}", **broken, headers={"Content-Type": "application/json"}
        )
        assert said.status_code == 400
        assert "half a character" in said.json()["error"]["message"]


@pytest.mark.parametrize("branch", [False, True], ids=["folded", "beside"])
def test_what_another_process_changes_in_the_ledger_is_taken_over(
    branch: bool, tmp_path: Path
) -> None:
    with Editor("atlas-gpt2", ledger=tmp_path / "l", guards={"perplexity": "off"}) as maker:
        edits = [maker.edit(fact, method="rome").id for fact in FACTS[:2]]
    settings = ServeSettings(TOKEN, allow_edits=True)
    editor = Editor("atlas-gpt2", ledger=tmp_path / "l", branch=branch)
    other = Ledger.open(tmp_path / "l")  # as `errata revert` in another shell
    with other, editor, TestClient(create_app(editor, settings), base_url=BASE) as client:
        asked = {"prompt": FACTS[0].text, "max_tokens": 4}
        assert complete(client, **asked)["errata"]["edits"] == edits
        other.deactivate(edits[:1])
        assert client.get(f"/errata/edits/{edits[0]}").json()["active"] is False
        after = complete(client, **asked)
        assert after["errata"]["edits"] == edits[1:]
        assert FACTS[0].target_new not in after["choices"][0]["text"]
        other.activate(edits[:1])
        other.deactivate(edits[1:])
        again = client.post(f"/errata/edits/{edits[1]}/revert", headers=BEARER)
        assert again.status_code == 409
        assert f"Active now: {edits[0]}." in again.json()["error"]["message"]
        reverted = client.post(f"/errata/edits/{edits[0]}/revert", headers=BEARER)
        assert reverted.json() == {"active": [], "stale": []}
        other.refresh()
        other.activate(edits[:1])
        found = client.post("/errata/compare", json={**asked, "b": {"only": []}}).json()
        assert found["a"]["edits"] == edits[:1]
        assert editor.verify() == []


# -- who may ---------------------------------------------------------------------------------------


def test_edits_come_and_go_by_http_with_the_token_alone(
    served: tuple[TestClient, Editor, list[Edit]],
) -> None:
    client, editor, edits = served
    ids, last = [e.id for e in edits], edits[-1].id
    path = f"/errata/edits/{last}/revert"
    for headers in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": TOKEN}):
        assert client.post(path, headers=headers).status_code == 401
    assert editor.model.stack.ids == ids
    assert client.post(path, headers=BEARER).json() == {"active": ids[:-1], "stale": []}
    assert editor.model.stack.ids == ids[:-1]
    assert client.post(path, headers=BEARER).status_code == 409  # it is off already
    off = client.get("/errata/edits", params={"q": f"rome {FACTS[2].target_new}"}).json()
    assert [(e["id"], e["active"]) for e in off["edits"] if e["id"] == last] == [(last, False)]
    back = client.post(f"/errata/edits/{last}/apply", headers=BEARER)
    assert back.json() == {"active": ids, "stale": []}
    under, above = f"/errata/edits/{ids[0]}", ids[1:]  # those were made on top of it
    assert client.post(f"{under}/revert", headers=BEARER).json()["stale"] == above
    assert client.post(f"{under}/apply", headers=BEARER).json()["stale"] == []
    assert client.post("/errata/edits/..%2Fpyproject.toml/apply", headers=BEARER).status_code == 404
    assert editor.verify() == []


def test_a_server_is_read_only_and_for_this_machine_unless_told_otherwise(
    served: tuple[TestClient, Editor, list[Edit]],
) -> None:
    _, editor, edits = served
    revert = f"/errata/edits/{edits[0].id}/revert"
    with TestClient(create_app(editor), base_url=BASE) as client:
        assert client.post(revert, headers=BEARER).status_code == 403
        for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
            assert client.get("/errata/state", headers=headers).status_code in (403, 421)
        page = client.get("/")
        assert "script-src 'self'" in page.headers["content-security-policy"]
        assert "://" not in page.text  # nothing is loaded from elsewhere
        large = client.post("/v1/completions", content=b"x" * (2**20 + 1))
        assert large.status_code == 413
    rules = ServeSettings(TOKEN, token_for_all=True)
    with TestClient(create_app(editor, rules), base_url="http://10.0.0.7:8000") as client:
        assert client.get("/v1/models").status_code == 401
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 401
        assert client.get("/v1/models", headers=BEARER).status_code == 200
        assert client.post(revert, headers=BEARER).status_code == 403
        assert client.get("/").status_code == 200  # the page asks for the token
    assert editor.model.stack.ids == [e.id for e in edits]
    with pytest.raises(ConfigError, match="need a token"):
        ServeSettings(allow_edits=True)


def test_a_body_in_chunks_is_counted_as_it_arrives(
    served: tuple[TestClient, Editor, list[Edit]],
) -> None:
    client, _, _ = served
    asked = json.dumps({"prompt": FACTS[0].text, "max_tokens": 2}).encode()
    small = client.post(
        "/v1/completions",
        content=iter([asked[:9], asked[9:]]),
        headers={"Content-Type": "application/json"},
    )
    assert small.request.headers["transfer-encoding"] == "chunked"
    assert small.status_code == 200, small.text
    large = client.post(
        "/v1/completions",
        content=(b" " * 2**16 for _ in range(64)),
        headers={"Content-Type": "application/json"},
    )
    assert large.status_code == 413
    assert large.json()["error"]["message"] == "The request is too large."


@pytest.mark.parametrize(
    ("path", "function", "asked"),
    [
        ("compare", "compared", {"prompt": "a", "a": {}, "b": {}, "max_tokens": 1}),
        ("trace", "traced", {"prompt": "Ada is", "subject": "Ada"}),
        ("edits/x/answers", "side_effects", {}),
    ],
)
def test_an_error_that_is_not_erratas_is_json_and_says_nothing_of_the_machine(
    path: str,
    function: str,
    asked: dict[str, Any],
    served: tuple[TestClient, Editor, list[Edit]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client, _, _ = served

    def fails(*_: Any) -> None:
        raise ZeroDivisionError("in /home/someone/plugin.py")

    monkeypatch.setattr(f"errata.serve.looking.{function}", fails)
    answer = client.post(f"/errata/{path}", json=asked)
    assert answer.status_code == 500, answer.text
    assert answer.json()["error"]["type"] == "server_error"
    assert "someone" not in answer.text
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    (record,) = [r for r in caplog.records if "failed" in r.getMessage()]
    assert record.exc_info is not None
    assert "someone" in str(record.exc_info[1])


@pytest.mark.parametrize("place", ["ERRATA_TOKEN", "file"])
@pytest.mark.parametrize("words", [(), ("--allow-edits",)])
def test_a_short_token_is_refused_wherever_it_stands(
    place: str, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text("tok")
    monkeypatch.delenv("ERRATA_TOKEN", raising=False)
    if place == "file":
        words = (*words, "--token-file", str(file))
    else:
        monkeypatch.setenv("ERRATA_TOKEN", "tok")
    result = CliRunner().invoke(command_line, ["serve", "-m", "atlas-gpt2", *words])
    said = " ".join(result.stderr.split())
    assert result.exit_code == 1
    assert f"{place if place != 'file' else 'token'} is shorter than 8 characters" in said


def test_the_page_gets_what_it_shows(served: tuple[TestClient, Editor, list[Edit]]) -> None:
    client, editor, edits = served
    first = edits[0].id
    detail = client.get(f"/errata/edits/{first}").json()
    assert detail["config"]["layer"] == edits[0].config["layer"]
    report = client.post(f"/errata/edits/{first}/answers").json()
    (own,) = [a for a in report["answers"] if a["role"] == "request"]
    assert FACTS[0].target_new in own["after"]
    assert any(a["role"] == "neighbour" for a in report["answers"])
    found = client.post(
        "/errata/compare",
        json={"prompt": FACTS[0].text, "a": {"only": []}, "b": {}, "max_tokens": 4},
    ).json()
    assert not found["same"]
    assert "".join(t["text"] for t in found["b"]["tokens"]).strip() == found["b"]["text"].strip()
    head = found["a"]["tokens"][0]
    assert head["own"] > head["other"]
    assert head["other_says"]
    asked = {"prompt": FACTS[0].text, "subject": FACTS[0].subject, "estimate": True}
    picture = client.post("/errata/trace", json=asked)
    assert picture.content.startswith(b"\x89PNG"), picture.text
    assert client.post("/errata/trace", json={**asked, "subject": "Nobody"}).status_code == 400
    assert editor.verify() == []
    assert editor.model.stack.ids == [e.id for e in edits]


# -- under load ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("branch", [False, True], ids=["folded", "beside"])
def test_under_load_no_answer_is_wrong_and_no_edit_is_lost(branch: bool) -> None:
    """Mixed selections from many clients while one edit is reverted and applied by HTTP."""
    editor, edits = opened(branch)
    ids = [e.id for e in edits]
    prompts = [fact.text for fact in FACTS]
    choices = [[], ids[:1], ids[1:2], ids[:2], ids]
    expected = {}
    for chosen in (*choices, ids[:2]):
        with editor.only(*chosen):
            texts = editor.generate(prompts, max_new_tokens=6)
        expected.update({(tuple(chosen), p): t for p, t in zip(prompts, texts, strict=True)})
    settings = ServeSettings(TOKEN, allow_edits=True, max_batch=8)
    stop = threading.Event()
    with editor, TestClient(create_app(editor, settings), base_url=BASE) as client:

        def come_and_go() -> int:
            count = 0
            while not stop.is_set() or count % 2:
                what = "apply" if count % 2 else "revert"
                answer = client.post(f"/errata/edits/{ids[2]}/{what}", headers=BEARER)
                assert answer.status_code == 200, answer.text
                count += 1
            return count

        def ask(seed: int) -> set[tuple[str, ...]]:
            draw = random.Random(seed)
            seen = set()
            for _ in range(5):
                prompt = draw.choice(prompts)
                chosen = draw.choice([None, *choices])
                more = {} if chosen is None else {"errata": {"only": chosen}}
                answer = complete(client, prompt=prompt, max_tokens=6, **more)
                used = tuple(answer["errata"]["edits"])
                assert chosen is None or list(used) == chosen
                assert answer["choices"][0]["text"] == expected[used, prompt]
                seen.add(used)
            return seen

        with ThreadPoolExecutor(7) as pool:
            changing = pool.submit(come_and_go)
            try:
                seen = set().union(*pool.map(ask, range(6)))
            finally:
                stop.set()
            assert changing.result() >= 2
        assert len(seen) >= 4
        assert editor.model.stack.ids == ids
        assert editor.verify() == []


def test_one_that_fails_or_goes_away_does_not_stop_the_others(
    served: tuple[TestClient, Editor, list[Edit]],
) -> None:
    _, editor, _ = served
    batcher = Batcher(editor, max_waiting=2)
    said: list[TextPart] = []
    done = threading.Event()

    def tell(piece: TextPart) -> None:
        said.append(piece)
        if piece.finish or piece.error:
            done.set()

    batcher.submit([Waiting(FACTS[0].text, 4, tell, only=("000000000000",))])
    assert done.wait(60)
    assert "000000000000" in str(said[-1].error)
    done.clear()
    gone = Waiting(FACTS[0].text, 4, tell)
    gone.cancelled.set()
    batcher.submit([gone, Waiting(FACTS[1].text, 4, tell)])
    assert done.wait(60)
    assert said[-1].finish is not None
    with pytest.raises(BusyError, match="waiting already"):
        batcher.submit([gone] * 3)
    batcher.close()
    assert editor.verify() == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("serve", "--model", "nowhere/"), "nowhere"),
        (("serve", "--model", "atlas-gpt2", "--token-file", "{}/none"), "Cannot read the token"),
        (("ui", "--model", "atlas-gpt2", "--token-file", "{}/short"), "shorter than 8"),
    ],
)
def test_the_commands_refuse_what_makes_no_sense(
    args: tuple[str, ...], said: str, tmp_path: Any
) -> None:
    (tmp_path / "short").write_text("abc")
    filled = [a.format(tmp_path) for a in args]
    result = CliRunner().invoke(command_line, [*filled, "--ledger", str(tmp_path / "l")])
    assert result.exit_code == 1
    assert said in " ".join(result.stderr.split())


def test_a_port_that_is_taken_is_found_out_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("errata.cli.session.Session.editor", lambda *_, **__: pytest.fail("loads"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = ["serve", "-m", "atlas-gpt2", "--ledger", str(tmp_path / "l"), "--port", port]
        result = CliRunner().invoke(command_line, words)
    assert result.exit_code == 1
    assert f"Cannot listen at 127.0.0.1 port {port}" in " ".join(result.stderr.split())


def test_a_faint_estimate_is_said_to_be_one(
    served: tuple[TestClient, Editor, list[Edit]], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _, _ = served
    asked = {"prompt": FACTS[0].text, "subject": FACTS[0].subject, "estimate": True}
    for share, said in ((1e9, True), (0.0, False)):
        monkeypatch.setattr("errata.serve.looking.FAINT", share)
        answer = client.post("/errata/trace", json=asked)
        assert answer.headers["content-type"] == "image/png"
        assert ("Trace without it" in answer.headers.get("Errata-Note", "")) == said


def test_a_text_that_an_edit_rewrites_keeps_to_its_own_limit_and_is_streamed() -> None:
    editor = Editor("atlas-gpt2", guards={"perplexity": "off", "efficacy": "off"})
    editor.edit(FACTS[0], method="ice")
    alone = editor.generate(FACTS[0].text, max_new_tokens=4)
    with editor, TestClient(create_app(editor, ServeSettings(TOKEN)), base_url=BASE) as client:
        asked = {"prompt": FACTS[0].text, "max_tokens": 4}
        with ThreadPoolExecutor(4) as pool:
            long = [pool.submit(complete, client, prompt=f.text, max_tokens=40) for f in FACTS[:3]]
            short = pool.submit(complete, client, **asked).result()
            assert any(one.result()["usage"]["completion_tokens"] > 4 for one in long)
        assert short["choices"][0] | {"logprobs": None} == {
            "index": 0, "text": alone, "finish_reason": "length", "logprobs": None,
        }  # fmt: skip
        assert short["usage"]["completion_tokens"] == 4
        parts = streamed(client, "/v1/completions", **asked)
        texts = [part["choices"][0]["text"] for part in parts if part["choices"]]
        assert "".join(texts) == alone
        assert sum(map(bool, texts)) > 1


@pytest.mark.parametrize("limit", [2, 40])
def test_a_text_that_comes_whole_is_cut_at_its_own_limit(limit: int, toys: None) -> None:
    editor = Editor("atlas-gpt2", guards={"perplexity": "off", "efficacy": "off"})
    fact = FACTS[0].model_copy(update={"target_new": "one two three four five six"})
    editor.edit(fact, method="toy-oracle")
    whole = editor.generate(fact.text)
    with editor, TestClient(create_app(editor, ServeSettings(TOKEN)), base_url=BASE) as client:
        answer = complete(client, prompt=fact.text, max_tokens=limit)
    tokens = len(editor.model.tokenizer(whole, add_special_tokens=False)["input_ids"])
    (choice,) = answer["choices"]
    assert whole.startswith(choice["text"])
    assert (choice["text"] == whole) is (limit > tokens)
    assert choice["finish_reason"] == ("stop" if limit > tokens else "length")
    assert answer["usage"]["completion_tokens"] == min(limit, tokens)
    assert set(choice["errata"]["details"]) == {"model"}  # what the one that answers says of it
