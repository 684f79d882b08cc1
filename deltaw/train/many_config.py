"""`ManyConfig`: what a set of jobs decides together, as a value. What each job decides is its `TrainConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from deltaw.errors import ConfigError, Fault


@dataclass(frozen=True, kw_only=True)
class ManyConfig:
    """What a set of jobs decides together."""

    out: str
    """Folder of the set's record and of its control folder."""
    budget_tokens: int = 1024
    """Most tokens of a round and of one pass over the base; a larger micro-batch has a pass of its own."""
    memory: float | None = None
    """GiB that activations may take: lowers budget_tokens to what was measured to fit."""
    save_every: int | None = None
    """Rounds between saves of the whole set; by default the shortest save_every of its jobs, 0 for none."""
    resume: bool = False
    """Go on from the last save of the set, exactly as if it had not stopped."""
    control: bool = True
    """Watch out/control for jobs to add, cancel, pause and resume."""

    def __post_init__(self) -> None:
        faults = []
        for name, least in (("budget_tokens", 1), ("save_every", 0)):
            value = getattr(self, name)
            if not (isinstance(value, int) and not isinstance(value, bool) and value >= least) \
                    and not (name == "save_every" and value is None):
                faults.append(Fault(f"ManyConfig.{name}", f"got {value!r}", f"a whole number >= {least}"))
        if self.memory is not None and not (isinstance(self.memory, (int, float)) and self.memory > 0):
            faults.append(Fault("ManyConfig.memory", f"got {self.memory!r}", "GiB above 0, or nothing"))
        if not isinstance(self.out, str) or not self.out:
            faults.append(Fault("ManyConfig.out", f"got {self.out!r}", "a folder"))
        if faults:
            raise ConfigError(*faults)
