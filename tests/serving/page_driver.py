"""What browser tests of the live page do with it, as a user does."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

needs_chromium = pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("chromedriver") is None,
    reason="chromium and chromium-driver are not installed",
)
PIXELS = """
const picture = document.getElementById('picture'), copy = document.createElement('canvas');
copy.width = picture.width; copy.height = picture.height;
const context = copy.getContext('2d'); context.drawImage(picture, 0, 0);
return [copy.height, copy.width, ...context.getImageData(0, 0, copy.width, copy.height).data];
"""


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


def size_of(page: Any, width: int, height: int, *, scheme: str = "light") -> None:
    """Give the page a window of so many CSS pixels, and the user's colour scheme."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    mobile = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", mobile)


def fresh(page: Any) -> None:
    """Load the page as for the first time."""
    page.execute_script("localStorage.clear(); sessionStorage.clear()")
    page.refresh()
    wait_for(lambda: page.execute_script("return live.hello !== null && live.frames > 0"))


def box(page: Any, name: str) -> dict[str, float]:
    """Where an element is, in CSS pixels of the window."""
    script = "return document.getElementById(arguments[0]).getBoundingClientRect().toJSON()"
    return dict(page.execute_script(script, name))
