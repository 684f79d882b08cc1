"""Checkpoints of GPTQ, AWQ and compressed-tensors become plain layers with the numbers that their codes stand for."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deltaw
from deltaw.bases import load_base
from deltaw.bases.unpacked import unpack
from deltaw.errors import BaseModelError, TargetError
from tests.bases.test_quantize import llama, write

GROUP, ZERO = 64, 8
PACKAGES = {"gptq": "gptqmodel", "awq": "gptqmodel", "compressed-tensors": "compressed_tensors"}
SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "checkpoint_format": "gptq"},
    "awq": {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "compressed-tensors": {
        "format": "pack-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}}}},
}


class Codes(nn.Module):
    """A linear layer as quantizers have it: codes, scales and a bias that a kernel of its own reads."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("codes", torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(outputs, 1))
        self.register_buffer("bias", torch.randn(outputs) if bias else None)

    def forward(self, x_BI: Tensor) -> Tensor:
        y_BO = x_BI @ (self.codes * self.scales).to(x_BI.dtype).t()
        return y_BO if self.bias is None else y_BO + self.bias


def network(bias: bool) -> nn.Module:
    model = nn.Sequential(Codes(700, 5, bias), nn.Sequential(Codes(5, 3, bias)))
    model.config = SimpleNamespace()  # type: ignore[assignment]
    model.hf_quantizer = SimpleNamespace(remove_quantization_config=lambda model: None)  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_of_codes_becomes_the_matrix_that_it_multiplies_by(bias: bool) -> None:
    model, x_BI = network(bias), torch.randn(4, 700)
    first = model[0]
    expected_OI, before = first.codes * first.scales, model(x_BI)  # type: ignore[operator]
    unpack(model, "gptq", torch.float32)
    assert [type(m) for m in model.modules() if not list(m.children())] == [nn.Linear, nn.Linear]
    assert torch.equal(model[0].weight, expected_OI)
    torch.testing.assert_close(model(x_BI), before)
    assert not any(p.requires_grad for p in model.parameters())


def test_codes_that_nobody_unpacks_are_named_with_a_remedy() -> None:
    with pytest.raises(TargetError, match=r"linear layers \(Codes\).*quantizer's codes.*quantize='nf4'"):
        deltaw.attach(network(bias=False), deltaw.LoraConfig())


def packed_4bit(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight codes of a row in each 32 bits."""
    eights = codes.reshape(codes.shape[0], -1, 8)[..., list(order)].to(torch.int64)
    whole = (eights << (4 * torch.arange(8))).sum(-1)
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(torch.int32)


def tensors(method: str, codes_OI: Tensor, scales_OG: Tensor) -> dict[str, Tensor]:
    """A layer's tensors as the format has them, of codes 0..15 with zero at 8."""
    zeros_GO = torch.full((scales_OG.shape[1], codes_OI.shape[0]), ZERO)
    if method == "gptq":  # packed along the inputs; zeros are stored less one
        return {"qweight": packed_4bit(codes_OI).t().contiguous(), "qzeros": packed_4bit(zeros_GO - 1),
                "scales": scales_OG.t().contiguous(), "g_idx": (torch.arange(codes_OI.shape[1]) // GROUP).int()}
    if method == "awq":  # packed along the outputs, in the order of its kernel
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {"qweight": packed_4bit(codes_OI.t(), order), "qzeros": packed_4bit(zeros_GO, order),
                "scales": scales_OG.t().contiguous()}
    return {"weight_packed": packed_4bit(codes_OI), "weight_scale": scales_OG,
            "weight_shape": torch.tensor(codes_OI.shape)}


def quantized(folder: Path, method: str) -> dict[str, Tensor]:
    """Write a checkpoint of this method; the weights that its codes stand for, by layer."""
    write(folder, llama(hidden_size=128, intermediate_size=256))
    state, expected = load_file(folder / "model.safetensors"), {}
    for name in [n for n in state if n.endswith("_proj.weight")]:
        W_OI, layer = state.pop(name), name.removesuffix(".weight")
        codes_OI = torch.randint(0, 16, W_OI.shape)
        scales_OG = (torch.rand(W_OI.shape[0], W_OI.shape[1] // GROUP) * 0.01 + 0.001).half()
        expected[layer] = (codes_OI - ZERO) * scales_OG.float().repeat_interleave(GROUP, 1)
        state |= {f"{layer}.{part}": tensor for part, tensor in tensors(method, codes_OI, scales_OG).items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **SETTINGS[method]}
    (folder / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.filterwarnings("default")  # of these packages
@pytest.mark.parametrize("method", SETTINGS)
def test_a_packed_checkpoint_is_trained_on(method: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(PACKAGES[method]) is None:
        pytest.skip(f"{PACKAGES[method]} is not installed")
    expected = quantized(tmp_path / "base", method)
    base = load_base(str(tmp_path / "base"), dtype="fp32")
    assert base.quantized is None
    assert f"unpacked from its {method} codes" in base.precision
    for name, W_OI in expected.items():  # kernels read numbers of 16 bits
        torch.testing.assert_close(base.model.get_submodule(name).weight.detach(), W_OI, rtol=1e-3, atol=0)
    board = deltaw.attach(base.model, deltaw.LoraConfig(r=2), seed=0)
    values = board.parameters("default")
    assert len(values) == 2 * len(expected)
    optimizer = torch.optim.AdamW(values.values(), lr=1e-2)
    ids, losses = torch.randint(3, 30, (2, 16)), []
    for _ in range(3):
        loss = base.model(input_ids=ids, labels=ids).loss
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[1] < losses[0]
    board.adapter("default").save(tmp_path / "adapter")
    before = expected["model.layers.0.self_attn.q_proj"], base.model.model.layers[0].self_attn.q_proj
    board.merge("default")
    board.unmerge()
    board.remove("default")
    torch.testing.assert_close(before[1].weight.detach(), before[0], rtol=1e-3, atol=0)
    with pytest.raises(BaseModelError, match=rf"is quantized \({method}\).*before quantization"):
        deltaw.merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
