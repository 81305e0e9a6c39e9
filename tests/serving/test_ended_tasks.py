"""Tasks that end together: whatever several of them raise is read, and no more is said of it than one word."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from fewstep.serving import Server
from fewstep.serving.live.hub import LiveHub
from fewstep.serving.live.socket import Connection, SocketLimits
from fewstep.serving.tasks import end_tasks
from starlette.websockets import WebSocket


def unread(main: Callable[[], Coroutine[Any, Any, None]]) -> list[str]:
    """What asyncio complains of while and after this runs."""
    said: list[str] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context["message"]))
        await main()
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(watched())
    return said


async def fails(turns: int) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)
    raise ValueError(str(turns))


@pytest.mark.parametrize("turns", [(0,), (0, 0), (0, 0, 0), (0, 1), (2, 0, 1), (0, 50)])
def test_every_error_is_read_whoever_fails_first(turns: tuple[int, ...]) -> None:
    found: list[Exception] = []

    async def main() -> None:
        tasks = [asyncio.create_task(fails(n)) for n in turns]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        found.extend(await end_tasks(*tasks))

    assert unread(main) == []
    assert "0" in {str(e) for e in found}
    assert len(found) >= turns.count(0)


@pytest.fixture(scope="module")
def hub(student: Any) -> Any:
    with Server(student, most_slots=4, most_rows=4) as server:
        yield LiveHub(server)


@pytest.mark.parametrize("turns", range(4))
def test_a_client_that_goes_while_it_is_written_to_is_no_traceback(
    hub: LiveHub, caplog: pytest.LogCaptureFixture, turns: int
) -> None:
    """Reading meets the end of the connection as writing fails: both tasks raise, in one turn of the loop or apart."""
    caplog.set_level(logging.INFO)

    async def main() -> None:
        gone = asyncio.Event()
        heard: list[dict[str, Any]] = [
            {"type": "websocket.connect"},
            {"type": "websocket.receive", "text": json.dumps({"type": "set", "id": 1, "settings": {"prompt": "x"}})},
        ]

        async def receive() -> dict[str, Any]:
            if heard:
                return heard.pop(0)
            await gone.wait()
            return {"type": "websocket.disconnect", "code": 1006}

        async def send(message: Any) -> None:
            if message["type"] == "websocket.send" and '"hello"' not in (message.get("text") or ""):
                gone.set()
                for _ in range(turns):
                    await asyncio.sleep(0)
                raise OSError("the client is gone")

        scope = {"type": "websocket", "path": "/live/socket", "headers": [], "subprotocols": []}
        await asyncio.wait_for(Connection(hub, WebSocket(scope, receive, send), limits=SocketLimits()).run(), 30)

    assert unread(main) == []
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
