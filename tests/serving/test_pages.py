"""What a person sees at `/` and `/docs`: pages that say how to ask, and are true."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import fewstep
import httpx
import pytest
from fewstep.serving.http import Settings
from http_service import load_student, serving
from PIL import Image


@pytest.fixture(scope="module")
def url(student: fewstep.Pipeline) -> Iterator[str]:
    with serving(load_student(student, most_slots=2, most_rows=2), Settings(model="student", steps=9)) as (made, _):
        yield made


def test_the_first_page_says_how_to_ask_and_its_example_works(url: str, tmp_path: Path) -> None:
    page = httpx.get(f"{url}/")
    assert page.headers["content-type"].startswith("text/html")
    assert "script-src 'none'" in page.headers["content-security-policy"]
    assert "The service is <b>ready</b>" in page.text
    for path in re.findall(r'href="([^"]+)"', page.text):
        assert httpx.get(url + path).status_code == 200, path
    examples = [unescape(text) for text in re.findall(r"<pre[^>]*>(.*?)</pre>", page.text, re.DOTALL)]
    if bash := shutil.which("curl") and shutil.which("bash"):
        done = subprocess.run([bash, "-c", examples[0]], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        with Image.open(tmp_path / "picture.png") as picture:
            assert picture.size == (64, 64)
        (tmp_path / "picture.png").unlink()
    scope: dict[str, object] = {}
    exec(examples[1].replace('"picture.png"', repr(str(tmp_path / "picture.png"))), scope)  # noqa: S102 the page's own
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (64, 64)


def test_docs_name_every_call_and_field(url: str) -> None:
    page = httpx.get(f"{url}/docs").text
    document = httpx.get(f"{url}/openapi.json").json()
    for path, methods in document["paths"].items():
        for method in methods:
            assert f"<code>{method.upper()} {path}</code>" in page
    fields = document["components"]["schemas"]["ImageEdit"]["properties"]
    assert all(f"<code>{name}</code>" in page for name in fields)
    assert "integer, 1 to 9" in page, "bounds are the service's own"
    assert "<code>64x64</code>" in page


def test_with_a_token_the_pages_are_there_and_name_no_model(student: fewstep.Pipeline) -> None:
    settings = Settings(model="secret-name", token="t" * 16)
    with serving(load_student(student, most_slots=1, most_rows=1), settings) as (url, _):
        for path in ("/", "/docs"):
            page = httpx.get(url + path)
            assert page.status_code == 200
            assert "secret-name" not in page.text
        assert "FEWSTEP_TOKEN" in httpx.get(f"{url}/").text
        odd = httpx.get(f"{url}/", headers={"host": '"><script>alert(1)</script>'})
        assert "<script>" not in odd.text
