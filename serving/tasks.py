"""Tasks that live and end together."""

from __future__ import annotations

import asyncio
from typing import Any


async def end_tasks(*tasks: asyncio.Task[Any]) -> list[Exception]:
    """Cancel those that still run and wait for all; what any of them raised, so that no error is left unread."""
    for task in tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    return [o for o in outcomes if isinstance(o, Exception)]
