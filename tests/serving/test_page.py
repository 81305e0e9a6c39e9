"""What a person does at the live page, in a real Chromium: draws, brings pictures, keeps them, comes back."""

from __future__ import annotations

import io
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
from fewstep.bench.live import browser
from fewstep.cli import main
from fewstep.serving import Server
from live_client import running
from page_driver import box, fresh, needs_chromium, pixels, put, type_prompt, wait_for
from PIL import Image

pytestmark = needs_chromium
SKETCH = """
const c = document.getElementById('sketch'), x = arguments[0] * c.width, y = arguments[1] * c.height;
return [...c.getContext('2d').getImageData(x, y, 1, 1).data].slice(0, 3);
"""
BRING = """
const canvas = Object.assign(document.createElement('canvas'), { width: 100, height: 50 });
const pen = canvas.getContext('2d'), done = arguments[2];
pen.fillStyle = arguments[1]; pen.fillRect(0, 0, 100, 50);
canvas.toBlob(blob => {
  const carried = new DataTransfer();
  carried.items.add(new File([blob], 'x.png', { type: 'image/png' }));
  const how = { bubbles: true, cancelable: true, dataTransfer: carried, clipboardData: carried };
  document.body.dispatchEvent(arguments[0] === 'drop' ? new DragEvent('drop', how) : new ClipboardEvent('paste', how));
  done();
}, 'image/png');
"""
RED, GREEN, BLUE = (208, 32, 32), (0, 128, 0), (32, 64, 208)


@pytest.fixture(scope="module")
def opened(student: fewstep.Pipeline) -> Iterator[Any]:
    server = Server(student, most_slots=8, most_rows=4, image=True, sizes=[(64, 64), (96, 64)])
    fake = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    with running(server) as port, browser(*fake) as driver:
        driver.get(f"http://127.0.0.1:{port}/live")
        yield driver
        log = [line for line in driver.get_log("browser") if "favicon" not in line["message"]]
        assert log == [], "the page and its policy cause no complaint"


@pytest.fixture
def page(opened: Any) -> Any:
    fresh(opened)
    return opened


def sketched(page: Any, x: float, y: float) -> tuple[int, ...]:
    """The drawing's colour at a place, as shares of its sides."""
    return tuple(page.execute_script(SKETCH, x, y))


def near(colour: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return max(abs(a - b) for a, b in zip(colour, expected, strict=True)) < 20


def stroke(page: Any) -> None:
    """A quick stroke through the middle: two pointer events, far apart."""
    from selenium.webdriver import ActionChains

    sketch = page.find_element("id", "sketch")
    quick = ActionChains(page, duration=0).move_to_element_with_offset(sketch, -100, 0).click_and_hold()
    quick.move_by_offset(200, 0).release().perform()


def test_a_quick_stroke_is_one_line_and_can_be_taken_back(page: Any) -> None:
    put(page, "source", "sketch")
    wait_for(page.find_element("id", "sketch").is_displayed)
    stroke(page)
    assert near(sketched(page, 0.5, 0.5), RED), "between two pointer events"
    page.find_element("id", "wipe").click()
    assert near(sketched(page, 0.5, 0.5), BLUE)
    page.find_element("id", "undo").click()
    assert near(sketched(page, 0.5, 0.5), RED)
    page.find_element("id", "undo").click()
    assert near(sketched(page, 0.5, 0.5), BLUE)


@pytest.mark.parametrize("way", ["choose", "drop", "paste"])
def test_a_picture_is_brought_and_followed(page: Any, tmp_path: Path, way: str) -> None:
    put(page, "strength", "0.3")
    if way == "choose":
        Image.new("RGB", (100, 50), "green").save(tmp_path / "x.png")
        page.execute_script("document.getElementById('file').hidden = false")
        page.find_element("id", "file").send_keys(str(tmp_path / "x.png"))
    else:
        page.execute_async_script(BRING, way, "green")
    wait_for(lambda: near(sketched(page, 0.05, 0.95), GREEN))
    assert page.execute_script("return document.getElementById('source').value") == "sketch"
    wait_for(lambda: pixels(page)[2, 2].astype(int).argmax() == 1)


def test_the_camera_is_beside_the_result(page: Any) -> None:
    put(page, "source", "camera")
    wait_for(lambda: page.execute_script("return document.getElementById('video').videoWidth > 0"))
    frames = page.execute_script("return live.frames")
    wait_for(lambda: page.execute_script("return live.frames") > frames + 3)
    own, made = box(page, "video"), box(page, "picture")
    assert own["width"] > 200
    assert own["right"] <= made["left"]
    assert abs(own["top"] - made["top"]) < 2
    put(page, "source", "none")
    assert page.execute_script("return document.getElementById('video').srcObject.active") is False, "it is off"


def test_a_picture_is_saved_as_it_is_shown(page: Any, tmp_path: Path, psnr: Any) -> None:
    type_prompt(page, "a red circle on a blue background")
    page.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    page.find_element("id", "save").click()
    (file,) = wait_for(lambda: list(tmp_path.glob("*.jpg")))
    assert file.name == "fewstep-a-red-circle-on-a-blue-background-0.jpg"
    with Image.open(io.BytesIO(file.read_bytes())) as saved:
        assert psnr(np.asarray(saved.convert("RGB")), pixels(page)) > 40


def test_seeds(page: Any) -> None:
    seeds = set()
    for _ in range(2):
        page.find_element("id", "random").click()
        seeds.add(page.execute_script("return document.getElementById('seed').value"))
    assert len(seeds) == 2
    wait_for(lambda: str(page.execute_script("return (live.settings || {}).seed")) in seeds)
    used = page.execute_script("return live.settings.seed")
    for wrong in ("-5", "1e26", ""):
        put(page, "seed", wrong)
        assert "whole number from 0" in page.find_element("id", "seed-note").text
        assert page.find_element("id", "seed").get_attribute("aria-invalid") == "true"
    put(page, "steps", "3")
    wait_for(lambda: page.execute_script("return live.settings.steps") == 3)
    assert page.execute_script("return live.settings.seed") == used, "the last one stays"
    put(page, "seed", "7")
    wait_for(lambda: page.execute_script("return live.settings.seed") == 7)
    assert page.find_element("id", "seed-note").text == page.find_element("id", "error").text == ""


def test_a_negative_prompt_is_open_where_it_has_an_effect(page: Any) -> None:
    negative = page.find_element("id", "negative")
    assert not negative.is_enabled()
    assert "no effect" in page.find_element("id", "negative-note").text
    put(page, "guidance", "3")
    assert negative.is_enabled()
    assert page.find_element("id", "negative-note").text == ""
    negative.send_keys("blue")
    wait_for(lambda: page.execute_script("return live.settings.negative") == "blue")


def test_sampler_schedule_and_size(page: Any, student: fewstep.Pipeline, psnr: Any) -> None:
    put(page, "sampler", "dpmpp_2m")
    put(page, "schedule", "karras")
    put(page, "steps", "4")
    put(page, "size", "96x64")
    type_prompt(page, "a green star on a yellow background")
    wait_for(lambda: pixels(page).shape == (64, 96, 3))
    alone = student(
        "a green star on a yellow background", sampler="dpmpp_2m", schedule="karras", steps=4, size=(96, 64), seed=0
    )
    wait_for(lambda: psnr(pixels(page), alone.images[0]) >= 28)
    shown = box(page, "picture")
    assert abs(shown["width"] / shown["height"] - 1.5) < 0.02
    put(page, "source", "sketch")
    assert page.execute_script("const c = document.getElementById('sketch'); return c.width / c.height") > 1.45


def test_presets(page: Any) -> None:
    put(page, "preset", "lcm-lora")
    wait_for(lambda: page.execute_script("return (live.settings || {}).sampler") == "lcm")
    assert page.execute_script("return live.settings.guidance") == 1
    put(page, "steps", "3")
    assert page.find_element("id", "preset").get_attribute("value") == "", "it is another's now"
    page.find_element("id", "remember").click()
    page.find_element("id", "preset-name").send_keys("mine")
    page.find_element("css selector", "#naming button[value=save]").click()
    wait_for(lambda: page.find_element("id", "preset").get_attribute("value") == "own:mine")
    put(page, "preset", "")
    put(page, "steps", "1")
    page.refresh()
    wait_for(lambda: page.execute_script("return live.frames > 0"))
    put(page, "preset", "own:mine")
    wait_for(lambda: page.execute_script("return live.settings.steps") == 3)
    page.find_element("id", "forget").click()
    assert "mine" not in page.find_element("id", "preset").text


def test_settings_and_the_drawing_are_there_again(page: Any) -> None:
    for name, value in (("steps", "3"), ("seed", "11"), ("noise", "walk"), ("sampler", "ddim"), ("strength", "0.4")):
        put(page, name, value)
    type_prompt(page, "a white ring on a purple background")
    put(page, "source", "sketch")
    stroke(page)
    page.refresh()
    wait_for(lambda: page.execute_script("return (live.settings || {}).seed") == 11)
    settings = page.execute_script("return live.settings")
    assert (settings["steps"], settings["noise"], settings["sampler"], settings["strength"]) == (3, "walk", "ddim", 0.4)
    assert settings["prompt"] == "a white ring on a purple background"
    wait_for(page.find_element("id", "sketch").is_displayed)
    wait_for(lambda: near(sketched(page, 0.5, 0.5), RED))


@pytest.mark.parametrize("source", ["none", "sketch"])
def test_the_copied_command_makes_the_picture(page: Any, tmp_path: Path, psnr: Any, source: str) -> None:
    put(page, "steps", "3")
    put(page, "seed", "5")
    put(page, "strength", "0.4")
    type_prompt(page, 'a blue square\'s edge on a $HOME "background"')
    if source == "sketch":
        page.execute_async_script(BRING, "drop", "green")
        wait_for(lambda: pixels(page)[2, 2].astype(int).argmax() == 1)
    time.sleep(0.3)
    page.execute_script("navigator.clipboard.writeText = text => { window.copied = text; return Promise.resolve(); }")
    page.find_element("id", "copy").click()
    command = wait_for(lambda: page.execute_script("return window.copied"))
    wait_for(lambda: page.find_element("id", "told").text == "the command is copied")
    words = shlex.split(command)
    assert words[:3] == ["fewstep", "run", "student"]
    Image.new("RGB", (100, 50), "green").save(tmp_path / "input.jpg", quality=95)
    words = [w.replace("input.jpg", str(tmp_path / "input.jpg")) for w in words]
    words = [w.replace("picture.png", str(tmp_path / "picture.png")) for w in words]
    assert main(words[1:]) == 0
    with Image.open(tmp_path / "picture.png") as again:
        assert psnr(np.asarray(again), pixels(page)) >= 26, "as far as JPEGs are"


def test_the_gallery_keeps_what_stands_still(page: Any) -> None:
    put(page, "seed", "4")
    type_prompt(page, "a red circle on a blue background")
    thumbs = wait_for(lambda: page.find_elements("css selector", "#gallery button"))
    kept = page.execute_script("return shelf.entries.length")
    put(page, "seed", "5")
    type_prompt(page, "a green star on a yellow background")
    wait_for(lambda: page.execute_script("return shelf.entries.length") == kept + 1)
    thumbs = page.find_elements("css selector", "#gallery button")
    thumbs[1].click()
    dialog = page.find_element("id", "kept")
    wait_for(dialog.is_displayed)
    assert "--seed=4" in page.find_element("id", "kept-command").text
    page.find_element("id", "kept-use").click()
    wait_for(lambda: page.execute_script("return live.settings.seed") == 4)
    assert page.find_element("id", "prompt").get_attribute("value") == "a red circle on a blue background"
    assert not dialog.is_displayed()
    page.find_elements("css selector", "#gallery button")[0].click()
    before = page.execute_script("return shelf.entries.length")
    page.find_element("id", "kept-drop").click()
    assert page.execute_script("return shelf.entries.length") == before - 1
    page.find_elements("css selector", "#gallery button")[0].click()
    page.find_element("id", "kept-start").click()
    wait_for(page.find_element("id", "sketch").is_displayed)
    put(page, "source", "none")


def test_moving_noise_is_kept_when_asked(page: Any) -> None:
    put(page, "noise", "walk")
    wait_for(lambda: page.execute_script("return live.frames") > 10)
    page.execute_script("shelf.entries = []; list()")
    page.find_element("id", "keep").click()
    wait_for(lambda: page.execute_script("return shelf.entries.length") == 1)
    page.find_element("css selector", "#gallery button").click()
    assert "noise was moving" in page.find_element("id", "kept-note").text
    page.find_element("id", "kept-close").click()


def test_full_screen(page: Any) -> None:
    page.find_element("id", "full").click()
    wait_for(lambda: page.execute_script("return (document.fullscreenElement || {}).id") == "result")
    page.execute_script("document.exitFullscreen()")
    wait_for(lambda: page.execute_script("return document.fullscreenElement === null"))
