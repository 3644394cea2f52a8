"""The dashboard in a real browser, over a real server and a conversation that is paged while somebody looks at it.

Promises: what a person sees is what the log says; no page has an error in its console, a violation that axe-core knows, or
something that a phone has to scroll sideways for; screenshots of all pages are kept in $TEST_SCREENSHOTS, where that is set.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from tests.e2e.harness import ServerProcess, message_of
from tests.e2e.script import SYSTEM, Chat, Script, fault, paged_config, talk

playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
AXE = next((path for path in (Path(os.environ.get("CLIENTS_NODE_DIR", ".")) / "node_modules/axe-core/axe.min.js",
                              Path("/usr/share/javascript/axe-core/axe.min.js")) if path.exists()), None)  # fmt: skip
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"),
]
SEEN_WITHIN_S = 1.0  # of the answer's end


class Seat:
    """A browser in front of a server, and the chat that it watches."""

    def __init__(self, browser: Any, server: ServerProcess, script: Script, chat: Chat) -> None:
        self.browser, self.server, self.script, self.chat = browser, server, script, chat
        self.url = f"http://127.0.0.1:{server.port}"
        self.path = ""
        self.errors: list[str] = []

    async def page(self, path: str, **context: Any) -> Any:
        """A page; what its console says is kept."""
        opened = await (await self.browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})).new_page()
        opened.on("console", lambda said: self.errors.append(said.text) if said.type in ("error", "warning") else None)
        opened.on("pageerror", lambda error: self.errors.append(str(error)))
        answer = await opened.goto(self.url + path)
        assert answer.status == 200, await answer.text()
        return opened


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def seat() -> AsyncIterator[Seat]:
    script = Script()
    async with script.upstream, playwright.async_playwright() as player:
        browser = await player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        with ServerProcess(paged_config(script.upstream)) as server:
            async with AsyncOpenAI(api_key="k", base_url=server.base_url, max_retries=0) as client:
                seat = Seat(browser, server, script, Chat(client, [SYSTEM]))
                await seat.chat.say("The harbour master is called Olgamark. <script>alert(1)</script>", "first")
                await talk(seat.chat, script, "long", 14, [])
                script.plan("asked", fault("msg_0007"), message_of("It is Olgamark."))
                await seat.chat.say("What is the harbour master called?", "asked")
                fork = seat.chat.fork(9)
                await fork.say("Another way.", "fork")
                await seat.chat.say("And back.", "back")
                page = await seat.page("/vm/ui/conversations")
                seat.path = await page.get_by_role("link", name="The harbour master").get_attribute("href")
                yield seat
        await browser.close()


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def closed_pages(seat: Seat) -> AsyncIterator[None]:
    """A test's pages end with it: they would draw what the next ones say."""
    yield
    for context in seat.browser.contexts:
        await context.close()


async def test_a_turn_appears_within_a_second_of_its_answer(seat: Seat) -> None:
    page, home = await seat.page(seat.path), await seat.page("/vm/ui")
    await page.locator("#live-state").wait_for(state="visible")
    seen_s: list[float] = []
    for number in range(3):
        before = int(await page.locator("#turns ~ .scroll tbody th a").first.inner_text())
        await seat.chat.say(f"Live {number}.", f"live{number}")
        answered_s = time.monotonic()
        newest = page.locator("#turns ~ .scroll tbody th a").first
        await playwright.expect(newest).to_have_text(str(before + 1), timeout=10_000)
        seen_s.append(time.monotonic() - answered_s)
    assert sorted(seen_s)[1] < SEEN_WITHIN_S, "all but one, which other tests may have held up"
    assert await home.locator("#traffic").is_visible()
    assert seat.errors == []


async def test_map_turn_page_and_search_show_what_the_log_says(seat: Seat) -> None:
    page = await seat.page(seat.path)
    for kind in ("native", "fault"):
        assert await page.locator(f".map .cell.{kind}").count() > 0, kind
    assert await page.locator(".map line.epoch").count() > 0 and await page.locator(".tree li").count() == 2
    asked = page.locator("#turns ~ .scroll tbody tr", has=page.locator("td", has_text="1")).filter(has_text="began")
    assert await asked.count() > 0
    await page.get_by_label("Search in it").fill("Olgamark")
    await page.get_by_role("button", name="Search").click()
    await page.locator(".hits li", has_text="msg_0001").first.get_by_role("link").first.click()
    await page.locator("h1", has_text="msg_0001").wait_for()
    text = await page.locator(".text.full").first.inner_text()
    assert "Olgamark" in text and "<script>alert(1)</script>" in text, "shown, not run"
    assert "shown as evidence" in await page.locator(".life").inner_text()
    await page.goto(f"{seat.url}{seat.path}/pages/msg_0007")
    link = page.locator(".life li", has_text="asked for by the model").get_by_role("link")
    turn = (await link.inner_text()).split()[1]
    await link.click()
    await page.locator("h1", has_text=f"Turn {turn}").wait_for()
    assert await page.get_by_text("byte for byte").is_visible()
    exact = await page.request.get(seat.url + await page.get_by_role("link", name="the request as JSON").get_attribute("href"))
    assert await exact.body() == seat.script.calls["asked"][-1].body
    assert "because the model asked for it" in await page.locator("#in ~ .scroll").inner_text()
    added = await page.locator("mark.added").all_inner_texts()
    assert any("<VM:RULES>" in words for words in added)
    assert seat.errors == []


async def test_map_is_walked_with_a_click_and_the_same_is_in_a_table(seat: Seat) -> None:
    page = await seat.page(seat.path)
    cell = page.locator(".map .cell.native").last
    name = await cell.get_attribute("data-page")
    await cell.dispatch_event("click")
    await page.locator("h1", has_text=name).wait_for()
    await page.go_back()
    await page.get_by_text("The map as a table").click()
    assert await page.get_by_role("link", name=name, exact=True).first.is_visible()


async def test_pin_is_taken_and_taken_back_by_its_button(seat: Seat) -> None:
    page = await seat.page(f"{seat.path}/pages/msg_0001")
    await page.get_by_role("button", name="Pin: keep it in the window").click()
    await page.get_by_text("Pinned from the next turn on.").wait_for()
    await seat.chat.say("Something else entirely.", "pinned")
    assert "is called Olgamark" in str(seat.script.calls["pinned"][-1].json["messages"])
    await page.reload()
    assert "pinned" in await page.locator(".life li", has_text="user").inner_text()
    await page.get_by_role("button", name="Take the pin back").click()
    await page.get_by_role("button", name="Pin: keep it in the window").wait_for()


# All of axe's rules in the light, what the darkness changes in the dark, and on a phone all of its layout.
LOOKS: dict[str, tuple[dict[str, int], str, dict[str, Any]]] = {
    "light": ({"width": 1280, "height": 900}, "light", {}),
    "dark": ({"width": 1280, "height": 900}, "dark", {"runOnly": ["color-contrast"]}),
    "phone": ({"width": 390, "height": 844}, "light", {"runOnly": ["target-size", "scrollable-region-focusable", "meta-viewport"]}),
}


async def test_pages_are_sound_in_light_in_dark_and_on_a_phone(seat: Seat) -> None:
    paths = {
        "home": "/vm/ui", "conversations": "/vm/ui/conversations", "conversation": seat.path, "turn": f"{seat.path}/turns/16",
        "page": f"{seat.path}/pages/msg_0001", "login": "/vm/ui/login",
    }  # fmt: skip
    folder = os.environ.get("TEST_SCREENSHOTS")
    page = await seat.page("/vm/ui", bypass_csp=True)
    for name, path in paths.items():
        answer = await page.goto(seat.url + path)
        assert answer.status == 200, await answer.text()
        if AXE is not None:
            await page.evaluate(AXE.read_text())
        for look, (size, scheme, rules) in LOOKS.items():
            await page.set_viewport_size(size)
            await page.emulate_media(color_scheme=scheme)
            if folder:
                await page.screenshot(path=f"{folder}/{name}-{look}.png", full_page=True)
            assert await page.evaluate("document.documentElement.scrollWidth") <= size["width"], f"{name} is too wide"
            if AXE is not None:
                found = await page.evaluate("rules => axe.run(document, {resultTypes: ['violations'], ...rules})", rules)
                told = [(one["id"], one["nodes"][0]["html"][:200]) for one in found["violations"]]
                assert not told, f"{name}, {look}: {told}"
                assert look == "phone" or found["passes"], f"{name}, {look}: no rule was applied"
    assert seat.errors == []


async def test_all_of_it_works_with_the_keyboard(seat: Seat) -> None:
    page = await seat.page("/vm/ui/conversations")
    await page.keyboard.press("Tab")
    assert await page.evaluate("document.activeElement.textContent") == "Skip to content"
    await page.keyboard.press("Enter")
    await page.locator("tbody a").first.focus()
    await page.keyboard.press("Enter")
    await page.locator("#map").wait_for()


async def test_forgotten_conversation_is_gone(seat: Seat) -> None:
    """The last one: it takes the conversation away, exported before."""
    page = await seat.page(seat.path)
    exported = await page.request.get(seat.url + await page.get_by_role("link", name="Export as JSONL").get_attribute("href"))
    assert "is called Olgamark" in await exported.text()
    await page.get_by_text("Forget …").click()
    await page.get_by_role("button", name="Forget it all").click()
    await page.locator("h1", has_text="Forgotten").wait_for()
    assert (await page.request.get(seat.url + seat.path)).status == 404
