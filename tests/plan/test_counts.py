"""Counts equal what is really there: an attached adapter's tensors, a module's parameters, the papers' figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import deltaw
from deltaw.core import LoraConfig
from deltaw.plan import PlanConfig, counts, plan
from deltaw.plan.counts import Dimensions
from deltaw.plan.shapes import read_shapes


class Zoo(nn.Module):
    """Every kind of layer that a change may go to."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = nn.Embedding(31, 12)
        self.fused = Conv1D(36, 12)
        self.attention = nn.MultiheadAttention(12, 3)
        self.linear = nn.Linear(12, 20)
        self.conv = nn.Conv2d(6, 8, 3, groups=2)
        self.experts = nn.Parameter(torch.randn(4, 10, 12))
        self.head = nn.Linear(20, 5)


CASES = {
    "linear": {"target_modules": ["linear"]}, "embedding": {"target_modules": ["embed"]},
    "conv": {"target_modules": ["conv"]}, "fused": {"target_modules": ["fused"]},
    "slices": {"target_modules": ["fused"], "target_slices": {"fused": "q-v"}},
    "attention": {"target_modules": ["attention"]}, "experts": {"target_modules": [], "target_parameters": ["experts"]},
    "biases": {"target_modules": ["linear", "attention"], "bias": "all"},
    "saved": {"target_modules": ["linear"], "modules_to_save": ["head"]},
    "pattern": {"target_modules": ["linear", "conv"], "rank_pattern": {"conv": 2}},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_count_without_values_equals_an_attached_adapters_tensors(case: str, rank: int) -> None:
    lora = LoraConfig(r=rank, **CASES[case])  # type: ignore[arg-type]
    with torch.device("meta"):
        planned = {t.site.name: t.parameters for t in counts.low_rank(Zoo(), lora, "causal-lm")}
    board = deltaw.attach(Zoo(), lora)
    real = board.parameters("default")
    assert sum(planned.values()) == sum(p.numel() for p in real.values())
    assert sum(planned.values()) == sum(t.numel() for site in board.adapter("default").sites.values()
                                        for t in site.tensors.values())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_the_plan_of_a_folder_counts_what_training_would(kind: str, tmp_path: Any, request: pytest.FixtureRequest,
                                                         ) -> None:
    name = {"bert": "tiny_bert_classifier"}.get(kind, f"tiny_{kind}")
    model = request.getfixturevalue(name)()
    model.save_pretrained(tmp_path)
    task = "seq-cls" if kind == "bert" else "causal-lm"
    found = plan(PlanConfig(model=str(tmp_path), task=task, num_labels=3, batch_size=2, max_length=8,  # type: ignore[arg-type]
                            methods=("full", "bitfit", "lora"), device="t4", lora=LoraConfig(r=4)), search=False)
    parameters = dict(model.named_parameters())
    assert found.parameters == found["full"].parameters == sum(p.numel() for p in parameters.values())
    bias_or_head = [p for n, p in parameters.items() if n.endswith("bias") or n.startswith("classifier.")]
    assert found["bitfit"].parameters == sum(p.numel() for p in bias_or_head)
    board = deltaw.attach(model, LoraConfig(r=4, task_type="SEQ_CLS" if kind == "bert" else "CAUSAL_LM"))
    assert found["lora"].parameters == sum(p.numel() for p in board.parameters("default").values())


class Bottleneck(nn.Module):
    """Houlsby et al., figure 2."""

    def __init__(self, width: int, inner: int, norm: bool = False) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width) if norm else None


def size(*modules: nn.Module) -> int:
    return sum(p.numel() for m in modules for p in m.parameters())


def test_closed_forms_equal_real_modules() -> None:
    dims, m, n = Dimensions(width=24, layers=5, keys=8), 7, 9
    assert counts.houlsby(dims, m) == size(*(Bottleneck(24, m) for _ in range(10)))
    assert counts.pfeiffer(dims, m) == size(*(Bottleneck(24, m) for _ in range(5)))
    assert counts.lin(dims, m) == size(*(Bottleneck(24, m, norm=True) for _ in range(5)))
    assert counts.prompt(dims, n) == size(nn.Embedding(n, 24))
    assert counts.prelayer(dims, n) == size(*(nn.Embedding(n, 24) for _ in range(5)))
    assert counts.prefix(dims, n) == size(*(nn.Embedding(n, 8) for _ in range(10)))


@pytest.mark.parametrize(("model", "millions"), [
    ("gpt2", 124.44), ("gpt2-medium", 354.82), ("gpt2-large", 774.03), ("llama-7b", 6738.42), ("llama-65b", 65285.66),
    ("llama3-8b", 8030.26), ("smollm2-135m", 134.52),
])
def test_published_shapes_have_their_published_sizes(model: str, millions: float) -> None:
    """From the models' cards."""
    network = read_shapes(model).skeleton("causal-lm", torch.float32)
    assert counts.full(network) == pytest.approx(millions * 1e6, abs=6e3)
