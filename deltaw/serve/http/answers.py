"""From a request to the answers: adapters and limits checked, prompts submitted, events collected or streamed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi.concurrency import run_in_threadpool

from deltaw.errors import BaseModelError, ConfigError, DataError, DeltawError, StateError, near
from deltaw.serve.http.errors import Refused, from_fault
from deltaw.serve.http.schema import ChatRequest, CompletionRequest, Generation
from deltaw.serve.request import Event, SamplingParams, TokenLogprob
from deltaw.serve.scheduler import QueueFull
from deltaw.serve.text import PromptTooLong

if TYPE_CHECKING:
    from deltaw.serve.service import Service

RETRY_AFTER_S = "1"


@dataclass
class Answer:
    """One answer so far."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None

    def add(self, event: Event) -> None:
        """Take in what an event tells."""
        self.text += event.text
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        self.finish = event.finish or self.finish


class Answers:
    """The answers to one request, over its prompts and `n`. Use as an async context: leaving it frees their places."""

    def __init__(self, service: Service, prompts: list[list[int]], mix: Mapping[str, float], params: SamplingParams,
                 n: int, *, continues: bool = False) -> None:
        self.continues = continues
        self.service, self.prompts, self.mix, self.params, self.n = service, prompts, mix, params, n
        self.reused = 0
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._sequences: list[Any] = []
        self._open = len(prompts) * n

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    async def __aenter__(self) -> Answers:
        loop = asyncio.get_running_loop()

        def tell(index: int, event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        try:
            for i, prompt in enumerate(self.prompts):
                listeners: list[Callable[[Event], None]] = [partial(tell, i * self.n + j) for j in range(self.n)]
                submitted: Future[Any] = self.service.submit(prompt, self.mix, self.params, listeners,
                                                               continues=self.continues)
                self._sequences += await asyncio.wrap_future(submitted)
        except BaseException as error:
            self.service.cancel(self._sequences)
            if isinstance(error, QueueFull):
                raise Refused(429, "Too many requests wait already; try again later.", code="queue_full",
                              headers={"Retry-After": RETRY_AFTER_S}) from error
            if isinstance(error, StateError):  # unloaded since it was looked up
                raise from_fault(error, 404, code="model_not_found") from error
            if isinstance(error, DeltawError):  # its folder was replaced by something that is no adapter
                raise Refused(400, str(error), param="model", code="adapter_refused") from error
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._open:
            self.service.cancel(self._sequences)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Events of all answers as they come; raises `Refused` for one that failed."""
        while self._open:
            index, event = await self._events.get()
            self._open -= event.finish is not None
            self.reused += event.reused
            if event.finish == "error":
                raise Refused(400, event.error, param="model", code="adapter_refused") if event.refused else \
                    Refused(500, event.error, code="engine_failed")
            if event.finish == "timeout":
                raise Refused(504, "The answer took longer than the server allows.", code="timeout")
            if event.finish == "cancelled":
                raise Refused(503, "The server is stopping.", code="stopping")
            yield index, event

    async def collect(self) -> list[Answer]:
        """All answers, once they are finished."""
        answers = [Answer() for _ in range(len(self.prompts) * self.n)]
        async for index, event in self.events():
            answers[index].add(event)
        return answers


def find_mix(service: Service, request: Generation) -> dict[str, float]:
    """The adapters of a request with their weights; 404 for a name that there is not."""
    names, numbers = service.adapters, service.adapter_numbers
    if request.model != service.name and request.model not in names:
        raise unknown_model(service, request.model)
    if request.lora is None:
        return {} if request.model == service.name else {request.model: 1.0}
    mix: dict[str, float] = {}
    for i, part in enumerate(request.lora):
        name = part.id if isinstance(part.id, str) else numbers.get(part.id)
        if name is None or name not in names:
            raise Refused(404, f"The adapter {part.id!r} does not exist. {near(str(part.id), names)}".rstrip(),
                          param=f"lora.{i}.id", code="model_not_found")
        mix[name] = mix.get(name, 0.0) + part.scale
    return {name: weight for name, weight in mix.items() if weight}


def unknown_model(service: Service, name: str) -> Refused:
    """That there is no such model."""
    return Refused(404, f"The model '{name}' does not exist. {near(name, [service.name, *service.adapters])}".rstrip(),
                   param="model", code="model_not_found")


def find_params(service: Service, request: ChatRequest | CompletionRequest, longest: int) -> SamplingParams:
    """The sampling of a request, within the server's limits, after a prompt of `longest` tokens."""
    limit, room = service.config.max_tokens, service.capacity - longest
    wanted = request.wanted_tokens
    if longest > service.longest_prompt:
        raise Refused(400, f"The prompt has {longest} tokens; at most {service.longest_prompt} are allowed.",
                      param=_where(request), code="context_length_exceeded")
    if wanted is not None and wanted > limit:
        raise Refused(400, f"max_tokens is {wanted}; at most {limit} are allowed.", param="max_tokens",
                      code="max_tokens_exceeded")
    if wanted is not None and wanted > room:
        raise Refused(400, f"The prompt's {longest} tokens and max_tokens {wanted} exceed the context of "
                      f"{service.capacity} tokens.", param="max_tokens", code="context_length_exceeded")
    plain = {name: value for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty",
             "frequency_penalty", "seed") if (value := getattr(request, name)) is not None}
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    try:
        return SamplingParams(max_tokens=wanted or min(limit, room), top_k=max(0, request.top_k or 0), stop=stop,
                              ignore_eos=request.ignore_eos, logprobs=request.wanted_logprobs, **plain)
    except ConfigError as error:
        raise from_fault(error) from error


def find_prompts(service: Service, request: ChatRequest | CompletionRequest) -> list[list[int]]:
    """The tokens of each prompt; 400 for one that is empty or too long, or that the chat template refuses."""
    try:
        if isinstance(request, ChatRequest):
            prompts = [service.chat_tokens([message.plain() for message in request.messages])]
        else:
            given: Any = request.prompt
            several = isinstance(given, list) and not isinstance(given[0], int)
            prompts = [list(p) if isinstance(p, list) else service.text_tokens(p)
                       for p in (given if several else [given])]
    except PromptTooLong as error:
        raise Refused(400, str(error), param=_where(request), code="context_length_exceeded") from error
    except (DataError, BaseModelError) as error:
        raise from_fault(error, code="chat_template") from error
    if not all(prompts):
        raise Refused(400, "The prompt is empty.", param="prompt", code="empty_prompt")
    if any(token >= service.vocabulary for prompt in prompts for token in prompt):
        raise Refused(400, f"A token is not in the vocabulary of {service.vocabulary}.", param="prompt",
                      code="unknown_token")
    return prompts


def _where(request: ChatRequest | CompletionRequest) -> str:
    """The field that holds the prompt."""
    return "messages" if isinstance(request, ChatRequest) else "prompt"


async def prepare(service: Service, request: ChatRequest | CompletionRequest) -> Answers:
    """Everything checked, nothing submitted yet; in a thread, for long prompts take long and others must not wait."""
    return await run_in_threadpool(_prepared, service, request)


def _prepared(service: Service, request: ChatRequest | CompletionRequest) -> Answers:
    mix = find_mix(service, request)
    prompts = find_prompts(service, request)
    params = find_params(service, request, max(map(len, prompts)))
    if len(prompts) * request.n > service.most_answers:  # 429 would have the client come back for ever
        raise Refused(400, f"The request asks for {len(prompts) * request.n} answers; at most {service.most_answers} "
                      "can be written or wait at once.", param="n", code="too_many_answers")
    return Answers(service, prompts, mix, params, request.n, continues=isinstance(request, CompletionRequest))
