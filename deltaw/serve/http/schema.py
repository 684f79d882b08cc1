"""What requests may hold, in OpenAI's and vLLM's names. Unknown fields are refused, but for those that only inform."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from deltaw.serve.request import MAX_LOGPROBS, MAX_SEED, MAX_STOPS

Text = Annotated[str, Field(max_length=1_000_000)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Token = Annotated[StrictInt, Field(ge=0)]


class Strict(BaseModel):
    """A body whose unknown fields are an error, for a misspelt option would be ignored in silence."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    """What a stream holds beside the text."""

    include_usage: bool = False


class LoraScale(Strict):
    """One part of a blend: an adapter by name, or by its number in /lora-adapters, and its weight."""

    id: str | Annotated[StrictInt, Field(ge=0)]
    scale: float = Field(1.0, ge=-100, le=100)


Nothing = Annotated[list[Any], Field(max_length=0)]


class PlainFormat(Strict):
    """The form of an answer: text."""

    type: Literal["text"]


class Neutral(Strict):
    """Fields of OpenAI's that clients send though they ask for nothing: accepted with the value that does nothing."""

    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class Generation(Neutral):
    """What requests for text have in common."""

    model: Annotated[str, Field(min_length=1, max_length=200)]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: StrictInt | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: StrictInt | None = Field(None, ge=-MAX_SEED, lt=MAX_SEED)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    n: StrictInt = Field(1, ge=1, le=64)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    lora: Annotated[list[LoraScale], Field(max_length=16)] | None = None


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="ignore")  # clients send back what they got, with fields of OpenAI's own

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """The turn as a chat template takes it."""
        content = self.content
        text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: StrictInt | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: PlainFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        """How many alternatives to tell; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted_tokens(self) -> int | None:
        """The longest answer that was asked for."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: (Text | Annotated[list[Token], Field(min_length=1)]
             | Annotated[list[Text], Field(min_length=1, max_length=64)]
             | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=64)])
    logprobs: StrictInt | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    best_of: Annotated[StrictInt, Field(ge=1, le=1)] | None = None
    suffix: Literal[""] | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        """How many alternatives to tell; None for no log-probabilities."""
        return self.logprobs

    @property
    def wanted_tokens(self) -> int | None:
        """The longest answer that was asked for; OpenAI's default is 16."""
        return self.max_tokens or 16


class LoadAdapter(Strict):
    """POST /v1/load_lora_adapter."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadAdapter(Strict):
    """POST /v1/unload_lora_adapter."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_int_id: int | None = None
