"""OpenAI's routes: models, chat completions and completions, in one piece or as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from deltaw.serve.http import replies
from deltaw.serve.http.answers import Answer, Answers, prepare, unknown_model
from deltaw.serve.http.disconnect import unless_gone
from deltaw.serve.http.errors import ErrorReply, Refused, body
from deltaw.serve.http.schema import ChatRequest, CompletionRequest
from deltaw.serve.request import TokenLogprob

if TYPE_CHECKING:
    from deltaw.serve.service import Service

ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorReply} for status in
                                           (400, 401, 404, 413, 429, 500, 503, 504)}


def router(service: Service) -> APIRouter:
    """The routes over this service."""
    routes = APIRouter(prefix="/v1", responses=ERRORS)

    @routes.get("/models", response_model=None, responses=replies.json(replies.ModelList))
    async def models() -> dict[str, Any]:
        """The base, then its adapters."""
        return {"object": "list", "data": _models(service)}

    @routes.get("/models/{name:path}", response_model=None, responses=replies.json(replies.Model))
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        for found in _models(service):
            if found["id"] == name:
                return found
        raise unknown_model(service, name)

    @routes.post("/chat/completions", response_model=None,
                 responses=replies.json_or_events(replies.ChatReply, replies.ChatChunk))
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """The next turn of a conversation."""
        return await _answer(Chat(asked, service), await prepare(service, asked), request)

    @routes.post("/completions", response_model=None,
                 responses=replies.json_or_events(replies.CompletionReply, replies.CompletionChunk))
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        """What follows a text."""
        return await _answer(Completion(asked, service), await prepare(service, asked), request)

    return routes


def _models(service: Service) -> list[dict[str, Any]]:
    """The base, then its adapters, as OpenAI and vLLM describe a model."""
    base = {"id": service.name, "object": "model", "created": int(service.started), "owned_by": "deltaw",
            "root": service.config.model, "parent": None, "max_model_len": service.capacity,
            "max_tokens": service.longest_answer, "chat": service.chats}
    return [base, *({"id": card["name"], "object": "model", "created": card["created"], "owned_by": "deltaw",
                     "root": card["path"], "parent": service.name, "rank": card["rank"]} for card in service.cards())]


async def _answer(form: Form, answers: Answers, request: Request) -> Response:
    if not form.asked.stream:
        async with answers:
            done = await unless_gone(request, answers.collect())
        return JSONResponse(form.whole(done, form.usage(answers, done)))
    await answers.__aenter__()  # a full queue is a status of its own, which a stream that has begun cannot have
    return Stream(form, answers)


class Stream(StreamingResponse):
    """Server-sent events, whose answers are ended when the client goes, even before the first event."""

    def __init__(self, form: Form, answers: Answers) -> None:
        super().__init__(_stream(form, answers), media_type="text/event-stream",
                         headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.answers.__aexit__()


async def _stream(form: Form, answers: Answers) -> AsyncIterator[str]:
    """The events of a stream."""
    done = [Answer() for _ in range(len(answers.prompts) * answers.n)]
    options = form.asked.stream_options
    with_usage = options is not None and options.include_usage
    extra = {"usage": None} if with_usage else {}
    try:
        for index in range(len(done)):
            for opening in form.opening(index):
                yield _event(opening | extra)
        async for index, event in answers.events():
            shift = len(done[index].text)
            done[index].add(event)
            if event.text or event.finish or event.logprobs:
                yield _event(form.piece(index, event.text, event.logprobs, event.finish, shift) | extra)
        if with_usage:
            yield _event(form.head(stream=True) | {"choices": [], "usage": form.usage(answers, done)})
        yield "data: [DONE]\n\n"
    except Refused as error:
        yield _event(body(error.status, error.message, error.param, error.code))


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class Form:
    """How answers to one kind of request look."""

    kind = prefix = ""

    def __init__(self, asked: ChatRequest | CompletionRequest, service: Service) -> None:
        self.asked, self.service = asked, service
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def head(self, *, stream: bool = False) -> dict[str, Any]:
        """What every reply begins with."""
        return {"id": self.id, "object": self.kind, "created": self.created, "model": self.asked.model}

    def whole(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """The reply in one piece."""
        return self.head() | {"choices": [self.choice(i, answer) for i, answer in enumerate(answers)], "usage": usage}

    def usage(self, answers: Answers, done: Sequence[Answer]) -> dict[str, Any]:
        """Tokens of prompts and answers."""
        written = sum(len(answer.tokens) for answer in done)
        return {"prompt_tokens": answers.prompt_tokens, "completion_tokens": written,
                "total_tokens": answers.prompt_tokens + written,
                "prompt_tokens_details": {"cached_tokens": answers.reused}}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """One answer in one piece."""
        raise NotImplementedError

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Events before the first piece of an answer."""
        return []

    def piece(self, index: int, text: str, logprobs: Sequence[TokenLogprob], finish: str | None,
              shift: int) -> dict[str, Any]:
        """An event with the next piece of an answer; `shift` is the length of its text before."""
        raise NotImplementedError

    def _text(self, token: int) -> str:
        return self.service.token_text(token)


class Chat(Form):
    """Chat completions."""

    kind, prefix = "chat.completion", "chatcmpl"

    def head(self, *, stream: bool = False) -> dict[str, Any]:
        """As of every reply; events are objects of a name of their own."""
        return super().head() | ({"object": "chat.completion.chunk"} if stream else {})

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A message."""
        return {"index": index, "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._told(answer.logprobs), "finish_reason": answer.finish}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [self.head(stream=True) | {"choices": [{"index": index, "delta": delta, "logprobs": None,
                                                       "finish_reason": None}]}]

    def piece(self, index: int, text: str, logprobs: Sequence[TokenLogprob], finish: str | None,
              shift: int) -> dict[str, Any]:
        """What is said next."""
        return self.head(stream=True) | {"choices": [{
            "index": index, "delta": {"content": text} if text or not finish else {},
            "logprobs": self._told(logprobs), "finish_reason": finish}]}

    def _told(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self.asked.wanted_logprobs is None:
            return None
        return {"content": [self._token(one.token, one.logprob) | {
            "top_logprobs": [self._token(*other) for other in one.top]} for one in logprobs], "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._text(token), "logprob": logprob, "bytes": self.service.token_bytes(token)}


class Completion(Form):
    """Completions of texts."""

    kind, prefix = "text_completion", "cmpl"

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A text."""
        before = self._echo(index)
        return {"index": index, "text": before + answer.text, "finish_reason": answer.finish,
                "logprobs": self._told(answer.logprobs, len(before))}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """The prompt, where it was asked for."""
        before = self._echo(index)
        return [self.piece(index, before, (), None, 0)] if before else []

    def piece(self, index: int, text: str, logprobs: Sequence[TokenLogprob], finish: str | None,
              shift: int) -> dict[str, Any]:
        """What follows."""
        return self.head() | {"choices": [{"index": index, "text": text, "finish_reason": finish,
                                           "logprobs": self._told(logprobs, shift)}]}

    def _echo(self, index: int) -> str:
        asked = self.asked
        assert isinstance(asked, CompletionRequest)
        if not asked.echo:
            return ""
        prompts: Any = asked.prompt
        if isinstance(prompts, str):
            return prompts
        one: Any = prompts if isinstance(prompts[0], int) else prompts[index // asked.n]
        return one if isinstance(one, str) else "".join(map(self._text, one))

    def _told(self, logprobs: Sequence[TokenLogprob], shift: int) -> dict[str, Any] | None:
        if self.asked.wanted_logprobs is None:
            return None
        texts = [self._text(one.token) for one in logprobs]
        offsets = [shift + sum(map(len, texts[:i])) for i in range(len(texts))]
        return {"tokens": texts, "token_logprobs": [one.logprob for one in logprobs], "text_offset": offsets,
                "top_logprobs": [{self._text(token): p for token, p in one.top} for one in logprobs]}
