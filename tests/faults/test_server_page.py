"""The page of the server in a real browser, by keyboard alone, on a desk and on a phone."""

import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server import Server

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the page needs playwright: pip install playwright"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]
WAIT = 60_000.0  # milliseconds


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tools:
        started = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("--api-key", "k") as started:
        yield started


def open_page(browser: Any, server: Server, **options: Any) -> tuple[Any, list[str]]:
    """Return the page, and its errors so far."""
    page = browser.new_page(**options)
    page.set_default_timeout(WAIT)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda r: faults.append(r.url) if str(server.port) not in r.url else None)
    page.goto(f"http://127.0.0.1:{server.port}/")
    return page, faults


def give_key(page: Any) -> None:
    """Enter the key by keyboard: the options are before the message."""
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    page.keyboard.press("Enter")
    for _ in range(4):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type("k")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "ask"


def until(page: Any, expression: str) -> None:
    """Wait until an expression of JavaScript is true; the page itself may evaluate no texts."""
    deadline = time.monotonic() + WAIT / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, (expression, page.inner_text("body"))
        page.wait_for_timeout(50)


def last_text(page: Any) -> str:
    return str(page.locator(".turn.assistant .text").last.inner_text())


def test_a_conversation_by_keyboard(browser: Any, server: Server) -> None:
    page, faults = open_page(browser, server)
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    page.wait_for_selector(".note.error")  # no key yet: the page asks for it
    until(page, "document.activeElement.id === 'key'")
    page.keyboard.type("k")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.value") == "hello"  # to be sent again
    page.keyboard.press("Control+a")
    page.keyboard.type("My name is Ada and I live in Lima.")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('.note:not(.error)').length === 1")
    page.keyboard.type("Where do I live?")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('.note:not(.error)').length === 2")
    assert "Lima" in last_text(page)
    assert "cached" in page.locator(".note").last.inner_text()
    page.keyboard.press("Alt+n")
    page.wait_for_selector(".empty")
    assert page.evaluate("document.activeElement.id") == "ask"
    assert not faults
    page.close()


def test_escape_stops_an_answer(browser: Any, server: Server) -> None:
    page, faults = open_page(browser, server)
    give_key(page)
    # Answers of the demo model are short: the page asks for one that is not.
    page.route(
        "**/v1/chat/completions",
        lambda route: route.continue_(
            post_data=route.request.post_data.replace("{", '{"ignore_eos": true, ', 1)
        ),
    )
    page.keyboard.type("What is MLA?")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.assistant .text').textContent.length > 20")
    assert page.inner_text("#send") == "Stop"
    page.keyboard.press("Escape")
    until(page, "document.querySelector('.note').textContent === 'stopped'")
    assert page.inner_text("#send") == "Send"
    server.wait_until(lambda: server.health()[1]["running"] == 0)
    assert not faults
    page.close()


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_phone_shows_the_engine(browser: Any, server: Server, scheme: str) -> None:
    size = {"width": 360, "height": 640}
    page, faults = open_page(browser, server, viewport=size, color_scheme=scheme)
    give_key(page)
    page.keyboard.type("<b>What</b> is MLA?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".note")
    assert page.inner_text(".turn.user") == "<b>What</b> is MLA?"
    until(page, "document.querySelectorAll('.shard').length === 2")
    assert page.locator(".shard").first.get_attribute("title").startswith("rank 0: ")
    until(page, "document.getElementById('model').textContent === 'demo-v3'")
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    colors = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (colors == "rgb(23, 23, 22)") == (scheme == "dark")
    assert page.locator("#ask").is_visible() and page.locator("#send").is_visible()
    assert not faults
    page.close()
