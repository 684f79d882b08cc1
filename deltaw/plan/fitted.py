"""Forms of steps, found from steps: walks at a few points give the coefficients, walks at others confirm them.

A peak is the highest of many moments, and which one it is differs from point to point. So every moment that was heard
gets its polynomial, and of those only the ones are kept that no other exceeds in every coefficient. Some networks look
at their examples one by one, and have the more moments the more examples there are: so a form is first found for each
of two batches, and what has as many terms in both is taken to grow evenly from one to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from typing import Any

from deltaw.errors import BaseModelError
from deltaw.plan.forms import At, Form, Polynomial, WorkForm
from deltaw.plan.found import Work
from deltaw.plan.step import Heard

Look = Callable[[At], Heard]
"""Runs a step."""
BATCHES = (7, 11)
"""Two batches: like all that follows no sizes of a layer, so that no two products look the same by chance."""
_TERMS = {"": (101, 1), "T": (211, 1), "TT": (307, 1), "r": (101, 3), "Tr": (211, 3), "S": (101, 1)}
"""By product the length and the rank (in fives) of the point that is looked at for its sake."""
_CHECKED = (At(8, 512, 8, 4096), At(3, 64, 16, 55), At(13, 37, 1, 400), At(2, 2, 2, 3))
LONGEST = (131072, 4095, 1024, 512)
"""Lengths up to which a form may hold: networks change their ways at a window, or end at their last position."""
RANKS = (256, 128, 64, 32, 16)
"""The same of ranks: wide low-rank products are made again instead of kept."""


class Unlike(Exception):
    """No form describes these steps; nobody's fault."""


def find_forms(look: Look, *, ranked: bool, learned: bool) -> list[Form]:
    """Forms that say what `look` does; none where it follows none. `ranked` and `learned`: r and S count at all."""
    terms = [t for t in _TERMS if (ranked or "r" not in t) and (learned or "S" not in t)]
    found: list[Form] = []
    with suppress(Unlike, BaseModelError):
        forms = {b: _form_of(b, terms, look) for b in BATCHES}
        several = _bounded(replace(_joined(forms), least=[2, 2, 1]), look, ranked)
        if several is not None and all(_agrees(several, look, at) for at in _CHECKED):
            also_one = replace(several, least=[1, 2, 1])
            if all(_agrees(also_one, look, At(1, n, 8, n)) for n in (2, 64, several.most[1])):
                return [also_one]
            found.append(several)
    with suppress(Unlike, BaseModelError):
        one = _bounded(replace(_form_of(1, terms, look), most=[1, None, None]), look, ranked)
        found += [one] if one is not None and _agrees(one, look, At(1, 64, 8, 64)) else []
    return found


def _bounded(form: Form, look: Look, ranked: bool) -> Form | None:
    """The form up to the largest length and rank where it was seen to hold; None where that is nowhere."""
    batch = form.least[0]
    longest = next((n for n in LONGEST if _agrees(form, look, At(batch, n, 8, batch * n))), None)
    if longest is None:
        return None
    ranks = (r for r in RANKS if _agrees(form, look, At(batch, longest, r, batch * longest)))
    return replace(form, most=[form.most[0], longest, next(ranks, 8) if ranked else None])


def _agrees(form: Form, look: Look, at: At) -> bool:
    try:
        return look(at).step == form.step(at)
    except BaseModelError:
        return False


def _form_of(batch: int, terms: Sequence[str], look: Look) -> Form:
    """The form of steps of this many examples; what grows with their number stands in it as a plain number."""
    points = [At(batch, n, 5 * fives, batch * n // (3 if term == "S" else 1))
              for term in terms for n, fives in [_TERMS[term]]]
    inverse = _inverse([[Fraction(p) for p in at.products(terms)] for at in points])
    heard = [look(at) for at in points]

    def fit(values: Sequence[float]) -> Polynomial:
        solved = (sum((row[i] * Fraction(v) for i, v in enumerate(values)), Fraction()) for row in inverse)
        return {term: c for term, c in zip(terms, map(_whole, solved), strict=True) if c}

    def fit_each(values: Iterable[Sequence[float]]) -> list[Polynomial]:
        lists = list(values)
        if len({len(each) for each in lists}) != 1:
            raise Unlike
        return [fit(moment) for moment in zip(*lists, strict=True)]

    def fit_work(name: str) -> WorkForm:
        works: list[Work] = [getattr(h.step, name) for h in heard]

        def fit_products(kind: str) -> list[list[Polynomial]]:
            sizes = fit_each([n for shape, times in getattr(w, kind).items() for n in (*shape, times)] for w in works)
            return [sizes[i:i + 5] for i in range(0, len(sizes), 5)]

        return WorkForm(fit_products("products"), fit([w.attention for w in works]), fit([w.moved for w in works]),
                        fit([w.calls for w in works]), fit_products("frozen"), fit_products("narrow"),
                        fit([w.passes for w in works]), fit([w.drawn for w in works]))

    return Form(least=[1, 2, 1], most=[None, None, None], kept=fit([h.step.kept for h in heard]),
                over=_highest(fit_each(h.over for h in heard)), forward=_highest(fit_each(h.forward for h in heard)),
                work=fit_work("work"), forward_work=fit_work("forward_work"))


def _highest(moments: Iterable[Polynomial]) -> list[Polynomial]:
    """Those that another does not exceed everywhere, since none of its coefficients is smaller."""
    different = list({tuple(sorted(p.items())): p for p in moments}.values())
    return [p for p in different if not any(
        q is not p and all(q.get(t, 0) >= p.get(t, 0) for t in {*p, *q}) for q in different)]


def _joined(forms: dict[int, Form]) -> Form:
    """One form of those of two batches: each number in it becomes one that grows evenly with B."""
    (low, one), (high, other) = forms.items()

    def line(p: Polynomial, q: Polynomial) -> Polynomial:
        slopes = {t: _whole(Fraction(q.get(t, 0) - p.get(t, 0), high - low)) for t in dict.fromkeys((*p, *q))}
        return ({t: c for t, s in slopes.items() if (c := p.get(t, 0) - s * low)}
                | {f"B{t}": s for t, s in slopes.items() if s})

    def join(a: Any, b: Any) -> Any:
        if isinstance(a, dict):
            return line(a, b)
        if len(a) != len(b):
            raise Unlike
        return [join(x, y) for x, y in zip(a, b, strict=True)]

    return Form.from_json([one.least, one.most, *(
        join(a, b) for a, b in zip(one.to_json()[2:], other.to_json()[2:], strict=True))])


def _whole(value: Fraction) -> int:
    if value.denominator != 1:
        raise Unlike
    return value.numerator


def _inverse(rows: list[list[Fraction]]) -> list[list[Fraction]]:
    """The inverse of a matrix, exactly."""
    size = len(rows)
    both = [[*row, *(Fraction(i == j) for j in range(size))] for i, row in enumerate(rows)]
    for i in range(size):
        pivot = next(k for k in range(i, size) if both[k][i])
        both[i], both[pivot] = both[pivot], both[i]
        both[i] = [v / both[i][i] for v in both[i]]
        for k in range(size):
            if k != i and both[k][i]:
                both[k] = [v - both[k][i] * w for v, w in zip(both[k], both[i], strict=True)]
    return [row[size:] for row in both]
