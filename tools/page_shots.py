"""Pictures of the live page for the documentation: light and dark, wide and on a phone.

python tools/page_shots.py [--output docs]

Serves the embedded student, draws and types as a person would, and writes live-{light,dark}-{wide,phone}.png. Needs
Debian's packages chromium and chromium-driver.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from fewstep.bench.live import browser, serving
from PIL import Image

SHAPES = {"wide": (1280, 860, 1.0), "phone": (390, 844, 2.0)}
PROMPTS = (
    "a large red circle on a blue background",
    "a green star on a yellow background",
    "a large white ring on a purple background",
    "a yellow triangle on a green background",
)
STROKES = (((-90, -60), (60, -90), (120, 40), (40, 110), (-80, 90), (-90, -60)),)
MOST_BYTES = 150_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs"))
    options = parser.parse_args()
    with serving("--threads", "1", "--rows", "4") as (address, _), browser() as driver:
        for scheme in ("light", "dark"):
            for name, shape in SHAPES.items():
                dress(driver, scheme, *shape)
                visit(driver, f"{address}/live", drawing=name == "wide")
                save(driver, options.output / f"live-{scheme}-{name}.png", shape)
    return 0


def dress(driver: Any, scheme: str, width: int, height: int, scale: float) -> None:
    """Have the browser show the page in this colour scheme, in a window of so many CSS pixels."""
    scheme_feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme_feature]})
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600},
    )


def visit(driver: Any, url: str, *, drawing: bool) -> None:
    """Open the page as if for the first time, type some prompts, and draw if asked."""
    driver.get(url)
    driver.execute_script("localStorage.clear()")
    driver.refresh()
    wait(driver, "return live.frames > 0")
    for i, prompt in enumerate(PROMPTS):
        set_field(driver, "prompt", prompt)
        set_field(driver, "seed", str(i + 3))
        set_field(driver, "steps", "4")
        wait(driver, f"return shelf.entries.length > {i}")
    if drawing:
        set_field(driver, "strength", "0.5")
        set_field(driver, "prompt", "a large red ring on a blue background")
        set_field(driver, "source", "sketch")
        draw(driver)
        wait(driver, f"return shelf.entries.length > {len(PROMPTS)}")
    time.sleep(2.5)  # until it says that nothing changes


def draw(driver: Any) -> None:
    from selenium.webdriver import ActionChains

    sketch = driver.find_element("id", "sketch")
    for stroke in STROKES:
        pen = ActionChains(driver, duration=60).move_to_element_with_offset(sketch, *stroke[0]).click_and_hold()
        for before, after in pairwise(stroke):
            pen = pen.move_by_offset(after[0] - before[0], after[1] - before[1])
        pen.release().perform()


def set_field(driver: Any, name: str, value: str) -> None:
    driver.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change'));",
        name,
        value,
    )


def wait(driver: Any, script: str) -> None:
    for _ in range(300):
        if driver.execute_script(script):
            return
        time.sleep(0.05)
    sys.exit(f"it did not come about: {script}")


def save(driver: Any, path: Path, shape: tuple[int, int, float]) -> None:
    """What the window shows, in 128 colours."""
    with Image.open(io.BytesIO(driver.get_screenshot_as_png())) as shot:
        image = shot.convert("RGB")
    if shape[2] > 1:
        image = image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.LANCZOS)
    image.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    if path.stat().st_size > MOST_BYTES:
        sys.exit(f"{path} has {path.stat().st_size} bytes; expected at most {MOST_BYTES}")
    print(path, image.size, path.stat().st_size)


if __name__ == "__main__":
    sys.exit(main())
