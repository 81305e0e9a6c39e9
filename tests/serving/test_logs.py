"""What `fewstep serve` says: in the form that suits the reader, ready when it is, and nothing after it has ended."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from fewstep.cli import main
from fewstep.serving.http.logs import JsonLines, PlainLines, logging_to
from http_service import free_port, is_ready, wait_until

KEY = "k" * 16


def record(**fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("fewstep.x", logging.INFO, __file__, 1, "request", None, None)
    made.fields = fields
    return made


def test_log_lines_are_json() -> None:
    line = json.loads(JsonLines().format(record(request_id="a", status=200)))
    assert (line["message"], line["request_id"], line["level"]) == ("request", "a", "info")


def test_plain_lines_move_no_cursor() -> None:
    line = PlainLines().format(record(route="/live", status=200, odd="\x1b[31m\n"))
    assert re.fullmatch(r"\d\d:\d\d:\d\d request route=/live status=200 odd=\\x1b\[31m\\n", line)
    warning = logging.LogRecord("fewstep.x", logging.WARNING, __file__, 1, "slow", None, None)
    assert PlainLines().format(warning).endswith(" warning slow")


def test_a_terminal_gets_plain_lines_and_a_file_json() -> None:
    reads, writes = pty.openpty()
    with os.fdopen(reads, "rb", buffering=0) as seen, os.fdopen(writes, "w") as terminal:
        with logging_to(terminal):
            logging.getLogger("fewstep.x").info("hello")
        assert re.match(rb"\d\d:\d\d:\d\d hello", seen.read(100))
        with logging_to(terminal, form="json"):
            logging.getLogger("fewstep.x").info("hello")
        assert json.loads(seen.read(200))["message"] == "hello"
    file = io.StringIO()
    with logging_to(file, level="warning"):
        logging.getLogger("fewstep.x").info("unheard")
        logging.getLogger("fewstep.x").warning("hello")
    assert [json.loads(line)["message"] for line in file.getvalue().splitlines()] == ["hello"]


def test_a_server_of_this_process_leaves_no_handler_behind(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Its stream may be closed by then, and whoever logged would get a traceback instead of his words."""
    (tmp_path / "keys.toml").write_text(f"[ann]\nkey = '{KEY}'\n")
    port, root = free_port(), logging.getLogger()
    url = f"http://127.0.0.1:{port}"
    before = list(root.handlers), root.level
    seen: list[Any] = []

    def visit() -> None:
        wait_until(lambda: is_ready(url))
        held = {"authorization": f"Bearer {KEY}", "origin": "https://app.example.org"}
        answers = [httpx.get(f"{url}/v1/models"), httpx.get(f"{url}/v1/models/gpt-image-1", headers=held)]
        seen.extend(a.status_code for a in answers)
        seen.append(answers[1].headers["access-control-allow-origin"])
        os.kill(os.getpid(), signal.SIGTERM)

    visitor = threading.Thread(target=visit)
    visitor.start()
    small = ["--rows", "1", "--slots", "1", "--threads", "1", "--port", str(port)]
    named = ["--alias", "gpt-image-1", "--cors", "https://app.example.org", "--keys", str(tmp_path / "keys.toml")]
    assert main(["serve", "student", *small, *named]) == 0
    visitor.join()
    assert seen == [401, 200, "https://app.example.org"]
    assert (list(root.handlers), root.level) == before
    said = capsys.readouterr().err
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    ready = next(line for line in lines if line["message"] == "ready")
    assert (ready["api"], ready["page"]) == (f"{url}/v1", f"{url}/live")
    logging.getLogger("fewstep.x").warning("later")
    assert "Logging error" not in capsys.readouterr().err
