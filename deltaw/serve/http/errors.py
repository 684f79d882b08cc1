"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}` with the right status."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from deltaw.errors import DeltawError
from deltaw.serve.request import EngineStopped

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 409: "conflict_error",
         429: "rate_limit_error", 503: "service_unavailable_error", 504: "timeout_error"}


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """The body of every error."""

    error: ErrorBody


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None,
                 headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error of this status."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return ErrorReply(error=ErrorBody(message=message, type=kind, param=param, code=code)).model_dump()


def reply(status: int, message: str, *, param: str | None = None, code: str | None = None,
          headers: dict[str, str] | None = None) -> JSONResponse:
    """The response of an error."""
    return JSONResponse(body(status, message, param, code), status, headers)


def from_fault(error: DeltawError, status: int = 400, *, code: str | None = None) -> Refused:
    """A user's fault as the answer to a request."""
    first = error.faults[0] if error.faults else ""
    return Refused(status, str(error), param=getattr(first, "where", None), code=code)


def add_handlers(app: FastAPI) -> None:
    """Let the app answer every error in this form."""
    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return reply(error.status, error.message, param=error.param, code=error.code, headers=error.headers)

    @app.exception_handler(EngineStopped)
    async def stopped(request: Request, error: EngineStopped) -> JSONResponse:
        return reply(503, str(error), code="stopping")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        faults = error.errors()
        where = ".".join(str(part) for part in faults[0]["loc"][1:]) or None
        text = "; ".join(f"{'.'.join(str(part) for part in fault['loc'][1:]) or 'body'}: {fault['msg']}"
                         for fault in faults[:10])
        return reply(400, text, param=where, code="invalid_request")

    @app.exception_handler(StarletteHTTPException)
    async def unknown(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return reply(error.status_code, str(error.detail), headers=dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        return reply(500, f"{type(error).__name__} (unforeseen)")
