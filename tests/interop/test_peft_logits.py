"""Logits equal PEFT's own, both ways: its random adapters attached by us, and ours loaded by it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaw
from tests.laws.cases import BY_NAME, CASES, Case
from tests.laws.dense import error, fill

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Theirs:
    """A network of the laws with options for PEFT's config."""

    name: str
    case: str
    options: dict[str, Any]

    def model(self) -> nn.Module:
        """The network, always with the same weights."""
        return BY_NAME[self.case].model()


MLP = {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
MOE = ["experts.gate_up_proj", "experts.down_proj"]
FROM_PEFT = [
    Theirs("linear", "linear", {"target_modules": ["0", "2"]}),
    Theirs("rslora_patterns", "linear", {"target_modules": ["0", "2"], "use_rslora": True, "rank_pattern": {"0": 3},
                                         "alpha_pattern": {"2": 7}}),
    Theirs("dropout", "linear", {"target_modules": ["0"], "lora_dropout": 0.5}),
    Theirs("llama", "llama", {**MLP, "bias": "none"}),
    Theirs("llama_layers", "llama", {**MLP, "layers_to_transform": [1], "layers_pattern": "layers"}),
    Theirs("llama_tied_both", "llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    Theirs("llama_tied_head", "llama", {"target_modules": ["lm_head"]}),
    Theirs("llama_saved_norm", "llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    Theirs("gpt2", "gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "bias": "lora_only"}),
    Theirs("gpt2_all_biases", "gpt2", {"target_modules": ["c_fc"], "fan_in_fan_out": True, "bias": "all"}),
    Theirs("gpt2_embedding", "gpt2", {"target_modules": ["wte", "wpe"]}),
    Theirs("mixtral_experts", "mixtral", {"target_modules": ["q_proj"], "target_parameters": MOE}),
    Theirs("mixtral_router", "mixtral", {"target_modules": [], "target_parameters": [*MOE, "gate.weight"], "r": 3}),
    Theirs("experts", "experts", {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]}),
    Theirs("matrix", "parameter", {"target_modules": ["1"], "target_parameters": ["0.matrix"]}),
    Theirs("embedding_padded", "embedding_padded", {"target_modules": ["0", "1"]}),
    Theirs("embedding_scaled", "embedding_scaled", {"target_modules": ["0"]}),
    Theirs("conv1d", "conv1d", {"target_modules": ["0"]}),
    Theirs("conv2d_dilated", "conv2d", {"target_modules": ["0"]}),
    Theirs("conv2d_1x1", "conv2d_1x1", {"target_modules": ["0"]}),
    Theirs("conv2d_grouped", "conv2d_grouped", {"target_modules": ["0"], "r": 6}),
    Theirs("conv2d_depthwise", "conv2d_depthwise", {"target_modules": ["0"], "r": 4}),
    Theirs("conv3d", "conv3d", {"target_modules": ["0"]}),
    Theirs("mha", "mha_both", {"target_modules": ["attention"]}),
    Theirs("mha_seq_first", "mha_seq_first", {"target_modules": ["attention"]}),
    Theirs("saved_head_biases", "saved_head", {"target_modules": ["linear"], "modules_to_save": ["head"],
                                               "bias": "lora_only"}),
    Theirs("bias_all", "bias_all", {"target_modules": ["linear"], "bias": "all"}),
]


def in_peft(model: nn.Module, options: dict[str, Any]) -> Any:
    """PEFT's model with random factors, biases and saved modules moved off their start."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(**{"r": 2, "lora_alpha": 5, "init_lora_weights": False} | options))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return wrapped.eval()


MERGED_ONLY = {"conv1d_circular", "conv2d", "conv2d_same", "conv2d_replicate", "conv2d_self_padding"}
"""PEFT's forward leaves out the host's dilation, padding mode and own padding; its merged weights are right."""


def as_peft_means_it(model: Any, case: str) -> Any:
    """PEFT's model, merged where its own forward is not its own ΔW."""
    return model.merge_and_unload() if case in MERGED_ONLY else model


def compare(got: Tensor, expected: Tensor, plain: Tensor) -> None:
    """Equal within the tolerance, and not because nothing was changed."""
    assert error(got, expected) < TOLERANCE
    assert error(got, plain) > 100 * TOLERANCE


@pytest.mark.parametrize("theirs", FROM_PEFT, ids=lambda theirs: theirs.name)
def test_their_adapter_on_our_model(theirs: Theirs, tmp_path: Path) -> None:
    batch, plain = BY_NAME[theirs.case].batch(), theirs.model()
    source = in_peft(theirs.model(), theirs.options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source.save_pretrained(tmp_path)
    source = as_peft_means_it(source, theirs.case)
    model = theirs.model()
    board = deltaw.attach(model, deltaw.load(tmp_path), "theirs")
    with torch.no_grad():
        compare(model(*batch), source(*batch), plain(*batch))
        if "grouped" not in theirs.name and "depthwise" not in theirs.name:
            board.merge()
            compare(model(*batch), source(*batch), plain(*batch))
            board.unmerge()
        with board.route(["theirs", None, None, "theirs"]) if BY_NAME[theirs.case].routable else board.off():
            mixed = model(*batch)
    case = BY_NAME[theirs.case]
    assert error(*case.rows_of((mixed,), [1]), *case.rows_of((plain(*batch),), [1])) < TOLERANCE


NOT_IN_PEFT = {
    "mha_separate": "PEFT adapts only attention whose projections are one matrix",
    "conv2d_self_padding_grouped": "PEFT ignores the host's own padding, and cannot merge a grouped convolution",
    "recurrent": "PEFT's wrapper hides what nn.LSTM reads",
    "parameter_of_root": "PEFT adapts no parameter of the outermost module",
    "parameter_around": "PEFT adapts no parameter of the outermost module",
    "parameter_list": "PEFT adapts no parameter of a list",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_our_adapter_in_peft(case: Case, tmp_path: Path) -> None:
    from peft import PeftModel

    if case.name in NOT_IN_PEFT:
        pytest.skip(NOT_IN_PEFT[case.name])
    model, plain, batch = case.model(), case.model(), case.batch()
    board = deltaw.attach(model, case.lora(), "ours")
    fill(board, "ours", seed=3)
    adapter = board.adapter("ours")
    adapter.save(tmp_path)
    back = deltaw.load(tmp_path)
    assert list(back.sites) == list(adapter.sites)
    for site, delta in adapter.sites.items():
        assert all(torch.equal(t, back.sites[site].tensors[k]) for k, t in delta.tensors.items())
    again = deltaw.attach(case.model(), back, "again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = as_peft_means_it(PeftModel.from_pretrained(case.model(), tmp_path).eval(), case.name)
    with torch.no_grad():
        assert torch.equal(again.model(*batch), model(*batch))
        compare(loaded(*batch), model(*batch), plain(*batch))
