"""The chat template's hash, rendering and mismatch sentence."""

from __future__ import annotations

import hashlib

import pytest

from deltaw.bases import describe_mismatch, render, require_template, template_hash, tokenizer_hash
from deltaw.errors import BaseModelError, DataError
from tests.bases.tiny import CHATML, tokenizer

TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]


def test_the_hash_is_of_the_template_text():
    assert template_hash(tokenizer()) == hashlib.sha256(CHATML.encode()).hexdigest()
    assert template_hash(tokenizer(None)) is None


def test_the_tokenizer_hash_sees_vocabulary_and_roles_and_not_padding():
    first, second = tokenizer(), tokenizer()
    second.pad_token = "<|im_end|>"
    assert tokenizer_hash(first) == tokenizer_hash(second)
    second.eos_token = "world"
    assert tokenizer_hash(first) != tokenizer_hash(second)
    third = tokenizer()
    third.add_tokens(["extra"])
    assert tokenizer_hash(first) != tokenizer_hash(third)


def test_render_follows_the_template():
    shown = "<|im_start|>user\nhello<|im_end|>\n"
    assert render(tokenizer(), TALK[:1], True) == shown + "<|im_start|>assistant\n"
    assert render(tokenizer(), TALK, False) == shown + "<|im_start|>assistant\nworld<|im_end|>\n"


def test_a_template_that_refuses_is_a_data_error_with_its_words():
    strict = tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="roles must alternate"):
        render(strict, TALK, False)


def test_no_template_says_what_to_do():
    with pytest.raises(BaseModelError, match=r"base 'plain': has no chat template.*prompt \+ completion"):
        require_template(tokenizer(None), source="plain")
    require_template(tokenizer())


@pytest.mark.parametrize(("recorded", "current", "says"), [
    ("a" * 64, "b" * 64, "another chat template"), (None, "b" * 64, "without a chat template"),
    ("a" * 64, None, "this tokenizer has none"),
])
def test_a_mismatch_is_described(recorded, current, says):
    assert says in str(describe_mismatch(recorded, current))


def test_no_mismatch_is_none():
    assert describe_mismatch(None, None) is None
    assert describe_mismatch("a" * 64, "a" * 64) is None
