"""The chat page in a real Chromium, against a running server with a tiny random model."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `server`")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra `server`")
httpx = pytest.importorskip("httpx", reason="the test's HTTP client")

import ktcore  # noqa: E402
from ktcore.engine.service import Service  # noqa: E402
from ktcore.server.http.app import build_app  # noqa: E402
from ktcore.server.http.settings import Keys, Settings  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
KEY = "a-key-of-the-page"


@pytest.fixture
def url(opened: Callable[..., ktcore.Model]) -> Iterator[str]:
    """A server with a key, on a free port."""
    with Service(opened("dense", context=1024), 8) as service:
        settings = Settings("tiny", Keys((KEY,)), default_tokens=64)
        config = uvicorn.Config(build_app(service, settings), port=0, log_level="critical", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/"
        server.should_exit = True
        thread.join(30)


def test_files_load_only_what_this_server_has(url: str) -> None:
    auth = httpx.BasicAuth("me", KEY)
    page = httpx.get(url, auth=auth)
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http" not in page.text.replace("http-equiv", "")
    for name in ("app.js", "api.js", "store.js", "markdown.js", "style.css", "icon.svg"):
        assert httpx.get(f"{url}page/{name}", auth=auth).status_code == 200
    for name in ("../app.py", "%2e%2e/app.py", "..%2f..%2fapp.py", "routes.py", ""):
        assert httpx.get(f"{url}page/{name}", auth=auth).status_code == 404


def test_a_keyed_page_asks_for_the_key_and_other_sites_cannot_use_it(opened: Callable[..., ktcore.Model]) -> None:
    from fastapi.testclient import TestClient

    with Service(opened("dense"), 8) as service:
        client = TestClient(build_app(service, Settings("tiny", Keys((KEY,)))), base_url="http://ktcore.example")
        asked = client.get("/")
        assert asked.status_code == 401
        assert asked.headers["www-authenticate"].startswith("Basic ")
        assert client.get("/v1/models").headers["www-authenticate"] == "Bearer"
        assert client.get("/", auth=("me", "wrong")).status_code == 401
        assert client.get("/", headers={"Authorization": "Basic %%%"}).status_code == 401
        assert client.get("/v1/models", auth=("me", KEY)).status_code == 200
        for origin, status in (("http://ktcore.example", 200), ("http://evil.example", 403), ("null", 403)):
            assert client.get("/v1/models", auth=("me", KEY), headers={"Origin": origin}).status_code == status


@pytest.fixture
def page(url: str) -> Iterator[Any]:
    """The page, open in a browser that can reach nothing but this machine."""
    api = pytest.importorskip("playwright.sync_api", reason="drives the browser: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(http_credentials={"username": "me", "password": KEY}, color_scheme="light")
        shown = context.new_page()
        problems: list[str] = []
        shown.on("pageerror", lambda error: problems.append(str(error)))
        shown.on("request", lambda r: problems.append(r.url) if not r.url.startswith((url, "data:")) else None)
        shown.set_default_timeout(20_000)
        shown.goto(url)
        yield shown
        browser.close()
        assert problems == []


def _answered(page: Any, count: int) -> None:
    page.wait_for_selector("#send", state="visible")
    assert page.locator("article.assistant .text").count() == count


def test_a_conversation(page: Any) -> None:
    page.click("#toggle-settings")
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "12")
    sent: list[dict[str, Any]] = []
    page.on("request", lambda r: sent.append(r.post_data_json) if r.method == "POST" else None)

    page.fill("#prompt", "<b>hello</b>")
    page.press("#prompt", "Enter")
    _answered(page, 1)
    assert sent[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<b>hello</b>"},
    ]
    assert (sent[0]["temperature"], sent[0]["max_tokens"], sent[0]["stream"]) == (0, 12, True)
    # what people write is text, never markup
    assert page.inner_text("article.user .text") == "<b>hello</b>"
    first = page.inner_text("article.assistant .text")
    assert first
    assert "tokens/s" in page.inner_text("#speed")

    page.click("text=Regenerate")
    _answered(page, 1)
    assert page.inner_text("article.assistant .text") == first  # greedy
    assert sent[1]["messages"] == sent[0]["messages"]

    # an empty field and the arrow edit the last message; all behind it goes
    page.press("#prompt", "ArrowUp")
    page.fill("article.user textarea", "bye")
    page.press("article.user textarea", "Enter")
    _answered(page, 1)
    assert [m["content"] for m in sent[2]["messages"]] == ["Be brief.", "bye"]

    page.fill("#prompt", "again")
    page.keyboard.press("Enter")
    _answered(page, 2)
    assert [m["role"] for m in sent[3]["messages"]] == ["system", "user", "assistant", "user"]

    # the browser remembers
    page.reload()
    assert page.locator("article").count() == 4
    assert page.input_value("#system") == "Be brief."
    page.keyboard.press("Alt+n")
    assert page.locator("article").count() == 0
    assert page.locator("#history div").count() == 2


def test_stop_ends_an_answer(page: Any) -> None:
    page.click("#toggle-settings")
    page.fill("#max_tokens", "900")
    page.fill("#prompt", "tell me")
    page.press("#prompt", "Enter")
    page.wait_for_selector("article.assistant .text:not(:empty) >> nth=0")
    page.wait_for_selector("#speed:not(:empty)")
    page.keyboard.press("Escape")
    _answered(page, 1)
    kept = page.inner_text("article.assistant .text")
    page.wait_for_timeout(300)
    assert page.inner_text("article.assistant .text") == kept
    assert page.locator(".error").count() == 0


def test_the_theme_follows_the_browser_until_it_is_chosen(page: Any) -> None:
    def back() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = back()
    page.emulate_media(color_scheme="dark")
    dark = back()
    assert dark != light
    page.keyboard.press("Alt+t")
    assert back() == light
    page.reload()
    assert back() == light


def test_what_the_server_refuses_is_shown(page: Any) -> None:
    page.click("#toggle-settings")
    page.fill("#temperature", "-1")
    page.fill("#prompt", "hello")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".error")
    assert "temperature" in page.inner_text(".error")
