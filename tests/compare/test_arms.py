"""The arms of a comparison and of a sweep, and the options that each run is given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deltaw.baselines.config import OPTIONS, BaselineConfig
from deltaw.compare.arms import RATES, arms_of_comparison, arms_of_sweep, runs_of
from deltaw.compare.config import CompareConfig, SweepConfig
from deltaw.core import LoraConfig
from deltaw.errors import ConfigError
from deltaw.train.beams import Beams
from deltaw.train.config import TrainConfig

TRAIN = TrainConfig(model="m", data="d", out="o", lora=LoraConfig(r=8, lora_alpha=16, target_modules=("q_proj",)))


def test_a_sweep_crosses_everything() -> None:
    config = SweepConfig(train=TRAIN, seeds=(3, 4), ranks=(1, 4), targets=("q_proj", "q_proj+v_proj"),
                         scales=("2r", "rs"), rates=(1e-3,))
    arms = arms_of_sweep(config)
    assert [arm.label for arm in arms][:2] == ["q_proj r=1 alpha=2r rate=0.001",
                                               "q_proj r=1 rank-stabilised rate=0.001"]
    assert len(arms) == 8
    assert [(arm.rest, arm.rank) for arm in arms[:3]] == [("q_proj alpha=2r rate=0.001", 1),
                                                          ("q_proj rank-stabilised rate=0.001", 1),
                                                          ("q_proj alpha=2r rate=0.001", 4)]
    runs = runs_of(config, arms)
    assert len(runs) == 16
    last = runs[-3]
    assert last.seed == 4
    assert last.train["lora"]["target_modules"] == ("q_proj", "v_proj")
    assert (last.train["lora"]["r"], last.train["lora"]["lora_alpha"], last.train["seed"]) == (4, 8, 4)
    assert "out" not in last.train
    made = TrainConfig.from_dict({**last.train, "out": "there"})
    assert (made.lora.r, made.lora.lora_alpha, made.learning_rate) == (4, 8, 1e-3)


def test_a_comparison_has_methods_sizes_and_spelled_out_arms() -> None:
    config = CompareConfig(train=TRAIN, methods=("lora", "full"), seeds=(0,), sizes=(100, 0),
                           arms={"lora r=1": {"lora": {"r": 1}}})
    runs = runs_of(config, arms_of_comparison(config))
    assert [(run.arm, run.size) for run in runs] == [("lora", 100), ("lora", None), ("full", 100), ("full", None),
                                                     ("lora r=1", 100), ("lora r=1", None)]
    assert runs[2].train["learning_rate"] == 5e-5
    assert (runs[-1].train["lora"]["r"], runs[-1].train["lora"]["lora_alpha"]) == (1, 16)
    assert len({run.place for run in runs}) == len({run.identity for run in runs}) == 6


def test_every_method_has_a_rate_of_its_own_and_a_factor_multiplies_them_all() -> None:
    assert set(RATES) == set(OPTIONS)
    config = CompareConfig(train=TRAIN, methods=("lora", "full"), seeds=(0,), rate_factor=4,
                           arms={"slow": {"method": "full", "learning_rate": 1e-6}})
    rates = {run.arm: run.train["learning_rate"] for run in runs_of(config, arms_of_comparison(config))}
    assert rates == pytest.approx({"lora": 2e-3, "full": 2e-4, "slow": 1e-6})
    with pytest.raises(ConfigError, match="rate_factor"):
        CompareConfig(train=TRAIN, rate_factor=0)


def test_each_method_takes_those_of_the_shared_options_that_are_its_own() -> None:
    config = CompareConfig(train=TRAIN, methods=("lora", "adapter-h"), seeds=(0,),
                           baseline=BaselineConfig(bottleneck=8, prefix_tokens=3))
    runs = runs_of(config, arms_of_comparison(config))
    lora, adapter = (TrainConfig.from_dict({**run.train, "out": "o"}) for run in runs)
    assert lora.baseline == BaselineConfig()
    assert (adapter.baseline.bottleneck, adapter.baseline.prefix_tokens) == (8, 8)
    with pytest.raises(ConfigError, match="Did you mean adapter-h"):
        CompareConfig(train=TRAIN, methods=("adapterh",))


def test_what_is_wrong_with_arms_is_told_with_their_names_before_anything_is_trained() -> None:
    arms = {"a": {"method": "fulll"}, "b": {"learning_rate": -1}, "c": {"lora": {"rr": 1}},
            "d": {"method": "lora", "baseline": {"bottleneck": 4}}, "fine": {"lora": {"r": 2}}}
    with pytest.raises(ConfigError) as caught:
        CompareConfig(train=TRAIN, arms=arms)
    text = str(caught.value)
    for expected in ("arm 'a': TrainConfig.method: got 'fulll'", "Did you mean full", "arm 'c': ", "'rr'",
                     "arm 'b': TrainConfig.learning_rate", "arm 'd': BaselineConfig.bottleneck"):
        assert expected in text
    assert len(caught.value.faults) == 4
    with pytest.raises(ConfigError) as caught:
        CompareConfig(train=TRAIN, arms={"x": {"out": "o", "seed": 1, "model": "m", "lora": 8}, "y": 5})
    assert [fault.where for fault in caught.value.faults] == [  # type: ignore[union-attr]
        *(f"CompareConfig.arms['x'].{name}" for name in ("out", "seed", "model", "lora")), "CompareConfig.arms['y']"]
    with pytest.raises(ConfigError, match="arm 'r=1 alpha=inf'"):
        SweepConfig(train=TRAIN, ranks=(1,), scales=("inf",))


def test_a_metric_that_does_not_fit_the_task_is_refused() -> None:
    for metrics, where in ((("bleu",), "TrainConfig.metrics: bleu is of written"), ((), "arm 'x': TrainConfig")):
        with pytest.raises(ConfigError, match=where):
            CompareConfig(train=replace(TRAIN, task="seq-cls", metrics=metrics), arms={"x": {"metrics": ["rouge1"]}})
    assert CompareConfig(train=replace(TRAIN, metrics=("bleu",))).judged_by == "bleu"


def test_how_test_data_is_judged_is_a_fault_without_test_data() -> None:
    with pytest.raises(ConfigError) as caught:
        SweepConfig(train=TRAIN, test_rows=5, beams=Beams(num_beams=4, length_penalty=0.9))
    text = str(caught.value)
    assert [f"SweepConfig.{name}" in text for name in ("test_rows", "num_beams", "length_penalty",
                                                       "no_repeat_ngram_size")] == [True, True, True, False]
    assert SweepConfig(train=TRAIN, test="t", test_rows=5, beams=Beams(num_beams=4)).test_rows == 5


def test_options_of_lora_alone_leave_other_methods_as_they_are() -> None:
    train = replace(TRAIN, freeze_a=True, loraplus_lr_ratio=16.0)
    config = CompareConfig(train=train, methods=("lora", "full"), seeds=(0,))
    runs = runs_of(config, arms_of_comparison(config))
    lora, full = (TrainConfig.from_dict({**run.train, "out": "o"}) for run in runs)
    assert (lora.freeze_a, lora.loraplus_lr_ratio, full.freeze_a, full.loraplus_lr_ratio) == (True, 16.0, False, 1.0)


def test_every_fault_of_a_study_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        SweepConfig(train=TRAIN, seeds=(0, 0), judge="acuracy", ranks=(0,), scales=("half",), halving=1)
    text = str(caught.value)
    for name in ("seeds", "judge", "ranks", "scales", "halving"):
        assert f"SweepConfig.{name}" in text
    with pytest.raises(ConfigError, match="Did you mean learning_rate"):
        CompareConfig(train=TRAIN, arms={"x": {"learning_rat": 1.0}})


def test_only_figures_of_which_90_percent_means_something_have_an_intrinsic_dimension() -> None:
    with pytest.raises(ConfigError, match=r"intrinsic: is judged by loss.*such as accuracy"):
        CompareConfig(train=TRAIN, intrinsic=True)
