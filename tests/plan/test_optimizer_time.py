"""The time of an update: AdamW's by the bytes that it moves, an 8-bit one's by what it was measured to take."""

from __future__ import annotations

from dataclasses import replace

import pytest

import deltaw.plan.calibrate as calibration
from deltaw.core import LoraConfig
from deltaw.plan import PlanConfig, plan
from deltaw.plan.calibrate import Rates
from deltaw.plan.devices import DEVICES
from deltaw.plan.memory import Sizes
from deltaw.plan.timing import optimizer_seconds

RATES = Rates(narrow_output={1: 1e9}, narrow_inner={1: 1e9}, attention=1e9, bytes={1: 1e9}, start=0.0,
              adamw8bit={1000: 1e6, 100_000: 1e8})
SIZES = Sizes(weights=0, matrices=0, largest=0, largest_tensor=0, vocabulary=1, width=1, trained=1_000_000,
              trained_width=4, inside=False)
WIDE = PlanConfig(model="any")
NARROW = replace(WIDE, optimizer="adamw8bit")


def test_an_8_bit_update_takes_what_was_measured_of_tensors_of_its_size() -> None:
    for tensors, rate in ((1000, 1e6), (100, 1e7), (10, 1e8), (1, 1e8)):
        took = optimizer_seconds(SIZES, NARROW, DEVICES["h100"], RATES, tensors=tensors)
        assert took == pytest.approx(1_000_000 / rate)
    assert optimizer_seconds(SIZES, WIDE, DEVICES["h100"], RATES, tensors=1000) == pytest.approx(7 * 4e6 / 1e9)


def test_elsewhere_it_moves_less() -> None:
    wide, narrow = (optimizer_seconds(SIZES, config, DEVICES["h100"], None) for config in (WIDE, NARROW))
    bandwidth = 3350e9 * 0.75
    assert wide == pytest.approx(7 * 4e6 / bandwidth)
    assert narrow == pytest.approx((3 * 4e6 + 4 * 1e6 * (1 + 8 / 256)) / bandwidth)


def test_a_plan_counts_the_factors_of_its_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaw.plan.calibrate.known_rates", lambda *_: RATES)
    config = PlanConfig(model="smollm2-135m", device="cpu", dtype="fp32", batch_size=1, max_length=16,
                        methods=("lora",), lora=LoraConfig(r=4))
    wide, narrow = (plan(replace(config, optimizer=kind), search=False)["lora"]  # type: ignore[arg-type]
                    for kind in ("adamw", "adamw8bit"))
    assert wide.step_seconds is not None
    assert narrow.step_seconds is not None
    each = wide.parameters // (2 * 30 * 7)
    rate = 1e6 * (each / 1000)  # on the line between the two that were measured
    expected = wide.parameters * (1 / rate - 7 * 4 / 1e9)
    assert narrow.step_seconds - wide.step_seconds == pytest.approx(expected, rel=1e-3)


def test_an_8_bit_update_is_measured() -> None:
    pytest.importorskip("bitsandbytes")
    assert 1e3 < calibration._updated(1 << 12) < 1e12
