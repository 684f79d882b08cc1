"""Heads are found by structure, whatever they are called."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import (
    BertForSequenceClassification,
    BertModel,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from deltaw.bases import head_modules
from tests.bases.tiny import bert_config, llama


def test_known_classifiers():
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    assert head_modules(LlamaForSequenceClassification(llama().config)) == ("score",)
    assert head_modules(BertForSequenceClassification(bert_config())) == ("classifier",)
    assert head_modules(RobertaForSequenceClassification(RobertaConfig(vocab_size=32, **small))) == ("classifier",)


def test_a_tied_output_layer_is_no_head_and_an_untied_one_is():
    assert head_modules(llama(tie_word_embeddings=True)) == ()
    assert head_modules(llama(tie_word_embeddings=False)) == ("lm_head",)


def test_a_bare_base_has_none():
    assert head_modules(BertModel(bert_config())) == ()


@pytest.mark.parametrize("name", ["score", "lora_head", "odd_name"])
def test_the_name_does_not_matter_and_the_base_may_lie_deep(name):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Module()
            self.inner.body = nn.Linear(3, 3)
            self.inner.add_module(name, nn.Linear(3, 2))
            self.dropout = nn.Dropout()

        @property
        def base_model(self):
            return self.inner.body

    assert head_modules(Wrapped()) == (f"inner.{name}",)
