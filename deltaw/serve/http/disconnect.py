"""Work for a client that may go away: it stops when nobody waits for it any more."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from deltaw.serve.http.errors import Refused

R = TypeVar("R")
CLIENT_CLOSED = 499
"""The status, which nobody reads, of a request whose client went away; as nginx has it."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, R]) -> R:
    """The result of the work, cancelled as soon as the client disconnects."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Refused(CLIENT_CLOSED, "The client went away.")
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
