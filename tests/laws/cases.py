"""The table that the laws run over: one case for each way in which LoRA meets a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltaw import LoraConfig
from tests.device import DEVICE
from tests.laws import networks as net

ROWS = 4
IDS = 11
"""Ids that every network with an embedding knows."""


@dataclass(frozen=True)
class Case:
    """A network, what to change in it, and what to feed it: `inputs` are shapes of one row, () shapes are ids."""

    name: str
    build: Callable[[], nn.Module]
    config: Mapping[str, Any]
    inputs: tuple[tuple[int, ...], ...]
    ids: bool = False
    row_dim: int = 0
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    routable: bool = True
    beams: bool = True
    """Whether one name of a route may stand for several rows."""

    def lora(self, **changes: Any) -> LoraConfig:
        return LoraConfig(**{"r": 2, "lora_alpha": 3, "init_lora_weights": True, **self.config, **changes})

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network in eval mode, always with the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return self.build().to(DEVICE, dtype).eval()

    def batch(self, dtype: torch.dtype = torch.float32, *, rows: int = ROWS, seed: int = 1) -> tuple[Tensor, ...]:
        """Inputs for this many rows, always the same for a seed."""
        generator = torch.Generator().manual_seed(seed)
        if self.ids:
            return tuple(torch.randint(1, IDS, (rows, *shape), generator=generator).to(DEVICE) for shape in self.inputs)
        drawn = [torch.randn(rows, *shape, generator=generator).to(DEVICE, dtype) for shape in self.inputs]
        return tuple(x.movedim(0, self.row_dim) for x in drawn)

    def rows_of(self, tensors: tuple[Tensor, ...], rows: list[int]) -> tuple[Tensor, ...]:
        """These rows of a batch."""
        return tuple(t.index_select(self.row_dim, torch.tensor(rows, device=t.device)) for t in tensors)


def _chain(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(layer() for layer in layers))


def _linear(inputs: int, outputs: int, *, bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(inputs, outputs, bias=bias)


def _conv(name: str, kind: type, shape: tuple[int, ...], *sizes: int, r: int = 2, **options: Any) -> Case:
    return Case(name, _chain(lambda: kind(*sizes, **options)), {"target_modules": ["0"], "r": r}, (shape,))


def _attention(name: str, targets: list[str], *, batch_first: bool = True, **options: Any) -> Case:
    return Case(f"mha_{name}", lambda: net.SelfAttention(8, 2, batch_first=batch_first, **options),
                {"target_modules": targets}, ((5, 8),), row_dim=0 if batch_first else 1)


_TWO = _chain(_linear(6, 8), nn.GELU, _linear(8, 5))
_PARAMETERS: dict[str, Any] = {"target_modules": ()}

CASES = [
    Case("linear", _TWO, {"target_modules": "all-linear"}, ((6,),)),
    Case("linear_no_bias", _chain(_linear(7, 13, bias=False)), {"target_modules": ["0"], "r": 3}, ((3, 7),)),
    Case("linear_rank_1", _TWO, {"target_modules": ["0"], "r": 1}, ((2, 6),)),
    Case("linear_full_rank", _TWO, {"target_modules": ["0"], "r": 6}, ((6,),)),
    Case("linear_one_wide", _chain(_linear(5, 1)), {"target_modules": ["0"], "r": 1}, ((3, 5),)),
    Case("rslora_patterns", _TWO, {"use_rslora": True, "rank_pattern": {"0": 3}, "alpha_pattern": {"2": 7}}, ((6,),)),
    Case("conv1d_of_transformers", _chain(lambda: net.conv1d_of_transformers(6, 9)), {}, ((3, 6),)),
    Case("slice_of_linear", _chain(_linear(6, 12)), {"target_slices": {"0": "q-v"}}, ((3, 6),)),
    Case("slice_uneven", _chain(_linear(6, 12)), {"target_slices": {"0": [(1, 4), (5, 12)]}}, ((3, 6),)),
    Case("slice_of_conv1d", net.gpt2, {"target_modules": ["c_attn"], "target_slices": {"c_attn": "q-v"}}, ((5,),),
         ids=True),
    Case("embedding", _chain(lambda: nn.Embedding(11, 6)), {"target_modules": ["0"]}, ((3,),), ids=True),
    Case("embedding_padded", _chain(lambda: nn.Embedding(11, 6, padding_idx=3), _linear(6, 4)),
         {"target_modules": ["0", "1"]}, ((3,),), ids=True),
    Case("embedding_scaled", _chain(lambda: net.ScaledEmbedding(11, 6, 3.5)), {"target_modules": ["0"]}, ((3,),),
         ids=True),
    Case("embedding_of_positions", net.Positions, {"target_modules": ["positions", "embed"]}, ((3,),), ids=True,
         beams=False),
    _conv("conv1d", nn.Conv1d, (4, 9), 4, 6, 3),
    _conv("conv1d_circular", nn.Conv1d, (4, 9), 4, 6, 3, padding=2, padding_mode="circular"),
    _conv("conv2d", nn.Conv2d, (3, 7, 6), 3, 5, 3, stride=2, padding=1, dilation=2),
    _conv("conv2d_1x1", nn.Conv2d, (3, 4, 4), 3, 5, 1, bias=False),
    _conv("conv2d_same", nn.Conv2d, (3, 5, 5), 3, 4, 3, padding="same", padding_mode="reflect"),
    _conv("conv2d_replicate", nn.Conv2d, (3, 5, 5), 3, 4, 3, padding=1, padding_mode="replicate"),
    _conv("conv2d_grouped", nn.Conv2d, (6, 5, 5), 6, 9, 3, groups=3, padding=1, r=3),
    _conv("conv2d_depthwise", nn.Conv2d, (4, 5, 5), 4, 8, 3, groups=4, stride=2),
    _conv("conv2d_self_padding", net.SelfPadding, (3, 5, 5), 3, 4, 3),
    _conv("conv2d_self_padding_grouped", net.SelfPadding, (4, 5, 5), 4, 6, 3, stride=2, groups=2),
    _conv("conv3d", nn.Conv3d, (2, 4, 5, 4), 2, 4, 3, padding=1),
    _conv("conv3d_grouped", nn.Conv3d, (4, 4, 3, 4), 4, 4, 2, groups=2, r=1),
    _attention("both", ["attention"]),
    _attention("in", ["in_proj"], bias=False),
    _attention("out", ["out_proj"], batch_first=False),
    _attention("seq_first", ["attention"], batch_first=False),
    Case("mha_separate", lambda: net.CrossAttention(8, 2, 6, 4), {"target_modules": "all-linear"},
         ((3, 8), (5, 6), (5, 4))),
    Case("parameter", lambda: nn.Sequential(net.Matrix(6, 5), nn.Linear(5, 4)),
         {**_PARAMETERS, "target_parameters": ["matrix"], "bias": "all"}, ((6,),)),
    Case("parameter_of_root", lambda: net.Matrix(6, 5), {**_PARAMETERS, "target_parameters": ["matrix"]}, ((3, 6),)),
    Case("parameter_around", net.MatrixAround, {"target_modules": ["inside"], "target_parameters": ["matrix"]},
         ((3, 6),)),
    Case("parameter_list", net.ListOfMatrices, {**_PARAMETERS, "target_parameters": ["matrices.0", "1"]}, ((3, 6),)),
    Case("recurrent", net.Recurrent, {**_PARAMETERS, "target_parameters": ["weight_ih_l0", "weight_hh_l0"]}, ((4, 5),),
         dtypes=(torch.float32, torch.bfloat16), routable=False),
    Case("experts", lambda: net.Mixture(transposed=False),
         {**_PARAMETERS, "target_parameters": ["experts.up", "experts.down"]}, ((4, 6),)),
    Case("experts_transposed", lambda: net.Mixture(transposed=True),
         {"target_modules": ["out"], "target_parameters": ["up", "down"]}, ((4, 6),)),
    Case("mixtral", net.mixtral, {"target_modules": ["q_proj"], "target_parameters": [
        "experts.gate_up_proj", "experts.down_proj", "gate.weight"]}, ((5,),), ids=True, dtypes=(torch.float32,)),
    Case("tied_both", net.Tied, {"target_modules": ["embed", "head"]}, ((3,),), ids=True),
    Case("tied_head", net.Tied, {"target_modules": ["head"]}, ((3,),), ids=True),
    Case("tied_embedding", net.Tied, {"target_modules": ["embed"]}, ((3,),), ids=True),
    Case("bias_of_targets", net.Normed, {"target_modules": ["linear", "conv"], "bias": "lora_only"}, ((4, 5),)),
    Case("bias_all", net.Normed, {"target_modules": ["linear"], "bias": "all"}, ((4, 5),)),
    Case("bias_of_attention", lambda: net.SelfAttention(8, 2, batch_first=True), {"bias": "all"}, ((5, 8),)),
    Case("saved_head", net.Normed, {"target_modules": ["linear"], "modules_to_save": ["head"]}, ((4, 5),)),
    Case("saved_tied", net.Tied, {"target_modules": ["body"], "modules_to_save": ["head"]}, ((3,),), ids=True),
    Case("gpt2", net.gpt2, {"target_modules": ["c_attn", "c_proj", "wte", "lm_head"], "bias": "all"}, ((5,),),
         ids=True),
    Case("llama", net.llama, {"target_modules": "all-linear"}, ((5,),), ids=True),
]
BY_NAME = {case.name: case for case in CASES}
NORMAL = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3, torch.float64: 1e-12}
"""Largest error allowed, as a part of the largest value: about 2^4 units in the last place of each dtype."""

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_routable = pytest.mark.parametrize("case", [c for c in CASES if c.routable], ids=lambda case: case.name)
each_dtype = pytest.mark.parametrize(("case", "dtype"), [
    pytest.param(case, dtype, id=f"{case.name}-{str(dtype).removeprefix('torch.')}")
    for case in CASES for dtype in case.dtypes])
