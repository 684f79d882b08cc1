"""Ollama's Modelfile: the chat template in Go's form, run here by a small reader of the few actions it has."""

from __future__ import annotations

import re
from typing import Any

import pytest

from deltaw.convert import modelfile

CHATML = ("{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
          "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
          "{{ m['content'] }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
          "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
PLAIN = ("{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n\n{% elif m['role'] == 'user' %}"
         "USER: {{ m['content'] }}\n{% else %}ASSISTANT: {{ m['content'] }}</s>\n{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}ASSISTANT: {% endif %}")
COUNTING = "{% for m in messages %}{{ loop.index }}: {{ m['role'] }} {{ m['content'] }}\n{% endfor %}"
BRACED = CHATML.replace("<|im_start|>", "{{ '{{' }}")
TALK = [{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]


def tokenizer(template: str | None) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if template is not None and "bos_token" in template:
        from tokenizers import processors

        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


def run_go(template: str, messages: list[dict[str, str]]) -> str:
    """What a Go template of one range over `.Messages` with a branch by role gives."""
    found = re.fullmatch(r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.DOTALL)
    assert found is not None
    pieces = re.split(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', found[1])
    branches = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    return "".join(branches[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages) + found[2]


@pytest.mark.parametrize(("template", "system"), [(CHATML, "Be kind."), (LLAMA3, None), (PLAIN, None)])
def test_the_go_template_gives_what_the_chat_template_gives(template: str, system: str | None) -> None:
    source = tokenizer(template)
    text = modelfile(source, base="m.gguf", adapter="a.gguf")
    assert text.startswith("FROM ./m.gguf\nADAPTER ./a.gguf\n")
    found = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    assert found is not None
    expected = source.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert run_go(found[1], TALK) == expected.removeprefix("<s>")  # Ollama begins the text itself
    stated = re.search(r'SYSTEM """(.*?)"""', text, re.DOTALL)
    assert (None if stated is None else stated[1]) == system
    assert 'PARAMETER stop "</s>"' in text


def test_stops_are_the_ends_of_a_turn() -> None:
    text = modelfile(tokenizer(CHATML), base="/models/m.gguf")
    assert text.startswith("FROM /models/m.gguf\nTEMPLATE")
    assert text.endswith('PARAMETER stop "</s>"\nPARAMETER stop "<|im_end|>"\n')


@pytest.mark.parametrize("template", [COUNTING, BRACED, None, "{{ raise_exception('no') }}"])
def test_a_template_that_is_more_than_pieces_is_left_to_the_file(template: str | None) -> None:
    text = modelfile(tokenizer(template), base="m.gguf")
    assert "TEMPLATE" not in text
    assert "# The chat template cannot be written" in text
