"""The application: routes, guard and errors put together over one service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response

from deltaw import __version__
from deltaw.serve.http import errors, openai, operations, reference, replies
from deltaw.serve.http.guard import Guard

if TYPE_CHECKING:
    from deltaw.serve.service import Service


class Draining:
    """Whether the server has begun to stop: what runs ends, nothing new is taken."""

    def __init__(self) -> None:
        self.begun = False

    def __call__(self) -> bool:
        """Whether it has begun."""
        return self.begun


def create_app(service: Service, draining: Draining | None = None) -> FastAPI:
    """The ASGI application over a running service."""
    draining = draining or Draining()
    app = FastAPI(title="deltaw", version=__version__, docs_url=None, redoc_url=None,
                  description="One base, many adapters: OpenAI's API, with the adapter chosen by `model`.")
    errors.add_handlers(app)
    for routes in (openai.router(service), operations.adapters(service), operations.state(service, draining)):
        app.include_router(routes)

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def interface() -> Response:
        """The interface, to be read; FastAPI's own page would come from the network."""
        return HTMLResponse(reference.page(app.openapi()), headers=operations.POLICY)

    app.add_middleware(Guard, api_key=service.config.api_key, max_bytes=service.config.max_request_bytes,
                       draining=draining)
    _complete(app.openapi())
    return app


def _complete(document: dict[str, Any]) -> None:
    """Make the document, which the app keeps, say what FastAPI cannot know: events of streams, and what never comes."""
    schemas = document["components"]["schemas"]
    schemas |= replies.events()
    for told in [told for methods in document["paths"].values() for told in methods.values()]:
        told["responses"].pop("422", None)
        for content in [answer.get("content", {}) for answer in told["responses"].values()]:
            if content.get("application/json") == {"schema": {}}:
                del content["application/json"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
