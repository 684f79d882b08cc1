"""A step as a form: what it keeps and computes at any batch, length, rank and number of supervised tokens.

Every size in a step is a polynomial of those four, since every tensor is: activations grow with batch · length, masks
with its product with the length once more, low-rank products with the rank. A peak is the largest of several
polynomials, one for each moment that can be the highest. The coefficients are whole numbers, found from steps at some
points (`deltaw.plan.fitted`), so that a form says what a walk would to the last bit, within the range that it states.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from deltaw.plan.found import Products, Step, Work

Polynomial = Mapping[str, int]
"""Coefficients by product, one letter for each factor: {"": 5, "BTT": 2} is 5 + 2·B·T². Letters are `At`'s fields."""


class At(NamedTuple):
    """What a form is asked at."""

    B: int
    """Examples."""
    T: int
    """Tokens of each."""
    r: int
    """Rank."""
    S: int
    """Supervised tokens of all of them."""

    def products(self, names: Iterable[str]) -> Iterator[int]:
        """What these products are here."""
        for name in names:
            product = 1
            for letter in name:
                product *= getattr(self, letter)
            yield product

    def value(self, polynomial: Polynomial) -> int:
        """What the polynomial is here.

        >>> At(B=8, T=10, r=4, S=80).value({"": 5, "BTT": 2})
        1605
        """
        return sum(c * p for c, p in zip(polynomial.values(), self.products(polynomial), strict=True))


class WorkForm(NamedTuple):
    """`Work` by polynomials: products as their four sizes and how often they are, in the order heard."""

    products: Sequence[Sequence[Polynomial]]
    attention: Polynomial
    moved: Polynomial
    calls: Polynomial
    frozen: Sequence[Sequence[Polynomial]]
    narrow: Sequence[Sequence[Polynomial]]
    passes: Polynomial
    drawn: Polynomial

    def at(self, at: At) -> Work:
        """The work here."""
        return Work(_products_at(self.products, at), float(at.value(self.attention)), float(at.value(self.moved)),
                    float(at.value(self.calls)), _products_at(self.frozen, at), _products_at(self.narrow, at),
                    float(at.value(self.passes)), float(at.value(self.drawn)))


def _products_at(products: Sequence[Sequence[Polynomial]], at: At) -> Products:
    found: Products = Counter()
    for sizes in products:
        batch, rows, outputs, inner, times = map(at.value, sizes)
        found[batch, rows, outputs, inner] += times
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A step of one way of tuning of one base."""

    least: Sequence[int]
    """Batch, length and rank from which on it holds."""
    most: Sequence[Any]
    """Batch, length and rank up to which it was seen to hold; None for any."""
    kept: Polynomial
    over: Sequence[Polynomial]
    """One for each moment that can be the backward pass's highest."""
    forward: Sequence[Polynomial]
    work: WorkForm
    forward_work: WorkForm

    def covers(self, at: At) -> bool:
        """Whether it says what a walk would."""
        return all(low <= n and (high is None or n <= high)
                   for low, n, high in zip(self.least, at, self.most, strict=False))

    def step(self, at: At) -> Step:
        """The step here."""
        return Step(kept=float(at.value(self.kept)), over=float(max(map(at.value, self.over))),
                    forward=float(max(map(at.value, self.forward))), work=self.work.at(at),
                    forward_work=self.forward_work.at(at))

    def to_json(self) -> list[Any]:
        """Plain JSON values."""
        return [self.least, self.most, self.kept, self.over, self.forward, self.work, self.forward_work]

    @classmethod
    def from_json(cls, answer: Sequence[Any]) -> Form:
        """The same from plain JSON values."""
        least, most, kept, over, forward, work, forward_work = answer
        return cls(least=least, most=most, kept=kept, over=over, forward=forward, work=WorkForm(*work),
                   forward_work=WorkForm(*forward_work))


def read_step(forms: Iterable[Sequence[Any]], at: At) -> Step:
    """The step that the first of these forms says that covers this; LookupError where none does."""
    form = next((form for form in map(Form.from_json, forms) if form.covers(at)), None)
    if form is None:
        raise LookupError(at)
    return form.step(at)
