"""Every method on every family: what is trained, what is left alone, and that all of it can be undone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from deltaw.baselines import METHODS, BaselineConfig
from deltaw.baselines.config import OPTIONS as TAKEN
from deltaw.errors import ConfigError, TargetError
from deltaw.inject.blocks import find_blocks
from deltaw.train.doctor import Doctor
from deltaw.train.loop import fit
from deltaw.train.objective import objective_for
from deltaw.train.optimizer import adamw
from deltaw.train.state import Pace
from tests.baselines.conftest import DECODERS, ENCODERS, FAST, OPTIONS, families

FAMILIES = DECODERS + ENCODERS
NOT_THERE = {("bitfit", family) for family in ("llama", "qwen3", "gemma2", "gemma3", "phi3")} | {
    ("head", family) for family in ("gemma2", "gemma3", "gpt2", "opt")}
ALSO_FAST = {("preembed", "opt"), ("adapter-h", "phi3"), ("lora", "deberta-v1")}
"""The decoder is inside the body; attention's widest layer comes last; an output is changed in place."""
CASES = [pytest.param(method, family, marks=() if family in FAST or (method, family) in ALSO_FAST else pytest.mark.slow)
         for method in TAKEN for family in FAMILIES if (method, family) not in NOT_THERE]


def put_on(method: str, model: nn.Module, **options: Any) -> Any:
    return METHODS[method](model, BaselineConfig(**{**OPTIONS.get(method, {}), **options}), 3)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


@pytest.mark.parametrize(("method", "family"), CASES)
def test_a_method_trains_what_it_says_and_is_undone_to_the_bit(method: str, family: str, tiny: Callable[..., Any],
                                                               rows: dict[str, Any],
                                                               batches: Callable[[str], Any]) -> None:
    model = tiny(family)
    modules, before = [name for name, _ in model.named_modules()], bits(model)
    names, flags = list(before), [p.requires_grad for p in model.parameters()]
    base = model(**rows).logits
    tuned = put_on(method, model)
    doctor = Doctor(tuned, window=3)
    pace = Pace(steps=3, rate=lambda step: 1e-2)
    fit(tuned, objective_for("seq-cls" if family in ENCODERS else "causal-lm"), batches(family),
        adamw(tuned.parameters(), learning_rate=1e-2), pace, doctor=doctor)  # the doctor looks at gradients and base
    moved = model(**rows).logits
    assert not torch.equal(moved, base)
    with tuned.off():
        assert torch.equal(model(**rows).logits, base)
    assert torch.equal(model(**rows).logits, moved)
    assert tuned.count() == sum(value.numel() for part in tuned.parts for value in part.values().values())
    assert tuned.remove() is model
    assert torch.equal(model(**rows).logits, base)
    assert [name for name, _ in model.named_modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == flags
    after = bits(model)
    assert list(after) == names
    assert all(torch.equal(after[name], before[name]) for name in names)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", families(*ENCODERS))
def test_a_new_head_is_trained_with_every_method_and_not_counted_as_its_own(family: str,
                                                                            tiny: Callable[..., Any]) -> None:
    heads = [module for name, module in tiny(family).named_children() if name in ("classifier", "pooler")]
    head = sum(p.numel() for module in heads for p in module.parameters())
    for method in set(TAKEN) - {"subspace", "lora+pe", "lora+pl"}:
        tuned = put_on(method, tiny(family))
        assert tuned.count() - tuned.count(head=False) == head, method


@pytest.mark.parametrize(("method", "family"), sorted(NOT_THERE))
def test_what_a_model_lacks_is_told_before_anything_is_changed(method: str, family: str,
                                                               tiny: Callable[..., Any]) -> None:
    model = tiny(family)
    before = bits(model)
    with pytest.raises(TargetError, match=r"method (bitfit|head): \w+ has no"):
        put_on(method, model)
    assert all(p.requires_grad for p in model.parameters())
    assert list(bits(model)) == list(before)


def test_prompt_methods_need_attention_over_tokens() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=2, state_size=2))
    for method in ("preembed", "prelayer", "lora+pe", "lora+pl"):
        with pytest.raises(TargetError, match="has no attention over embedded tokens"):
            put_on(method, mamba)
    with pytest.raises(TargetError, match="is not a model of transformers"):
        put_on("preembed", nn.Linear(2, 2))
    for method in ("adapter-h", "ft-top-k"):
        with pytest.raises(TargetError, match=r"repeats no layer|at most the 0 layers"):
            put_on(method, nn.Linear(2, 2))


@pytest.mark.parametrize("family", ["deberta", "mpnet"])
def test_keys_and_values_of_the_past_need_a_network_that_takes_them(family: str, tiny: Callable[..., Any]) -> None:
    with pytest.raises(TargetError, match=r"takes no keys and values of the past.*prefix_form activations"):
        put_on("prelayer", tiny(family), prefix_form="past", infix_tokens=0)


def test_options_go_with_methods() -> None:
    with pytest.raises(ConfigError) as caught:
        METHODS["bitfit"](nn.Linear(2, 2), BaselineConfig(bottleneck=3, prefix_tokens=2))
    assert len(caught.value.faults) == 2
    assert "adapter-h, adapter-l" in str(caught.value)
    with pytest.raises(ConfigError, match="Did you mean bottleneck"):
        BaselineConfig.from_dict({"botleneck": 3})
    with pytest.raises(ConfigError, match="no infix with prefix_form past"):
        METHODS["prelayer"](nn.Linear(2, 2), BaselineConfig(prefix_form="past", infix_tokens=1))
    with pytest.raises(ConfigError, match="at least one token"):
        METHODS["preembed"](nn.Linear(2, 2), BaselineConfig(prefix_tokens=0))


def test_the_results_of_a_block_are_found_in_each_family(tiny: Callable[..., Any]) -> None:
    found = {family: find_blocks(tiny(family))[0] for family in FAMILIES}
    places = {family: (b.attention.name.partition(".0.")[2], b.mlp.name.partition(".0.")[2], b.mlp.norm_name[-9:])
              for family, b in found.items()}
    bert = ("attention.output.dropout", "output.dropout", "LayerNorm")
    assert places == {
        **dict.fromkeys(("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"), ("self_attn", "mlp", "")),
        "gpt2": ("attn", "mlp", ""), "opt": ("self_attn", "fc2", ""),
        **dict.fromkeys(("bert", "roberta", "deberta", "deberta-conv", "deberta-v1"), bert),
        "mpnet": ("attention.dropout", "output.dropout", "LayerNorm")}
    assert {b.width for b in found.values()} == {32}


def test_the_stream_is_as_wide_as_the_norms_and_not_as_what_attention_declares_last() -> None:
    import transformers as t

    with torch.device("meta"):
        phi3 = t.Phi3ForCausalLM(t.Phi3Config(num_hidden_layers=2))
    assert list(dict(phi3.model.layers[0].self_attn.named_children()))[-1] == "qkv_proj"
    assert {block.width for block in find_blocks(phi3)} == {3072}


@pytest.mark.parametrize("method", ["preembed", "prelayer", "lora+pl"])
def test_a_model_that_goes_round_its_body_is_refused(method: str, tiny: Callable[..., Any]) -> None:
    from transformers import LlamaForCausalLM

    class Round(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:  # type: ignore[override]
            return self.lm_head(self.model.norm(self.model.embed_tokens(input_ids)))

    model = Round(tiny("llama").config)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(TargetError, match="Round computes without calling its LlamaModel"):
        put_on(method, model)
    assert [name for name, _ in model.named_modules()] == names
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_forgetting_the_base_is_final(tiny: Callable[..., Any]) -> None:
    from deltaw.errors import StateError

    tuned = put_on("full", tiny("llama"))
    tuned.forget_base()
    with pytest.raises(StateError, match="forgotten"), tuned.off():
        pass
    with pytest.raises(StateError, match="forgotten"):
        tuned.remove()


def test_a_model_has_one_method_at_a_time(tiny: Callable[..., Any]) -> None:
    from deltaw.errors import StateError

    model = tiny("gpt2")
    tuned = put_on("bitfit", model)
    with pytest.raises(StateError, match=r"has method bitfit on it.*remove"):
        put_on("adapter-h", model)
    tuned.remove()
    put_on("adapter-h", model).remove()


def test_a_seed_decides_what_is_drawn(tiny: Callable[..., Any]) -> None:
    for method in ("adapter-h", "preembed", "prelayer", "lora"):
        one, same, other = (METHODS[method](tiny("llama"), BaselineConfig(**OPTIONS.get(method, {})), seed)
                            for seed in (1, 1, 2))
        assert all(torch.equal(a, b) for a, b in zip(one.values().values(), same.values().values(), strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(one.values().values(), other.values().values(), strict=True))


def test_a_model_of_any_kind_is_tuned_where_the_method_can_be(tiny: Callable[..., Any]) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    kept = copy.deepcopy(net)
    for method, count in (("full", 26), ("bitfit", 6), ("subspace", 9)):
        tuned = METHODS[method](net, BaselineConfig(**({"dimension": 9} if method == "subspace" else {})))
        assert tuned.count() == count
        net(torch.ones(1, 3)).sum().backward()
        assert all(p.grad is not None for p in tuned.parameters().values())
        tuned.remove()
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), kept.parameters(), strict=True))
