"""Over a base in NF4 the frozen weights are dequantized once in a pass, however many adapters share it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaw
from deltaw.bases import Base, load_base
from deltaw.core.packed import Packed
from deltaw.train import TrainMany
from tests.device import DEVICE
from tests.train.many_sets import config_maker, differences, together

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:MatMul8bitLt:UserWarning")


@pytest.fixture
def quantized(base_folder: Path) -> Callable[[], Base]:
    """A function that loads the tiny base with its layers' linear weights in NF4."""
    def make() -> Base:
        base: Any = load_base(str(base_folder), dtype="fp32", device=DEVICE)
        for layer in base.model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, linear in list(part.named_children()):
                    if isinstance(linear, torch.nn.Linear):
                        packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False,
                                                   compute_dtype=torch.float32, quant_type="nf4")
                        packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4",
                                                          module=packed)
                        setattr(part, name, packed.to(DEVICE))
        try:
            base.model(input_ids=torch.tensor([[5, 6, 7]], device=DEVICE))
        except (NotImplementedError, RuntimeError) as reason:
            pytest.skip(f"bitsandbytes cannot run NF4 here: {reason}")
        return base

    return make


def test_each_weight_is_dequantized_once_each_way(quantized: Callable[[], Base], color_rows: Path, base_folder: Path,
                                                  tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    plain = Packed.strips

    def counting(self: Packed, *args: Any) -> Any:
        nonlocal count
        count += 1
        return plain(self, *args)

    monkeypatch.setattr(Packed, "strips", counting)
    calls = {}
    for number in (1, 5):
        make = config_maker(base_folder, color_rows, tmp_path / str(number))
        configs = [make(f"j{n}", lora=deltaw.LoraConfig(r=1 + n)) for n in range(number)]
        with TrainMany(configs, together(tmp_path / str(number)), base=quantized(), quiet=True) as many:
            count = 0
            many.round()
            calls[number] = count
    assert calls[1] > 0
    assert calls[5] == calls[1]


@pytest.mark.slow
def test_jobs_over_a_packed_base_are_each_alone(quantized: Callable[[], Base], color_rows: Path, base_folder: Path,
                                                tmp_path: Path) -> None:
    make = config_maker(base_folder, color_rows, tmp_path)
    ranks = {"x": 2, "y": 8}
    for place, sets in (("many", [list(ranks)]), ("alone", [["x"], ["y"]])):
        for names in sets:
            configs = [make(n, place, lora=deltaw.LoraConfig(r=ranks[n], lora_dropout=0.1)) for n in names]
            with TrainMany(configs, together(tmp_path / place / names[0]), base=quantized(), quiet=True) as many:
                result = many.run()
            assert not result.failed, result.jobs
    for name in ranks:
        assert max(differences(tmp_path / "alone" / name, tmp_path / "many" / name)) <= 1e-5
