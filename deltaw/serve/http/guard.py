"""What stands before every request: the key, the size of its body, and whether the server is stopping."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltaw.serve.http.errors import Refused, reply
from deltaw.serve.page import TYPES

OPEN = frozenset({"/", "/health", "/ready", "/version", *(f"/playground/{name}" for name in TYPES)})
"""What needs no key: the page, which asks for it, and what tells nothing."""


class Guard:
    """Pure ASGI, so that streams and disconnects pass untouched."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_bytes: int, draining: Callable[[], bool]) -> None:
        self.app, self.max_bytes, self.draining = app, max_bytes, draining
        self._key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what is refused; pass on everything else, with a body that stops at the limit."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refused = self._refusal(scope, headers)
        if refused is not None:
            await reply(refused.status, refused.message, code=refused.code, headers=refused.headers)(
                scope, receive, send)
            return
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_bytes:
                raise HTTPException(413, self._too_large().message)
            return message

        await self.app(scope, limited, send)

    def _refusal(self, scope: Scope, headers: dict[bytes, Any]) -> Refused | None:
        path = scope["path"]
        if self._key is not None and path not in OPEN \
                and not hmac.compare_digest(headers.get(b"authorization", b""), self._key):
            return Refused(401, "The API key is missing or wrong.", code="invalid_api_key",
                           headers={"WWW-Authenticate": "Bearer"})
        if self.draining() and scope["method"] == "POST":
            return Refused(503, "The server is stopping.", code="stopping", headers={"Retry-After": "5"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.max_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> Refused:
        return Refused(413, f"The request is longer than {self.max_bytes} bytes.", code="request_too_large")
