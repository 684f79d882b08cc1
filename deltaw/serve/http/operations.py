"""Routes beside OpenAI's: adapters at run time as in vLLM, adapters as in llama.cpp, and the server's own state."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, PlainTextResponse, Response

from deltaw import __version__
from deltaw.errors import DeltawError, StateError
from deltaw.serve.http import replies
from deltaw.serve.http.errors import ErrorReply, Refused, from_fault
from deltaw.serve.http.metrics import exposition
from deltaw.serve.http.schema import LoadAdapter, UnloadAdapter
from deltaw.serve.page import FOLDER, TYPES

if TYPE_CHECKING:
    from deltaw.serve.service import Service

POLICY = {"Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'",
          "X-Content-Type-Options": "nosniff"}
"""What the playground may load: its own files, so that no answer can make it run or fetch anything."""
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorReply} for status in (400, 401, 403, 404, 413, 503)}
STOPPED: dict[int | str, dict[str, Any]] = {503: {"model": ErrorReply}}
SAYS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}, "description": "A sentence, as vLLM's."}}


def adapters(service: Service) -> APIRouter:
    """The routes that list, load and unload adapters."""
    routes = APIRouter(responses=ERRORS)

    @routes.post("/v1/load_lora_adapter", response_model=None, responses=SAYS)
    async def load(asked: LoadAdapter) -> Response:
        """Register an adapter below the server's --adapter-root."""
        _require_runtime_loading(service)
        try:
            await run_in_threadpool(service.load_adapter, asked.lora_name, asked.lora_path, asked.load_inplace)
        except StateError as error:
            raise Refused(400, f"The adapter '{asked.lora_name}' is loaded already; load_inplace replaces it.",
                          param="lora_name", code="already_loaded") from error
        except DeltawError as error:
            raise from_fault(error, code="adapter_refused") from error
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @routes.post("/v1/unload_lora_adapter", response_model=None, responses=SAYS)
    async def unload(asked: UnloadAdapter) -> Response:
        """Forget an adapter; answers under way end with it."""
        _require_runtime_loading(service)
        try:
            await run_in_threadpool(service.unload_adapter, asked.lora_name)
        except StateError as error:
            raise Refused(404, f"The adapter '{asked.lora_name}' does not exist.", param="lora_name",
                          code="model_not_found") from error
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    @routes.get("/lora-adapters", response_model=None, responses=replies.json(list[replies.NumberedAdapter]))
    async def listed() -> list[dict[str, Any]]:
        """Adapters with the numbers that `lora` may use, as llama.cpp lists them; none is ever used again."""
        return [{"id": card["number"], "name": card["name"], "path": card["path"], "scale": 0.0}
                for card in service.cards()]

    @routes.get("/v1/adapters/{name:path}", response_model=None, responses=replies.json(replies.AdapterCard))
    async def card(name: str) -> dict[str, Any]:
        """All that an adapter's files tell about it."""
        try:
            return await run_in_threadpool(service.card, name)
        except StateError as error:
            raise from_fault(error, 404, code="model_not_found") from error
        except DeltawError as error:
            raise from_fault(error) from error

    return routes


def state(service: Service, draining: Callable[[], bool]) -> APIRouter:
    """The routes about the server itself; they need no key."""
    routes = APIRouter()

    @routes.get("/health", response_model=None, responses=replies.json(replies.Status) | STOPPED)
    async def health() -> dict[str, str]:
        """Whether the engine is alive."""
        if not service.ready:
            raise Refused(503, "The engine has stopped.")
        return {"status": "ok"}

    @routes.get("/ready", response_model=None, responses=replies.json(replies.Status) | STOPPED)
    async def ready() -> dict[str, str]:
        """Whether new requests are taken."""
        if draining() or not service.ready:
            raise Refused(503, "The server is stopping.", code="stopping")
        return {"status": "ready"}

    @routes.get("/version", response_model=None, responses=replies.json(replies.Version))
    async def version() -> dict[str, str]:
        """The version of deltaw."""
        return {"version": __version__}

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Figures in Prometheus' text format."""
        content, kind = exposition(service)
        return Response(content, headers={"Content-Type": kind})

    @routes.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Response:
        """The playground."""
        return HTMLResponse((FOLDER / "index.html").read_bytes(), headers=POLICY)

    @routes.get("/playground/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        """A file of the playground."""
        if name not in TYPES:
            raise Refused(404, "There is no such file.")
        return Response((FOLDER / name).read_bytes(), media_type=TYPES[name], headers=POLICY)

    return routes


def _require_runtime_loading(service: Service) -> None:
    if not service.config.allow_runtime_loading:
        raise Refused(403, "Loading adapters at run time is off; start the server with --allow-runtime-loading and "
                      "--adapter-root.", code="runtime_loading_off")

