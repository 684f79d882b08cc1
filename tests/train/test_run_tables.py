"""Training over a base whose vocabulary's tables are in 8 bits: runs, resuming, jobs together, and what plans say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaw
from deltaw.bases import load_base
from deltaw.core import stretches
from deltaw.core.packed import Int8Rows
from deltaw.core.stretches import rows_of_a_strip
from deltaw.errors import ConfigError
from deltaw.plan import memory
from deltaw.plan.config import PlanConfig
from deltaw.plan.forecast import Forecast
from deltaw.plan.run import plan
from deltaw.train import TrainMany
from tests.bases.tiny import llama, write
from tests.train.many_sets import config_maker, differences, together

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:MatMul8bitLt:UserWarning")
PACKED: dict[str, Any] = {"quantize": "int8", "quantize_tables": "int8", "device": "cpu"}


def test_a_run_learns_and_goes_on_as_if_it_had_not_stopped(base_folder: Path, color_rows: Path, tmp_path: Path) -> None:
    make = config_maker(base_folder, color_rows, tmp_path)
    options: dict[str, Any] = PACKED | {"max_steps": 40, "learning_rate": 2e-2, "eval_every": 20, "save_every": 20}
    result = deltaw.train(make("whole", **options), quiet=True)
    assert result.after["loss"] < 0.5 * result.before["loss"]
    facts = json.loads((tmp_path / "many" / "whole" / "deltaw.json").read_text(encoding="utf-8"))
    assert "int8, int8 tables" in json.dumps(facts)
    stopped = make("stopped", **options)
    with pytest.MonkeyPatch.context() as patch:
        from deltaw.train.progress import MetricsLog

        step = MetricsLog.step

        def dying(self: MetricsLog, state: Any, **figures: Any) -> None:
            if state.step == 25:
                raise KeyError("the power went")
            step(self, state, **figures)

        patch.setattr(MetricsLog, "step", dying)
        with pytest.raises(KeyError, match="the power went"):
            deltaw.train(stopped, quiet=True)
    with pytest.raises(ConfigError, match="quantize_tables: got 'none'"):
        deltaw.train(replace(stopped, resume=True, quantize_tables="none"), quiet=True)
    assert deltaw.train(replace(stopped, resume=True), quiet=True).after == result.after
    assert differences(tmp_path / "many" / "whole", tmp_path / "many" / "stopped") == (0.0, 0.0)


def test_the_loss_before_training_is_that_of_the_dense_tables(base_folder: Path, color_rows: Path,
                                                              tmp_path: Path) -> None:
    base = load_base(str(base_folder), dtype="fp32", quantize="int8", quantize_tables="int8")
    make = config_maker(base_folder, color_rows, tmp_path)
    found = deltaw.train(make("packed", max_steps=1, **PACKED), quiet=True).before["loss"]
    plain = load_base(str(base_folder), dtype="fp32", quantize="int8")
    with torch.no_grad():
        for name in ("model.embed_tokens", "lm_head"):
            weight = base.model.get_submodule(name).weight
            plain.model.get_submodule(name).weight.copy_(weight.data.double() * weight.absmax.double()[:, None] / 127)
    plain.model.save_pretrained(tmp_path / "dense")
    plain.tokenizer.save_pretrained(tmp_path / "dense")
    dense = config_maker(tmp_path / "dense", color_rows, tmp_path)
    assert found == pytest.approx(deltaw.train(dense("dense", max_steps=1, device="cpu"), quiet=True).before["loss"],
                                  rel=1e-4)


def test_jobs_together_are_each_alone(base_folder: Path, color_rows: Path, tmp_path: Path) -> None:
    make = config_maker(base_folder, color_rows, tmp_path)
    ranks = {"x": 2, "y": 4}
    with TrainMany([make(name, lora=deltaw.LoraConfig(r=r), **PACKED) for name, r in ranks.items()],
                   together(tmp_path), quiet=True) as many:
        result = many.run()
    assert not result.failed, result.jobs
    for name, r in ranks.items():
        deltaw.train(make(name, "alone", lora=deltaw.LoraConfig(r=r), **PACKED), quiet=True)
        tensors, losses = differences(tmp_path / "alone" / name, tmp_path / "many" / name)
        assert tensors < 1e-3
        assert losses < 1e-4


def test_jobs_share_how_tables_are_stored(base_folder: Path, color_rows: Path, tmp_path: Path) -> None:
    make = config_maker(base_folder, color_rows, tmp_path)
    with pytest.raises(ConfigError, match=r"job 'y': quantize_tables: got 'none'"), \
            TrainMany([make("x", **PACKED), make("y", **PACKED | {"quantize_tables": "none"})], together(tmp_path)):
        pass


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_plan_knows_the_bytes_of_the_tables(tmp_path: Path, tied: bool, dtype: str,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, llama(hidden_size=64, intermediate_size=128, vocab_size=96, tie_word_embeddings=tied))
    asked = PlanConfig(model=str(tmp_path), methods=("lora", "qlora"), dtype=dtype, max_length=32, device="cpu",
                       quantize="int8", quantize_tables="int8")
    kept: list[Forecast] = []
    made = Forecast.__init__

    def noted(self: Forecast, *args: Any) -> None:
        made(self, *args)
        kept.append(self)

    monkeypatch.setattr(Forecast, "__init__", noted)
    found = plan(asked, search=False)
    packed = next(each for each in kept if each.method == "qlora")
    sizes, item = packed.sizes(asked.lora.r), packed.setting.item
    planned = memory.base_weights(sizes, asked, "qlora", item, gpu=False)[0]
    model = load_base(str(tmp_path), dtype=dtype, quantize="int8", quantize_tables="int8").model
    tables = {id(p): p for p in model.parameters() if isinstance(p, Int8Rows)}.values()
    held = sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()])
    assert planned == held + sum(4 * len(p.absmax) for p in tables)
    plain = plan(replace(asked, quantize_tables="none"), search=False)
    assert found["lora"].memory == plain["lora"].memory  # type: ignore[index]
    saved = sum(p.numel() * (item - 1) - 4 * len(p) for p in tables)
    for phase, strip in (("load", 0), ("train", sizes.tables * item)):  # a strip more, here all of a table
        before, after = (f["qlora"].memory[phase].parts["weights"] for f in (plain, found))  # type: ignore[index]
        assert after == before - saved + strip


def test_plans_cut_strips_as_they_are_cut() -> None:
    assert (memory.STRIP, memory.GPU_STRIP) == (stretches.STRIP, stretches.GPU_STRIP)
    sizes = memory.Sizes(weights=0, matrices=0, largest=0, largest_tensor=0, vocabulary=152_000, width=896, trained=0,
                         trained_width=4, inside=False, tables=152_000 * 896, table_rows=152_000)
    for gpu in (False, True):
        words = memory.stretch(sizes, PlanConfig(model="m"), 1, 512, gpu=gpu)[1]
        assert words == rows_of_a_strip(152_000, 896, on_gpu=gpu) == (30_400 if gpu else 4_608)


def test_tables_alone_are_refused_by_every_config() -> None:
    from deltaw.serve.config import ServeConfig

    for make in (lambda: PlanConfig(model="m", quantize="none", quantize_tables="int8"),
                 lambda: deltaw.TrainConfig(model="m", data="d", out="o", quantize_tables="int8"),
                 lambda: ServeConfig(model="m", quantize_tables="int8")):
        with pytest.raises(ConfigError, match=r"quantize_tables: got 'int8' without quantize; expected quantize too"):
            make()
