"""The live page in a real Chromium: a prompt is typed, a picture appears, frames arrive, a drawing is followed.

Skipped where Debian's packages chromium and chromium-driver are not installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fewstep
import numpy as np
import pytest
from fewstep.bench.live import browser
from fewstep.serving import Server
from live_client import running
from page_driver import needs_chromium, pixels, put, type_prompt, wait_for

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def page(student: fewstep.Pipeline) -> Iterator[Any]:
    server = Server(student, most_slots=8, most_rows=4, image=True)
    with running(server) as port, browser() as driver:
        driver.get(f"http://127.0.0.1:{port}/live")
        wait_for(lambda: driver.execute_script("return live.hello !== null && live.frames > 0"))
        yield driver
        log = [line for line in driver.get_log("browser") if "favicon" not in line["message"]]
        assert log == [], "the page and its policy cause no complaint"


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
    wait_for(lambda: page.find_element("id", "fps").text.isdecimal())
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

    def shape_is_in_the_upper_left() -> bool:
        shown = pixels(page).astype(int)
        rows, columns = np.nonzero(shown[..., 0] > shown[..., 2])
        return len(rows) > 0 and rows.mean() < 32 and columns.mean() < 32

    wait_for(shape_is_in_the_upper_left)  # where the stroke was; a frame of the blank sketch may come before it
    put(page, "source", "none")


def test_a_refusal_is_shown_in_words(page: Any) -> None:
    page.execute_script("live.set({ sampler: 'no such sampler' })")
    wait_for(lambda: "no such sampler" in page.find_element("id", "error").text)
    put(page, "seed", "1")
    wait_for(lambda: page.find_element("id", "error").text == "")
