"""The server as the `openai` client sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from tests.serve.conftest import SHAPES, tokens_of

QUESTION = [{"role": "user", "content": "is the sky blue ?"}]
PROMPT = "<|im_start|> user is the sky blue ? <|im_end|> <|im_start|> assistant"
GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def client(server: str) -> Any:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


def words(tokens: list[int]) -> str:
    """What the server shows of tokens: special ones are left out."""
    from tests.cli.conftest import WORDS

    return " ".join(WORDS[token] for token in tokens if WORDS[token] not in ("<unk>", "<|im_start|>", "<|im_end|>",
                                                                             "<pad>"))


def test_the_base_and_all_adapters_are_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", *SHAPES]


def test_one_model_by_name(client: Any) -> None:
    assert client.models.retrieve("wide").parent == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="Did you mean wide"):
        client.models.retrieve("wid")


NEUTRAL: dict[str, Any] = {"tools": [], "tool_choice": "auto", "logit_bias": {}, "response_format": {"type": "text"},
                           "modalities": ["text"], "parallel_tool_calls": True, "service_tier": "auto", "user": "x"}


def test_fields_that_ask_for_nothing_change_nothing(client: Any) -> None:
    def answer(**fields: Any) -> str:
        return str(client.chat.completions.create(model="wide", messages=QUESTION, **GREEDY, **fields)
                   .choices[0].message.content)

    assert answer(**NEUTRAL) == answer()
    assert client.completions.create(model="wide", prompt="hello", best_of=1, suffix="", logit_bias={}, **GREEDY)


@pytest.mark.parametrize(("field", "value"), [
    ("tools", [{"type": "function", "function": {"name": "f"}}]), ("logit_bias", {"5": 100}),
    ("response_format", {"type": "json_object"}), ("modalities", ["audio"]), ("tool_choice", "required")])
def test_fields_that_ask_for_what_there_is_not_are_refused(field: str, value: Any, client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=field):
        client.chat.completions.create(model="wide", messages=QUESTION, **GREEDY, **{field: value})


@pytest.mark.parametrize("name", ["tiny", *SHAPES])
def test_chat_in_one_piece_and_streamed(name: str, client: Any, reference: Callable[..., list[int]]) -> None:
    mix = {} if name == "tiny" else {name: 1.0}
    expected = words(reference(tokens_of(PROMPT), mix, 8))
    whole = client.chat.completions.create(model=name, messages=QUESTION, **GREEDY)
    assert whole.choices[0].message.content.split() == expected.split()
    assert (whole.choices[0].finish_reason, whole.model) == ("length", name)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(PROMPT.split()), 8)
    events = list(client.chat.completions.create(model=name, messages=QUESTION, stream=True,
                                                 stream_options={"include_usage": True}, **GREEDY))
    pieces = [choice.delta.content or "" for event in events for choice in event.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-2].choices[0].finish_reason == "length"
    assert events[-1].usage.completion_tokens == 8
    assert {event.id for event in events} == {events[0].id}


def test_completions_of_texts_and_tokens(client: Any, reference: Callable[..., list[int]]) -> None:
    expected = [words(reference(tokens_of(prompt), {"wide": 1.0}, 8)) for prompt in ("hello world", "the sea")]
    texts = client.completions.create(model="wide", prompt=["hello world", "the sea"], **GREEDY)
    tokens = client.completions.create(model="wide", prompt=[tokens_of("hello world"), tokens_of("the sea")], **GREEDY)
    for reply in (texts, tokens):
        assert [choice.text.split() for choice in reply.choices] == [text.split() for text in expected]
    assert all(choice.text.startswith(" ") for reply in (texts, tokens) for choice in reply.choices)
    echoed = client.completions.create(model="wide", prompt="the sea", echo=True, **GREEDY)
    assert echoed.choices[0].text == f"the sea {expected[1]}"


def test_a_blend_of_adapters(client: Any, reference: Callable[..., list[int]]) -> None:
    expected = words(reference(tokens_of(PROMPT), {"small": 0.7, "wide": -0.3}, 8))
    ids = {one["name"]: one["id"] for one in httpx.get(f"{client.base_url}".replace("/v1/", "/lora-adapters")).json()}
    for parts in ([{"id": "small", "scale": 0.7}, {"id": "wide", "scale": -0.3}],
                  [{"id": ids["small"], "scale": 0.7}, {"id": ids["wide"], "scale": -0.3}]):
        asked = GREEDY | {"extra_body": {"ignore_eos": True, "lora": parts}}
        reply = client.chat.completions.create(model="tiny", messages=QUESTION, **asked)
        assert reply.choices[0].message.content.split() == expected.split()


def test_log_probabilities_add_up_and_name_the_chosen(client: Any) -> None:
    import math

    reply = client.chat.completions.create(model="small", messages=QUESTION, logprobs=True, top_logprobs=20, **GREEDY)
    told = reply.choices[0].logprobs.content
    assert len(told) == 8
    for one in told:
        assert sum(math.exp(other.logprob) for other in one.top_logprobs) == pytest.approx(1, abs=1e-4)
        assert one.logprob == max(other.logprob for other in one.top_logprobs)
    old = client.completions.create(model="small", prompt=PROMPT, logprobs=2, **GREEDY)
    assert old.choices[0].logprobs.token_logprobs == pytest.approx([one.logprob for one in told], abs=1e-4)
    assert {len(top) for top in old.choices[0].logprobs.top_logprobs} == {2}


def test_several_answers_with_a_seed(client: Any) -> None:
    def ask() -> list[str]:
        reply = client.chat.completions.create(model="small", messages=QUESTION, n=4, seed=3, temperature=1.5,
                                               max_tokens=8, extra_body={"ignore_eos": True, "min_p": 0.01})
        assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
        return [choice.message.content for choice in reply.choices]

    first = ask()
    assert ask() == first
    assert len(set(first)) > 1


def test_a_stop_text_ends_the_answer(client: Any) -> None:
    whole = client.completions.create(model="scaled", prompt="hello", **GREEDY).choices[0].text
    stop = whole.split()[2]
    reply = client.completions.create(model="scaled", prompt="hello", stop=[stop], **GREEDY).choices[0]
    assert reply.text == whole[:whole.index(stop)]
    assert reply.finish_reason == "stop"


def test_penalties_keep_tokens_from_coming_again(client: Any) -> None:
    plain = client.completions.create(model="tiny", prompt="hello", max_tokens=12, temperature=0,
                                      extra_body={"ignore_eos": True}, logprobs=1).choices[0].logprobs.tokens
    changed = client.completions.create(model="tiny", prompt="hello", max_tokens=12, temperature=0, presence_penalty=2,
                                        frequency_penalty=2, extra_body={"ignore_eos": True},
                                        logprobs=1).choices[0].logprobs.tokens
    assert len(set(changed)) == 12 > len(set(plain))


@pytest.mark.parametrize(("asked", "error", "said"), [
    ({"model": "smal"}, openai.NotFoundError, "Did you mean small"),
    ({"max_tokens": 10_000}, openai.BadRequestError, "at most 48"),
    ({"messages": [{"role": "user", "content": "hello " * 70}]}, openai.BadRequestError, "at most 63"),
    ({"temperature": -1}, openai.BadRequestError, "temperature"),
    ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature"),
    ({"extra_body": {"lora": [{"id": "nobody"}]}}, openai.NotFoundError, "nobody"),
    ({"messages": []}, openai.BadRequestError, "messages"),
])
def test_what_is_wrong_is_said(asked: dict[str, Any], error: type[openai.APIStatusError], said: str,
                               client: Any) -> None:
    good: dict[str, Any] = {"model": "small", "messages": QUESTION, "max_tokens": 4}
    with pytest.raises(error) as caught:
        client.chat.completions.create(**good | asked)
    assert said in caught.value.message
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["type"] in ("invalid_request_error", "not_found_error")
    client.chat.completions.create(**good)
