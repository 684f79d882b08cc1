"""What answers hold: the forms that the OpenAPI document tells. They describe, and nothing is checked as it is sent.

Streams are many small events, and a listing may name thousands of adapters, so that they are written as they are made;
that they are what is told here is tested.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

Finish = Literal["stop", "length"]


class Reply(BaseModel):
    """An answer holds these fields and no others."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class PromptDetails(Reply):
    """How much of the prompts was computed before."""

    cached_tokens: int


class Usage(Reply):
    """Tokens of prompts and answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Likelihood(Reply):
    """A token with its log-probability; its bytes where the vocabulary tells them."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLikelihood(Likelihood):
    """A token of the answer, with the likeliest in its place."""

    top_logprobs: list[Likelihood]


class ChatLogprobs(Reply):
    """Log-probabilities of a chat's tokens."""

    content: list[TokenLikelihood]
    refusal: None


class TextLogprobs(Reply):
    """Log-probabilities of a completion's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    text_offset: list[int]
    top_logprobs: list[dict[str, float]]


class AssistantMessage(Reply):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Reply):
    """One answer of a chat."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class Head(Reply):
    """What every reply begins with."""

    id: str
    created: int
    model: str


class ChatReply(Head):
    """The next turn of a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class Delta(Reply):
    """What is said next; the first tells the role."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChatPiece(Reply):
    """A piece of one answer of a chat."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class ChatChunk(Head):
    """An event of a chat's stream. The usage is in the last one, which has no pieces, where it was asked for."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatPiece]
    usage: Usage | None = None


class TextChoice(Reply):
    """One completion."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish


class CompletionReply(Head):
    """What follows a text."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage


class TextPiece(Reply):
    """A piece of one completion."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish | None


class CompletionChunk(Head):
    """An event of a completion's stream. The usage is in the last one, which has no pieces, where it was asked for."""

    object: Literal["text_completion"]
    choices: list[TextPiece]
    usage: Usage | None = None


class Model(Reply):
    """The base, or an adapter, whose parent is the base."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None = None
    """Of the base: the longest sequence of prompt and answer, in tokens."""
    max_tokens: int | None = None
    """Of the base: the longest answer that may be asked for, in tokens."""
    chat: bool | None = None
    """Of the base: whether it has a chat template."""
    rank: int | None = None
    """Of an adapter."""


class ModelList(Reply):
    """The base, then its adapters."""

    object: Literal["list"]
    data: list[Model]


class NumberedAdapter(Reply):
    """An adapter, with the number that `lora` may use."""

    id: int
    name: str
    path: str
    scale: float


class AdapterCard(Reply):
    """What an adapter's files tell; `rank`, `alpha` and `base` are as its config has them."""

    number: int
    name: str
    path: str
    rank: Any
    targets: list[str]
    bytes: int
    created: int
    in_memory: bool
    base: Any
    alpha: Any
    training: dict[str, Any] | None


class Status(Reply):
    """The server's state in a word."""

    status: Literal["ok", "ready"]


class Version(Reply):
    """The version of deltaw."""

    version: str


def json(model: Any, description: str = "Successful Response") -> dict[int | str, dict[str, Any]]:
    """That a route answers with this."""
    return {200: {"model": model, "description": description}}


def json_or_events(model: type[Reply], event: type[Reply]) -> dict[int | str, dict[str, Any]]:
    """That a route answers with one, or with a stream of the other."""
    told = f"An answer, or with `stream` server-sent events, each with a {event.__name__}, and at last [DONE]."
    return {200: {"model": model, "content": {"application/json": {}, "text/event-stream": {}}, "description": told}}


def events() -> dict[str, Any]:
    """The schemas of what streams hold, which no route names as its answer."""
    template = "#/components/schemas/{model}"
    _, told = models_json_schema([(ChatChunk, "serialization"), (CompletionChunk, "serialization")],
                                 ref_template=template)
    found: dict[str, Any] = told["$defs"]
    return found
