"""Times of steps on kernels in C: what a walk hears of them, and how long that is said to take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaw import LoraConfig
from deltaw.core import native_low_rank
from deltaw.plan import PlanConfig, calibrate_kernels
from deltaw.plan.calibrate import Rates
from deltaw.plan.calibrate_kernels import RANKS, TOKENS, kernel_rates
from deltaw.plan.devices import find_device
from deltaw.plan.forecast import Forecast, Setting
from deltaw.plan.found import Work
from deltaw.plan.shapes import read_shapes
from deltaw.plan.step import Steps
from deltaw.plan.timing import seconds_here

PLAIN = Rates(narrow_output={1: 1e9}, narrow_inner={1: 1e9}, attention=1e9, bytes={1: 1e9}, start=0.0)
KERNELS = replace(PLAIN, frozen={1: 1e9, 100: 4e9}, narrow={8: 1e8}, passes=1e7, drawn=1e6)


def steps(tiny_llama: Callable[..., Any], folder: Path, dtype: torch.dtype = torch.bfloat16,
          ) -> tuple[PlanConfig, dict[bool, Work]]:
    tiny_llama(num_hidden_layers=4, hidden_size=64, intermediate_size=160).save_pretrained(folder)
    config = PlanConfig(model=str(folder), batch_size=2, max_length=40, lora=LoraConfig(r=2))
    return config, {kernels: Steps(read_shapes(str(folder)), config, dtype, kernels=kernels).at("lora", 2, 40).work
                    for kernels in (False, True)}


def test_kernels_multiply_what_plain_operations_multiply(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    _, work = steps(tiny_llama, tmp_path)
    assert not work[False].frozen
    assert not work[False].narrow
    assert work[False].passes == 0
    assert work[True].flops == pytest.approx(work[False].flops, rel=1e-6)
    low_rank = sum(2.0 * m * n * k * times for (_, m, n, k), times in work[True].narrow.items())
    shapes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 160), (64, 160), (160, 64)]
    equations = 4 * sum(6 * 2 * 80 * (i + o) for i, o in shapes) * 1.0  # three products a factor; r = 2
    assert low_rank == pytest.approx(equations, rel=0.02)  # the first input wants no gradient
    assert work[True].moved < 0.5 * work[False].moved
    assert 0 < work[True].passes < work[False].moved


def test_a_base_in_32_bits_has_no_kernels(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    _, work = steps(tiny_llama, tmp_path, torch.float32)
    assert work[True].all_products == work[False].all_products


def test_a_forecast_takes_the_step_with_kernels_where_they_were_measured(tiny_llama: Callable[..., Any],
                                                                         tmp_path: Path) -> None:
    config, _ = steps(tiny_llama, tmp_path)
    shapes, here = read_shapes(str(tmp_path)), find_device("cpu")
    said = {}
    for rates in (PLAIN, replace(PLAIN, frozen={1: 1e12}, narrow={1: 1e12}, passes=1e12)):
        setting = Setting(config, shapes, here, "bfloat16", rates)
        said[rates.has_kernels] = Forecast(setting, "lora").step_seconds()
    assert said[True] is not None
    assert said[False] is not None
    assert said[True] < 0.3 * said[False]


def test_seconds_are_those_of_each_part() -> None:
    work = Work(frozen=Counter({(1, 10, 32, 64): 3}), narrow=Counter({(1, 10, 8, 64): 5}), passes=1e6, drawn=2e5)
    frozen = 3 * (2 * 10 * 32 * 64 / 2e9 + 2 * (10 * 64 + 32 * 64 + 10 * 32) / 1e9)
    narrow = 5 * 2 * 10 * 8 * 64 / 1e8
    assert seconds_here(work, KERNELS) == pytest.approx(frozen + narrow + 0.1 + 0.2, rel=1e-9)
    assert seconds_here(replace(work, drawn=0.0), KERNELS) == pytest.approx(frozen + narrow + 0.1, rel=1e-9)


def test_products_of_heads_have_a_rate_of_their_own() -> None:
    work = Work(products=Counter({(24, 128, 128, 64): 3}))
    flops = 3 * 2 * 24 * 128 * 128 * 64
    assert seconds_here(work, replace(KERNELS, batched=1e8)) == pytest.approx(flops / 1e8, rel=1e-6)
    assert seconds_here(work, KERNELS) < flops / 1e8  # as one product, where that was not measured


@pytest.mark.skipif(not native_low_rank.is_there(), reason="this machine has no kernels of products in bfloat16")
def test_rates_of_this_machine() -> None:
    found = kernel_rates(lambda run: (run(), 1e-3)[1], unpacking=False)
    assert set(found) == {"frozen", "narrow", "passes"}
    assert set(found["frozen"]) == set(TOKENS)
    assert found["frozen"][4] == pytest.approx(4 * found["frozen"][1])
    assert set(found["narrow"]) == set(RANKS)
    assert all(rate > 0 for rate in found["narrow"].values())
    assert found["passes"] == pytest.approx(10 * 1024 * 768 / 1e-3)


@pytest.mark.skipif(not native_low_rank.is_there(), reason="this machine has no kernels of products in bfloat16")
def test_unpacking_is_what_codes_take_more_than_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    products = []

    def more(longer: Callable[[], object], shorter: Callable[[], object]) -> float:
        products.append((longer(), shorter()))
        return 0.5

    monkeypatch.setattr(calibrate_kernels, "_seconds_more", more)
    assert kernel_rates(lambda run: 1e-3, unpacking=True)["unpack"] == 4 * 768 * 768 / 0.5
    assert len(products) == len(RANKS) + 1


def test_no_rates_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate_kernels.native_low_rank, "is_there", lambda: False)
    assert kernel_rates(lambda run: 1.0, unpacking=True) == {}
