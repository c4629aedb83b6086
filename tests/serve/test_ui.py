"""The page in a real browser: what is on the model, what edits did, and changing it."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from errata import Editor
from errata.datasets import atlas
from errata.edits.edit import Edit

pytest.importorskip("fastapi", reason="needs errata[serve]")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")

from errata.serve import ServeSettings, create_app  # noqa: E402

pytestmark = pytest.mark.slow  # a browser; what the page asks of the server: test_serve.py

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FACTS = atlas.requests(3)
TOKEN = "a token of eight letters"
HOSTILE = "<img src=x onerror=alert(1)>\u202e"
SHOTS = os.environ.get("ERRATA_SHOTS")
"""A folder: pictures of the page are left there, to be looked at."""


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Editor, list[Edit]]]:
    import uvicorn

    with Editor("atlas-gpt2", guards={"perplexity": "off"}) as editor:
        edits = [editor.edit(fact, method="rome") for fact in FACTS[:2]]
        hostile = {**FACTS[2].model_dump(), "target_new": HOSTILE}
        edits.append(editor.edit(hostile, method="rome", config={"steps": 1}, apply=False))
        app = create_app(editor, ServeSettings(TOKEN, allow_edits=True))
        with socket.create_server(("127.0.0.1", 0)) as listening:
            server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
            thread.start()
            while not server.started:
                time.sleep(0.02)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", editor, edits
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        try:
            made = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no browser: {error.message.splitlines()[0]}")
        yield made
        made.close()


@pytest.fixture
def page(browser: Any, served: tuple[str, Editor, list[Edit]]) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    opened = context.new_page()
    problems: list[str] = []
    # The browser itself reports a wrong token's answer as an error.
    opened.on(
        "console",
        lambda m: problems.append(m.text) if m.type == "error" and "401" not in m.text else None,
    )
    opened.on("pageerror", lambda e: problems.append(str(e)))
    opened.on("dialog", lambda d: (problems.append(f"dialog {d.message}"), d.dismiss()))
    elsewhere: list[str] = []
    opened.on(
        "request",
        lambda r: None if r.url.startswith((served[0], "blob:")) else elsewhere.append(r.url),
    )
    opened.goto(served[0])
    opened.wait_for_selector("#list > li")
    yield opened
    context.close()
    assert problems == []
    assert elsewhere == []


def shoot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


def test_edits_are_listed_searched_and_asked_about(
    page: Any, served: tuple[str, Editor, list[Edit]]
) -> None:
    _, _, edits = served
    assert page.locator("#list > li").count() == 3
    assert "2 active edits" in page.locator("#state").inner_text()
    assert HOSTILE[:28] in page.locator("#list").inner_text()  # as text
    assert "\\u202e" in page.locator("#list").inner_text()
    assert page.locator("#list img").count() == 0
    page.fill("#query", FACTS[1].subject)
    sync_api.expect(page.locator("#list > li")).to_have_count(1)
    assert edits[1].id in page.locator("#list").inner_text()
    page.get_by_role("button", name="Details").click()
    page.wait_for_selector("#list table")
    shown = page.locator("#list table").inner_text()
    assert "new answer" in shown
    assert "neighbour" in shown
    assert not {"null", "undefined"} & set(page.locator("#list").inner_text().split())
    shoot(page, "edits")


def test_reverting_asks_first_and_works_from_the_keyboard(
    page: Any, served: tuple[str, Editor, list[Edit]]
) -> None:
    _, editor, edits = served
    ids = [e.id for e in edits[:2]]
    button = page.locator(f"[data-id='{ids[1]}']").get_by_role("button", name="Revert")
    button.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#confirm[open]")
    assert ids[1] in page.locator("#confirm").inner_text()
    shoot(page, "confirm")
    page.keyboard.press("Escape")
    page.wait_for_selector("#confirm[open]", state="hidden")
    assert editor.model.stack.ids == ids
    button.click()
    page.locator("#confirm input").fill("wrong token")
    page.locator("#confirm").get_by_role("button", name="Revert").click()
    page.wait_for_selector("#login[open]")
    assert "not this server's token" in page.locator("#login").inner_text()
    assert editor.model.stack.ids == ids
    page.locator("#login input").fill(TOKEN)
    page.keyboard.press("Enter")
    page.wait_for_selector(f"[data-id='{ids[1]}']:not(.on)")
    assert editor.model.stack.ids == ids[:1]
    page.locator(f"[data-id='{ids[1]}']").get_by_role("button", name="Apply").click()
    page.locator("#confirm").get_by_role("button", name="Apply").click()
    page.wait_for_selector(f"[data-id='{ids[1]}'].on")
    assert editor.model.stack.ids == ids
    assert editor.verify() == []


def test_two_stacks_a_trace_and_a_chat(page: Any, served: tuple[str, Editor, list[Edit]]) -> None:
    page.get_by_role("link", name="Compare").click()
    page.fill("#compare [name=prompt]", FACTS[0].text)
    page.get_by_role("button", name="Compare").click()
    page.wait_for_selector("#compared table")
    assert page.locator("#compared .differs").count() >= 1
    assert FACTS[0].target_new in page.locator("#compared").inner_text()
    shoot(page, "compare")

    page.get_by_role("link", name="Trace").click()
    page.fill("#trace [name=prompt]", FACTS[0].text)
    page.fill("#trace [name=subject]", FACTS[0].subject)
    page.check("#trace [name=estimate]")
    page.get_by_role("button", name="Trace").click()
    page.wait_for_selector("#traced img")
    width = page.locator("#traced img").evaluate("i => i.decode().then(() => i.naturalWidth)")
    assert width > 100
    shoot(page, "trace")

    page.get_by_role("link", name="Chat").click()
    page.fill("#chat [name=text]", FACTS[0].text)
    page.keyboard.press("Control+Enter")
    sync_api.expect(page.locator("#chat button").first).to_be_enabled()  # both have answered
    assert FACTS[0].target_new not in page.locator("#log-left").inner_text()
    assert FACTS[0].target_new in page.locator("#log-right").inner_text()
    shoot(page, "chat")


@pytest.mark.parametrize(("scheme", "width"), [("light", 380), ("dark", 380), ("dark", 1300)])
def test_it_fits_and_follows_the_scheme(
    scheme: str, width: int, browser: Any, served: tuple[str, Editor, list[Edit]]
) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = context.new_page()
    page.goto(served[0])
    page.wait_for_selector("#list > li")
    page.get_by_role("button", name="Details").first.click()
    page.wait_for_selector("#list table")
    cells = page.locator("#list tbody td:first-child, #list tbody td:last-child")
    heights = cells.evaluate_all("all => all.map(one => one.getBoundingClientRect().height)")
    assert max(heights) < (32 if width < 700 else 60), "a word is broken"
    for name in ("edits", "compare", "trace", "chat"):
        page.locator(f"nav a[href='#{name}']").click()
        page.wait_for_selector(f"#view-{name}:not([hidden])")
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{name} is {wide} pixels too wide"
        shoot(page, f"{name}-{scheme}-{width}")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 23, 21)"
    assert dark == (scheme == "dark")
    context.close()
