"""What is asked of the engine, and what it says about it: plain values, without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from deltaw.errors import ConfigError, Fault

MAX_LOGPROBS = 20
"""Most alternatives told for each token."""
MAX_STOPS = 16
MAX_SEED = 2**63

FinishReason = Literal["stop", "length", "cancelled", "error", "timeout"]

Blend = tuple[tuple[int, float], ...]
"""Adapters by their number in the pool, with weights: ΔW = Σ w·ΔWᵢ. Empty is the base. Numbers are never used again,
so that a cache filled under a name cannot be taken for that of a later adapter of the same name."""
BASE: Blend = ()


class EngineStopped(Exception):
    """The engine's thread has ended, and nobody answers any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of an answer are chosen."""

    max_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 1.0
    """0 takes the likeliest token each time; above, tokens are drawn."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Draw among this many of the likeliest tokens; 0 for all."""
    min_p: float = 0.0
    """Draw among tokens at least this likely in proportion to the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of prompt and answer are made less likely (CTRL, arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the answer holds."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token as often as the answer holds it."""
    seed: int | None = None
    """Seed of the draws, which then do not depend on what else is running; None for a new one."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, and are left out of it."""
    ignore_eos: bool = False
    """Go on after the model's own end token."""
    logprobs: int | None = None
    """Tell the log-probability of each token, and of this many alternatives."""

    def __post_init__(self) -> None:
        ranges = [
            ("max_tokens", self.max_tokens >= 1, "a whole number >= 1"),
            ("temperature", 0 <= self.temperature <= 100, "0 to 100"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k >= 0, "a whole number >= 0"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 100, "above 0, at most 100"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "-2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "-2 to 2"),
            ("seed", self.seed is None or -MAX_SEED <= self.seed < MAX_SEED, "a 64-bit number"),
            ("stop", len(self.stop) <= MAX_STOPS and all(self.stop), f"at most {MAX_STOPS} texts, none empty"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
        ]
        faults = [Fault(name, f"got {getattr(self, name)!r}", expected)
                  for name, right, expected in ranges if not right]
        if faults:
            raise ConfigError(*faults)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature == 0

    @property
    def plain(self) -> bool:
        """Whether the likeliest token of the logits as they are is all that is needed."""
        return (self.greedy and self.logprobs is None and self.repetition_penalty == 1
                and not self.presence_penalty and not self.frequency_penalty)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log-probability, before temperature and penalties, and the likeliest alternatives."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """What became of a sequence in one step: new text, its tokens, and at last why it ended."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    error: str = ""
    refused: bool = False
    """The error is an adapter's, and not the engine's."""
    reused: int = 0
    """Tokens of the prompt that were in the cache already; told with the first event."""


OnEvent = Callable[[Event], None]


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer in the making. The scheduler owns `place` and `computed`, the engine the rest."""

    number: int
    prompt: tuple[int, ...]
    blend: Blend
    params: SamplingParams
    on_event: OnEvent
    deadline: float = float("inf")
    written: list[int] = field(default_factory=list)
    place: int = -1
    """Its place in the cache while it runs."""
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    reused: int = 0

    @property
    def length(self) -> int:
        """Tokens so far, of prompt and answer."""
        return len(self.prompt) + len(self.written)

    @property
    def pending(self) -> int:
        """Tokens that are still to be computed: the rest of the prompt, or the one written last."""
        return self.length - self.computed

    @property
    def room(self) -> int:
        """The longest it can become."""
        return len(self.prompt) + self.params.max_tokens

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens of prompt and answer from `start` to before `end`."""
        split = len(self.prompt)
        if start >= split:
            return self.written[start - split:end - split]
        return [*self.prompt[start:end], *self.written[:max(0, end - split)]]
