"""How the live page looks and speaks: its layout, its states in words, the keyboard, and axe's rules, in Chromium."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator
from typing import Any

import fewstep
import pytest
from fewstep.bench.live import browser
from fewstep.serving import Server
from live_client import running
from page_driver import box, fresh, needs_chromium, put, size_of, type_prompt, wait_for

pytestmark = needs_chromium
WIDE, PHONE = (1200, 900), (390, 844)
TOKEN = "t" * 16
AXE = "const done = arguments[0]; axe.run({ resultTypes: ['violations'] }).then(found => done(found.violations));"
UNNAMED = """
const named = e => (e.labels && e.labels.length) || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby')
  || e.textContent.trim() || e.getAttribute('alt') || e.querySelector('img[alt]') || e.id === 'kept-picture';
return [...document.querySelectorAll('button, input, select, textarea, canvas, video, img, dialog')]
  .filter(e => !named(e)).map(e => e.outerHTML);
"""


@pytest.fixture(scope="module")
def opened(student: fewstep.Pipeline) -> Iterator[Any]:
    with running(Server(student, most_slots=8, most_rows=4, image=True)) as port, browser() as driver:
        driver.get(f"http://127.0.0.1:{port}/live")
        fresh(driver)
        yield driver


@pytest.fixture
def page(opened: Any) -> Any:
    size_of(opened, *WIDE)
    opened.execute_script("for (const open of document.querySelectorAll('dialog[open]')) open.close()")
    put(opened, "source", "none")
    put(opened, "seed", "1")
    return opened


def load_axe(page: Any) -> None:
    """Put axe's rules into the page, as a tester's tool does: no policy of the page admits them."""
    package = pytest.importorskip("axe_core_python", reason="axe-core-python is not installed")
    rules = importlib.resources.files(package).joinpath("axe.min.js").read_text(encoding="utf-8")
    page.execute_script(rules)


def violations(page: Any) -> list[str]:
    """What axe finds: rule and elements."""
    found = page.execute_async_script(AXE)
    return [f"{v['id']}: {[n['html'][:120] for n in v['nodes']]}" for v in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("shape", [WIDE, PHONE], ids=["wide", "phone"])
def test_axe_finds_nothing(page: Any, scheme: str, shape: tuple[int, int]) -> None:
    load_axe(page)
    size_of(page, *shape, scheme=scheme)
    put(page, "source", "sketch")
    put(page, "seed", "-1")
    wait_for(lambda: page.find_elements("css selector", "#gallery button"))
    assert violations(page) == []
    page.find_element("css selector", "#gallery button").click()
    assert violations(page) == []
    page.execute_script("document.getElementById('kept').close(); document.getElementById('remember').click()")
    assert violations(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_the_other_pages(page: Any, scheme: str) -> None:
    live = page.current_url
    try:
        for path in ("/", "/docs"):
            size_of(page, *PHONE, scheme=scheme)
            page.get(live.removesuffix("/live") + path)
            load_axe(page)
            assert violations(page) == []
            assert page.execute_script("return document.documentElement.scrollWidth") <= PHONE[0]
    finally:
        page.get(live)
        wait_for(lambda: page.execute_script("return live.frames > 0"))


def test_axe_would_find_something(page: Any) -> None:
    load_axe(page)
    bad = '<p id="bad">faint</p><input id="bad-too">'
    page.execute_script("document.querySelector('main').insertAdjacentHTML('beforeend', arguments[0])", bad)
    page.execute_script("Object.assign(document.getElementById('bad').style, {color: '#999', background: '#aaa'})")
    found = {v.partition(":")[0] for v in violations(page)}
    page.execute_script("for (const id of ['bad', 'bad-too']) document.getElementById(id).remove()")
    assert found == {"color-contrast", "label"}


def test_everything_has_a_name(page: Any) -> None:
    assert page.execute_script(UNNAMED) == []


def test_on_a_phone_the_picture_comes_first_and_whole(page: Any) -> None:
    size_of(page, *PHONE)
    picture = box(page, "picture")
    assert picture["bottom"] < 0.75 * PHONE[1], "above the fold"
    assert picture["width"] > 0.85 * PHONE[0]
    assert box(page, "form")["top"] > picture["bottom"]
    assert page.execute_script("return document.documentElement.scrollWidth") <= PHONE[0], "nothing lies beside it"
    put(page, "source", "sketch")
    own, made = box(page, "sketch"), box(page, "picture")
    assert max(own["bottom"], made["bottom"]) < 0.75 * PHONE[1]
    assert own["right"] <= made["left"], "side by side"


def test_on_a_wide_window_no_half_is_blank(page: Any) -> None:
    picture, form = box(page, "picture"), box(page, "form")
    assert picture["width"] > 600
    assert picture["bottom"] < WIDE[1]
    assert form["left"] - picture["right"] < 100
    assert form["right"] > WIDE[0] - 40


def test_the_keyboard_reaches_everything_in_order(page: Any) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    put(page, "guidance", "2")
    put(page, "source", "sketch")
    page.execute_script("document.getElementById('colour').focus()")
    ActionChains(page).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
    seen: list[str] = []
    for _ in range(60):
        ActionChains(page).send_keys(Keys.TAB).perform()
        name = page.execute_script("return document.activeElement.id || document.activeElement.tagName")
        if name in seen or name == "BODY":
            break
        seen.append(name)
        outline = page.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", f"{name} shows that it is meant"
    tools, buttons = ["colour", "brush", "undo", "wipe"], ["save", "keep", "copy", "full"]
    fields = ["prompt", "negative", "source", "strength", "upload", "steps", "guidance", "seed", "random", "noise"]
    expected = [*tools, *buttons, *fields, "size", "sampler", "schedule", "preset", "remember"]
    assert [name for name in seen if name in expected] == expected
    put(page, "guidance", "0")


def test_a_dialog_closes_with_escape(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    page.find_element("id", "remember").click()
    wait_for(page.find_element("id", "naming").is_displayed)
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    wait_for(lambda: not page.find_element("id", "naming").is_displayed())
    assert page.execute_script("return document.activeElement.id") == "remember", "the focus is where it was"


def test_states_are_words(page: Any) -> None:
    state = page.find_element("id", "state")
    put(page, "noise", "walk")
    wait_for(lambda: state.text == "making pictures")
    put(page, "noise", "fixed")
    wait_for(lambda: state.text == "ready: nothing has changed")
    assert page.find_element("id", "fps").text == "–", "and not 0, which reads as broken"
    put(page, "source", "camera")
    wait_for(lambda: page.find_element("id", "error").text.startswith("No camera: "))
    assert page.execute_script("return document.getElementById('source').value") == "none"
    type_prompt(page, "a red circle")
    wait_for(lambda: page.find_element("id", "error").text == "")
    page.execute_script("live.socket.close(4999)")
    wait_for(lambda: "trying again" in state.text)
    wait_for(lambda: state.text in ("making pictures", "ready: nothing has changed"))
    assert page.execute_script("return live.settings.prompt") == "a red circle", "and goes on as it was"


def test_a_token_is_asked_for_and_kept_for_the_tab(student: fewstep.Pipeline) -> None:
    server = Server(student, most_slots=2, most_rows=2, image=True)
    with running(server, token=TOKEN) as port, browser() as driver:
        driver.get(f"http://127.0.0.1:{port}/live")
        state, door = driver.find_element("id", "state"), driver.find_element("id", "door")
        wait_for(lambda: state.text == "waiting for a token")
        assert door.is_displayed()
        for given, words in (("wrong", "this token is not known here"), (TOKEN, "making pictures")):
            driver.find_element("id", "token").clear()
            driver.find_element("id", "token").send_keys(given + "\n")
            wait_for(lambda words=words: state.text == words)
        assert not door.is_displayed()
        driver.refresh()
        wait_for(lambda: driver.execute_script("return live.frames > 0"))
        driver.get(f"http://127.0.0.1:{port}/live#token={TOKEN}")
        wait_for(lambda: driver.execute_script("return live.frames > 0"))
