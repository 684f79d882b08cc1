"""`LoraConfig`: checked when made, all faults at once, the same after a trip through JSON."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from deltaw import LoraConfig
from deltaw.errors import ConfigError

OTHER: dict[str, Any] = {
    "r": 3, "lora_alpha": 5.5, "lora_dropout": 0.25, "target_modules": ["a", "b"], "exclude_modules": ["c"],
    "target_parameters": ["d"], "target_slices": {"a": "q-v", "b": [(0, 2), (3, 4)]}, "layers_to_transform": [0, 2],
    "layers_pattern": ["h"], "rank_pattern": {"a": 4}, "alpha_pattern": {"b": 1.0}, "use_rslora": True, "bias": "all",
    "modules_to_save": ["head"], "init_lora_weights": "gaussian", "loftq_config": {"loftq_iter": 5},
    "task_type": "CAUSAL_LM"}


def test_every_field_survives_json() -> None:
    assert OTHER.keys() == {field.name for field in fields(LoraConfig)}
    config, plain = LoraConfig(**OTHER), LoraConfig()
    assert all(getattr(config, name) != getattr(plain, name) for name in OTHER)
    assert LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("option", "value"), [
    ("r", 0), ("r", -1), ("r", 2.0), ("r", True), ("r", "8"), ("lora_alpha", 0), ("lora_alpha", -2),
    ("lora_alpha", "x"),
    ("lora_dropout", 1.0), ("lora_dropout", -0.1), ("bias", "some"), ("init_lora_weights", "pissa_niter_0"),
    ("init_lora_weights", None), ("loftq_config", {"loftq_iter": 0}), ("loftq_config", {"iterations": 1}),
    ("target_modules", []), ("target_modules", "("), ("exclude_modules", "["), ("rank_pattern", {"q": 0}),
    ("alpha_pattern", {"q": 0}), ("rank_pattern", {"(": 1})])
def test_what_is_out_of_range_is_refused(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=option):
        LoraConfig(**{option: value})


def test_all_faults_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(r=0, lora_alpha=-1, lora_dropout=2, bias="no")  # type: ignore[arg-type]
    assert len(caught.value.faults) == 4
    with pytest.raises(ConfigError) as caught:
        LoraConfig.from_dict({"rnak": 8, "use_rslroa": True})
    assert len(caught.value.faults) == 2
    assert "Did you mean use_rslora?" in str(caught.value)


def test_what_was_given_is_not_shared() -> None:
    targets, ranks = ["a"], {"a": 2}
    config = LoraConfig(target_modules=targets, rank_pattern=ranks)  # type: ignore[arg-type]
    targets.append("b")
    ranks["b"] = 3
    assert (config.target_modules, config.rank_pattern) == (("a",), {"a": 2})
    with pytest.raises(FrozenInstanceError):
        config.r = 2  # type: ignore[misc]


def test_scaling() -> None:
    config = LoraConfig(r=8, lora_alpha=16, alpha_pattern={"q": 4}, rank_pattern={r"\d\.q": 2})
    assert config.scaling(8) == 2.0
    assert config.scaling(4, "x.q") == 1.0
    assert [config.rank_at(site) for site in ("1.q", "x.1.q", "x.q", "1.qq")] == [2, 2, 8, 8]
    stable = LoraConfig(r=8, lora_alpha=16, use_rslora=True)
    assert math.isclose(stable.scaling(16), 4.0)


@pytest.mark.parametrize("options", [{"rank_pattern": {"(?i)q": 4}}, {"rank_pattern": {"q{9999999999}": 4}},
                                     {"lora_alpha": float("inf")}])
def test_what_would_fail_later_is_refused_when_the_config_is_made(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        LoraConfig(**options)  # type: ignore[arg-type]
