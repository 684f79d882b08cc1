"""What a study learns from its base in shapes alone: what fits a budget, what does not apply, what is a head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from deltaw.baselines.config import OPTIONS
from deltaw.compare.arms import arms_of_comparison, arms_of_sweep
from deltaw.compare.base import ranks_in_budget, unsuited_arms, values_of_body
from deltaw.compare.config import CompareConfig, SweepConfig
from deltaw.errors import ConfigError
from deltaw.train.config import TrainConfig
from deltaw.train.examples import open_base
from tests.cli.conftest import write_base


def test_ranks_in_a_budget_are_the_largest_that_fit(tmp_path: Path) -> None:
    write_base(tmp_path / "base")  # 2 layers of width 32, keys and values of 16
    train = TrainConfig(model=str(tmp_path / "base"), data="d", out="o")
    config, base = SweepConfig(train=train, targets=("q_proj", "q_proj+v_proj"), budget=1000), open_base(train)
    # Σ (I + O): q 2·(32 + 32) = 128 at each rank, with v 2·(32 + 16) more.
    assert ranks_in_budget(config, base) == {"q_proj": 1000 // 128, "q_proj+v_proj": 1000 // 224}
    with pytest.raises(ConfigError, match="224 values at rank 1"):
        ranks_in_budget(SweepConfig(train=train, targets=("q_proj", "q_proj+v_proj"), budget=200), base)
    with pytest.raises(ConfigError, match=r"2 faults(.|\n)*Did you mean q_proj(.|\n)*224 values at rank 1"):
        ranks_in_budget(replace(config, targets=("q_porj", "q_proj+v_proj"), budget=200), base)


def test_what_has_nothing_to_apply_to_is_found_on_shapes_and_misspelt_targets_are_refused(tmp_path: Path) -> None:
    write_base(tmp_path / "base")  # a Llama of 2 layers: no biases
    train = TrainConfig(model=str(tmp_path / "base"), data="d", out="o")
    config, base = CompareConfig(train=train, methods=tuple(OPTIONS), arms={"top": {"method": "ft-top-k",
                                 "baseline": {"top_layers": 3}}}), open_base(train)
    before = sorted(name for name, _ in base.model.named_parameters())
    found = unsuited_arms(train, arms_of_comparison(config), base)
    assert set(found) == {"bitfit", "adapter-d", "top"}
    assert "has no bias vectors" in found["bitfit"]
    assert sorted(name for name, _ in base.model.named_parameters()) == before
    swept = SweepConfig(train=train, ranks=(1,), targets=("q_porj", "q_proj"))
    with pytest.raises(ConfigError, match=r"arm 'q_porj r=1': (.|\n)*Did you mean q_proj"):
        unsuited_arms(train, arms_of_sweep(swept), base)


def test_a_classifiers_values_without_its_head_are_those_of_its_body() -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
             "vocab_size": 30}
    with torch.device("meta"):
        bert = BertForSequenceClassification(BertConfig(**small, num_labels=5))
        llama = LlamaForSequenceClassification(LlamaConfig(**small, num_labels=5, pad_token_id=0))
    for model, head in ((bert, 5 * 16 + 5), (llama, 5 * 16)):  # a Llama's has no bias
        base = SimpleNamespace(model=model)
        assert values_of_body(base, "seq-cls") == sum(p.numel() for p in model.parameters()) - head  # type: ignore
        assert values_of_body(base, "causal-lm") is None  # type: ignore[arg-type]
