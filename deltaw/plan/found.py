"""What is found where a network is laid out without values and a step is run on it: plain numbers.

They can be written and read as JSON, and need neither torch nor the network to be reckoned with.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from deltaw.plan.config import Method
from deltaw.plan.counts import Dimensions

Products = Counter[tuple[int, int, int, int]]
"""How often there is a matrix product of each (batch, M, N, K)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The sizes of a base."""

    values: int
    """Values of the base, a tied one once."""
    weights: int
    """Bytes of the base in its number format, buffers included."""
    matrices: int
    """Values of the matrices that a quantizer takes: linear layers that are no output layer."""
    largest_matrix: int
    largest_tensor: int
    """Values of the base's largest tensor."""
    tables: int
    """Values of the vocabulary's tables: the input embedding, and a language model's output layer if it is not tied."""
    table_rows: int
    """Rows of those."""
    head: int
    """Values of a classifier's head."""
    biases: int
    """Values that BitFit trains."""
    vocabulary: int
    positions: int | None
    """The longest sequence that it takes, where it states one."""
    quantized: str | None
    """The method by which its files are quantized already."""
    stated_item: int
    """Bytes of a value in the number format that its config states."""
    dims: Dimensions
    """The sizes that closed forms take."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, answer: dict[str, Any]) -> Network:
        """The same from plain JSON values."""
        return cls(**{**answer, "dims": Dimensions(**answer["dims"])})


class Place(NamedTuple):
    """One site of a low-rank change, as far as sizes go."""

    name: str
    rank: int
    """0 for a bias or a module that is trained in full."""
    each: int
    """Trained values of each rank; of a bias or a module, all of them."""
    most: int
    """The rank above which nothing is gained."""

    drawn: int = 0
    """Values of each rank beside those, of an A that stays as it was drawn."""

    def count(self, rank: int) -> int:
        """Trained values at another rank: low-rank factors grow with it, and the rest stays."""
        return self.each * rank if self.rank else self.each

    def to_json(self) -> list[Any]:
        """Plain JSON values."""
        return list(self) if self.drawn else list(self[:-1])


@dataclass(frozen=True, slots=True)
class Work:
    """What operations cost, by class. Matrix products by (batch, M, N, K), the others by the bytes they move."""

    products: Products = field(default_factory=Counter)
    attention: float = 0.0
    """Multiplications and additions inside fused attention."""
    moved: float = 0.0
    """Bytes read and written by everything that is no product."""
    calls: float = 0.0
    """Operations started."""
    frozen: Products = field(default_factory=Counter)
    """Products with frozen weights inside of kernels in C, where those are followed."""
    narrow: Products = field(default_factory=Counter)
    """Those of low-rank changes among them."""
    passes: float = 0.0
    """Bytes read and written by kernels in C that multiply no matrices."""
    drawn: float = 0.0
    """Random values, as a dropout's."""

    @property
    def flops(self) -> float:
        """Multiplications and additions of all products and of attention."""
        return self.attention + sum(2.0 * math.prod(shape) * times for products in self.all_products
                                    for shape, times in products.items())

    @property
    def all_products(self) -> tuple[Products, ...]:
        """Of each kind."""
        return self.products, self.frozen, self.narrow

    def __add__(self, other: Work) -> Work:
        return self.plus(other, 1.0)

    def plus(self, other: Work, times: float) -> Work:
        """This and `times` the other."""
        products, frozen, narrow = (_sum(*both, times) for both in zip(
            self.all_products, other.all_products, strict=True))
        return Work(products, self.attention + times * other.attention, self.moved + times * other.moved,
                    self.calls + times * other.calls, frozen, narrow, self.passes + times * other.passes,
                    self.drawn + times * other.drawn)

    def to_json(self) -> list[Any]:
        """Plain JSON values, products in their order."""
        products, frozen, narrow = ([[*shape, count] for shape, count in each.items()] for each in self.all_products)
        return [products, self.attention, self.moved, self.calls, frozen, narrow, self.passes, self.drawn]

    @classmethod
    def from_json(cls, answer: Sequence[Any]) -> Work:
        """The same from plain JSON values."""
        products, attention, moved, calls, frozen, narrow, passes, drawn = answer
        return cls(_counted(products), attention, moved, calls, _counted(frozen), _counted(narrow), passes, drawn)


def _sum(one: Products, other: Products, times: float) -> Products:
    both = Counter(one)
    for shape, count in other.items():
        both[shape] += count * times  # type: ignore[assignment]  # a share of a layer is no whole number
    return both


def _counted(products: Sequence[Any]) -> Products:
    return Counter({(b, m, n, k): count for b, m, n, k, count in products})


class Point(NamedTuple):
    """What a step is asked at."""

    method: Method
    batch: int
    length: int
    rank: int

    @classmethod
    def of(cls, method: Method, batch: int, length: int, rank: int) -> Point:
        """The point with the way of tuning whose step is the same, sizes apart that closed forms add."""
        kind: Method = "lora" if method == "qlora" else "preembed" if method in (
            "prelayer", "adapter-h", "adapter-l", "adapter-p") else method
        return cls(kind, batch, length, rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Bytes and work of one forward and backward pass, without logits and weights."""

    kept: float
    """Activations alive when the forward is done."""
    over: float
    """What the backward pass has alive on top of them at its highest."""
    forward: float
    """Most bytes alive in a forward pass that keeps nothing for a backward one."""
    work: Work
    """Of forward and backward."""
    forward_work: Work
    """Of the forward alone."""

    def grown(self, shorter: Step, times: float) -> Step:
        """This with `times` more of what it has over a shorter one. What is alive for a moment stays as it is."""
        return Step(kept=self.kept + times * (self.kept - shorter.kept), over=self.over, forward=self.forward,
                    work=self.work.plus(self.work.plus(shorter.work, -1.0), times),
                    forward_work=self.forward_work.plus(self.forward_work.plus(shorter.forward_work, -1.0), times))

    def to_json(self) -> list[Any]:
        """Plain JSON values."""
        return [self.kept, self.over, self.forward, self.work.to_json(), self.forward_work.to_json()]

    @classmethod
    def from_json(cls, answer: Sequence[Any]) -> Step:
        """The same from plain JSON values."""
        kept, over, forward, work, forward_work = answer
        return cls(kept=kept, over=over, forward=forward, work=Work.from_json(work),
                   forward_work=Work.from_json(forward_work))
