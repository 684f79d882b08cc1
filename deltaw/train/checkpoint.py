"""Checkpoints from which a run goes on as if it had never stopped: bit for bit, also after `kill -9`.

    checkpoints/step-00000120/state.safetensors   tuned tensors, optimizer's tensors, best tensors, generators
    checkpoints/step-00000120/state.json          counters, data position, config, SHA-256 of the file above

No pickle. A checkpoint is written beside its place, flushed to the disk and renamed, so that it is whole or absent; one
that is damaged all the same is passed over for the one before.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import ConfigError, Fault, TrainingError
from deltaw.store.atomic import replace_folder
from deltaw.train.config import TrainConfig
from deltaw.train.state import Batches, State
from deltaw.train.tuning import Tuning

_TENSORS, _FACTS = "state.safetensors", "state.json"


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, config: Mapping[str, Any], *, keep: int = 2) -> None:
        """`config` is written into each and compared on resumption."""
        self.folder, self.config, self.keep = folder, dict(config), keep
        self.pinned: Path | None = None
        """One that is kept however old it gets, since something outside names it."""

    def save(self, state: State, tuning: Tuning, optimizer: torch.optim.Optimizer, batches: Batches) -> Path:
        """Write the whole state and return its folder; an error leaves the checkpoints as they were."""
        from safetensors.torch import save

        tensors, numbers = _optimizer_state(tuning, optimizer)
        tensors |= {f"tuned/{name}": p.detach() for name, p in tuning.parameters().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in state.best_tensors.items()}
        generator_tensors, generator_facts = _generators()
        tensors |= generator_tensors
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        facts = {"state": state.counters(), "optimizer": numbers, "generators": generator_facts,
                 "batches": batches.state_dict(), "config": self.config, "torch": torch.__version__,
                 "sha256": hashlib.sha256(content).hexdigest()}
        target = self.folder / f"step-{state.step:08d}"
        replace_folder(target, {_TENSORS: content, _FACTS: json.dumps(facts).encode()})
        for old in self._all()[:-self.keep]:
            if old != self.pinned:
                shutil.rmtree(old, ignore_errors=True)
        return target

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole, or None."""
        return next((path for path in reversed(self._all()) if _is_whole(path)), None)

    def _all(self) -> list[Path]:
        """Every checkpoint, the oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def restore(self, path: Path, tuning: Tuning, optimizer: torch.optim.Optimizer, batches: Batches) -> State:
        """Put everything back as it was when `path` was saved, and return the state."""
        from safetensors.torch import load_file

        facts = json.loads((path / _FACTS).read_text(encoding="utf-8"))
        tensors = load_file(path / _TENSORS)
        _put_back(_under(tensors, "tuned"), tuning, str(path))
        _restore_optimizer(tensors, facts["optimizer"], tuning, optimizer)
        batches.load_state_dict(facts["batches"])
        _restore_generators(tensors, facts["generators"])
        known = {f.name for f in fields(State)}
        counters = {name: value for name, value in facts["state"].items() if name in known}
        homes = {name: parameter.device for name, parameter in tuning.parameters().items()}
        best = {name: tensor.to(homes.get(name, tensor.device)) for name, tensor in _under(tensors, "best").items()}
        return State(**counters, best_tensors=best)


def recorded_config(path: Path) -> dict[str, Any]:
    """The config of the run that wrote this checkpoint."""
    config = json.loads((path / _FACTS).read_text(encoding="utf-8"))["config"]
    assert isinstance(config, dict)
    return config


def identity(config: TrainConfig, *, data_sha256: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is, as JSON values: its config, and what stood behind the names in it. `base` is a fingerprint."""
    values = json.loads(json.dumps(config.to_dict() | {"data_sha256": data_sha256, "base": dict(base)}))
    assert isinstance(values, dict)
    return values


def check_same_run(config: TrainConfig, current: Mapping[str, Any], path: Path) -> None:
    """Refuse to resume a run of another identity, naming all that differs."""
    recorded = recorded_config(path)
    faults = config.changes(recorded)
    if recorded.get("base") != current["base"]:
        faults.append(Fault("TrainConfig.model", f"'{config.model}' holds other weights",
                            "those of the run's beginning"))
    if recorded.get("data_sha256") != current["data_sha256"]:
        faults.append(Fault("TrainConfig.data", f"'{config.data}' holds other data", "that of the run's beginning"))
    if faults:
        raise ConfigError(*faults, f"The run in '{path.parent.parent}' cannot be resumed with these: take the changes "
                          "back, or start anew in another folder")


def put_tensors(tensors: Mapping[str, Tensor], tuning: Tuning) -> None:
    """Copy tensors, such as the best ones, into the tuning's own."""
    _put_back(tensors, tuning, "the best tensors")


def _put_back(tensors: Mapping[str, Tensor], tuning: Tuning, where: str) -> None:
    parameters = tuning.parameters()
    wrong = sorted(set(parameters) ^ set(tensors))
    wrong += [n for n in parameters if n in tensors and parameters[n].shape != tensors[n].shape]
    if wrong:
        raise TrainingError(Fault(where, f"does not fit the tuning at {', '.join(wrong[:4])}", "the same tensors",
                                  "It comes from another base or adapter"))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _under(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}/"): t for name, t in tensors.items() if name.startswith(f"{part}/")}


def _optimizer_state(tuning: Tuning, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's tensors as "optimizer/<key>/<parameter>", and its plain numbers as {parameter: {key: number}}."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, parameter in tuning.parameters().items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{key}/{name}"] = value.detach()
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers


def _restore_optimizer(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], tuning: Tuning,
                       optimizer: torch.optim.Optimizer) -> None:
    parameters = tuning.parameters()
    # AdamW counts its steps in a tensor on the CPU whatever the parameter's device, unless its update is one kernel.
    fused = {parameter for group in optimizer.param_groups for parameter in group["params"] if group.get("fused")}
    optimizer.state.clear()
    for name, values in numbers.items():
        optimizer.state[parameters[name]].update(values)
    for full, tensor in _under(tensors, "optimizer").items():
        key, _, name = full.partition("/")
        parameter = parameters[name]
        home = parameter.device if tensor.dim() or parameter in fused else torch.device("cpu")
        optimizer.state[parameter][key] = tensor.to(home)


def _generators() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of every global random generator that dropout, or a caller's data code, may use."""
    tensors = {"generator/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"generator/cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, internal, gauss = random.getstate()
    facts: dict[str, Any] = {"python": [version, list(internal), gauss]}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        facts["numpy"] = [kind, [int(key) for key in keys], *rest]
    return tensors, facts


def _restore_generators(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    torch.set_rng_state(tensors["generator/cpu"])
    cards = sorted(name for name in tensors if name.startswith("generator/cuda"))
    if cards and torch.cuda.device_count() == len(cards):
        torch.cuda.set_rng_state_all([tensors[name] for name in cards])
    version, internal, gauss = facts["python"]
    random.setstate((version, tuple(internal), gauss))
    if "numpy" in facts:
        import numpy

        kind, keys, *rest = facts["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))


def _is_whole(path: Path) -> bool:
    """Whether both files are there and the tensors are those that were written."""
    try:
        facts = json.loads((path / _FACTS).read_text(encoding="utf-8"))
        digest = hashlib.sha256((path / _TENSORS).read_bytes()).hexdigest()
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and facts.get("sha256") == digest
