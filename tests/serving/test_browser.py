"""The live page in a real Chromium: a prompt is typed, a picture appears, frames arrive, a drawing is followed.

Skipped where Debian's packages chromium and chromium-driver are not installed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import fewstep
import numpy as np
import pytest
from fewstep.bench.live import browser
from fewstep.serving import Server
from live_client import running

pytestmark = pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("chromedriver") is None,
    reason="chromium and chromium-driver are not installed",
)
PIXELS = """
const picture = document.getElementById('picture'), copy = document.createElement('canvas');
copy.width = picture.width; copy.height = picture.height;
const context = copy.getContext('2d'); context.drawImage(picture, 0, 0);
return [copy.height, copy.width, ...context.getImageData(0, 0, copy.width, copy.height).data];
"""


@pytest.fixture(scope="module")
def page(student: fewstep.Pipeline) -> Iterator[Any]:
    server = Server(student, most_slots=8, most_rows=4, image=True)
    with running(server) as port, browser() as driver:
        driver.get(f"http://127.0.0.1:{port}/live")
        wait_for(lambda: driver.execute_script("return live.hello !== null && live.frames > 0"))
        yield driver
        log = [line for line in driver.get_log("browser") if "favicon" not in line["message"]]
        assert log == [], "the page and its policy cause no complaint"


def wait_for(reached: Callable[[], Any], seconds: float = 30.0) -> Any:
    until = time.monotonic() + seconds
    while not (found := reached()):
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.02)
    return found


def pixels(page: Any) -> np.ndarray:
    height, width, *values = page.execute_script(PIXELS)
    return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]


def type_prompt(page: Any, text: str) -> None:
    box = page.find_element("id", "prompt")
    box.clear()
    box.send_keys(text)
    wait_for(lambda: page.execute_script("return (live.settings || {}).prompt") == text)
    sent = page.execute_script("return live.next - 1")
    wait_for(lambda: page.execute_script("return live.last") >= sent)


def put(page: Any, name: str, value: str) -> None:
    """Move a slider or choose an entry, as a user does."""
    page.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change'));",
        name,
        value,
    )


@pytest.mark.parametrize(
    ("prompt", "middle", "corner"),
    [
        ("a large red circle on a blue background", 0, 2),
        ("a large blue square on a red background", 2, 0),
    ],
)
def test_a_typed_prompt_becomes_its_picture(
    page: Any, student: fewstep.Pipeline, psnr, prompt: str, middle: int, corner: int
) -> None:
    put(page, "steps", "4")
    put(page, "seed", "3")
    type_prompt(page, prompt)
    shown = pixels(page)
    assert psnr(shown, student(prompt, seed=3, steps=4).images[0]) >= 28, "JPEG at quality 85"
    background = shown[[2, 2, -3, -3], [2, -3, 2, -3]].astype(float).mean(axis=0)
    assert background.argmax() == corner
    off = np.abs(shown.astype(float) - background).sum(axis=-1) > 150
    assert off.mean() > 0.05, "a shape is there"
    assert shown[off].astype(float).mean(axis=0).argmax() == middle


def test_frames_arrive_and_are_counted(page: Any) -> None:
    type_prompt(page, "a green star on a yellow background")
    put(page, "steps", "1")
    put(page, "noise", "walk")
    before = page.execute_script("return live.frames")
    first = pixels(page)
    wait_for(lambda: page.execute_script("return live.frames") > before + 20)
    assert (pixels(page) != first).any(), "the noise drifts"
    wait_for(lambda: int(page.find_element("id", "fps").text) > 0)
    put(page, "noise", "fixed")
    put(page, "seed", "9")
    wait_for(lambda: float(page.find_element("id", "p50").text) > 0)


def test_a_drawing_is_followed(page: Any) -> None:
    type_prompt(page, "a red circle on a blue background")
    put(page, "steps", "2")
    put(page, "strength", "0.35")
    put(page, "source", "sketch")
    sketch = page.find_element("id", "sketch")
    wait_for(sketch.is_displayed)
    last = page.execute_script("return live.last")
    from selenium.webdriver import ActionChains

    page.execute_script("document.getElementById('brush').value = 70")
    ActionChains(page).move_to_element_with_offset(sketch, -80, -80).click_and_hold().move_by_offset(10, 10).perform()
    ActionChains(page).release().perform()
    wait_for(lambda: page.execute_script("return live.last") > last)
    wait_for(lambda: page.execute_script("return live.open") == 0)
    shown = pixels(page).astype(int)
    red = shown[..., 0] > shown[..., 2]
    rows, columns = np.nonzero(red)
    assert red.any()
    assert rows.mean() < 32
    assert columns.mean() < 32, "the stroke was in the upper left, and so is the shape"
    put(page, "source", "none")


def test_a_refusal_is_shown_in_words(page: Any) -> None:
    page.execute_script("live.set({ sampler: 'no such sampler' })")
    wait_for(lambda: "no such sampler" in page.find_element("id", "error").text)
    put(page, "seed", "1")
    wait_for(lambda: page.find_element("id", "error").text == "")
