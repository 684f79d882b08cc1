"""How an answer is searched for: greedily, or with beams (Table 11 of the LoRA paper: 10 beams, 0.9, 4)."""

from __future__ import annotations

from dataclasses import dataclass

from deltaw.errors import ConfigError, Fault


@dataclass(frozen=True, kw_only=True)
class Beams:
    """The search for the likeliest answer; by default the likeliest token each time."""

    num_beams: int = 1
    """Answers kept side by side while they are written; 1 takes the likeliest token each time."""
    length_penalty: float = 1.0
    """An answer of n tokens scores Σ log p / n^penalty among the beams: above 0 favours longer ones."""
    no_repeat_ngram_size: int = 0
    """No run of this many tokens occurs twice in an answer; 0 for no such rule. The prompt may be repeated."""

    def __post_init__(self) -> None:
        if faults := self.faults():
            raise ConfigError(*faults)

    def faults(self) -> list[Fault]:
        """What is wrong with the options."""
        name = type(self).__name__
        found = [Fault(f"{name}.{option}", f"got {getattr(self, option)}", f"a whole number >= {least}")
                 for option, least in (("num_beams", 1), ("no_repeat_ngram_size", 0)) if getattr(self, option) < least]
        if self.length_penalty != 1.0 and self.num_beams == 1:
            found.append(Fault(f"{name}.length_penalty", f"got {self.length_penalty} with one beam",
                               "num_beams above 1", "It chooses among beams"))
        return found
