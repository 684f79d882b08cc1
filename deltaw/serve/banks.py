"""The factors of the adapters that run, stacked, and the linear layers that add their changes to a row of tokens.

A step's tokens lie in one row, sorted by adapter. At each linear layer the tokens of all adapters run in two batched
products over stacks A (P, R, I) and s·Bᵀ (P, R, O), whose entries are copied once when an adapter begins to run and not
at every step. Adapters of similar rank share a stack, padded to the next power of two, so that a rank of 64 beside one
of 8 costs the latter nothing. A stretch of many tokens of one adapter (a prompt) runs as two plain products. A blend is
an adapter like any other: Σ w·s·BA = [B₁ B₂ …][A₁; A₂; …], of the ranks' sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.serve.request import BASE, Blend

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""A (R, I) and s·Bᵀ (R, O) by site."""
FEW = 2
"""Up to so many adapters, a product for each is as fast as batched ones."""
SPARSE = 3
"""Run adapters one by one where their stretch of the stack is this many times their number."""


@dataclass(slots=True)
class Stack:
    """The factors of one site: (P, R, I) and (P, R, O), zeros where an adapter has none."""

    A_PRI: Tensor
    B_PRO: Tensor


@dataclass(slots=True)
class Bank:
    """All stacks of one rank, and who is where in them."""

    rank: int
    entries: list[Blend | None] = field(default_factory=list)
    stacks: dict[str, Stack] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `a` to before `b`, all of one entry."""

    bank: Bank
    a: int
    b: int
    entry: int

    def add(self, y_TO: Tensor, x_TI: Tensor, stack: Stack) -> None:
        """Add the change to y, in place."""
        h = x_TI[self.a:self.b] @ stack.A_PRI[self.entry].t()
        y_TO[self.a:self.b].addmm_(h, stack.B_PRO[self.entry])


@dataclass(frozen=True, slots=True)
class Group:
    """Tokens `a` to before `b`, of the entries `first` to before `last`."""

    bank: Bank
    a: int
    b: int
    first: int
    last: int
    spread: Tensor | None
    """(P·C,): which token goes to which row of the padded batch; None where each entry has exactly one, in order."""
    gather: Tensor | None
    """(b - a,): where each token's result is in it."""

    def add(self, y_TO: Tensor, x_TI: Tensor, stack: Stack) -> None:
        """Add the changes to y, in place."""
        x, entries = x_TI[self.a:self.b], self.last - self.first
        x_PCI = (x if self.spread is None else x.index_select(0, self.spread)).view(entries, -1, x.shape[-1])
        h_PCR = torch.bmm(x_PCI, stack.A_PRI[self.first:self.last].transpose(1, 2))
        out = torch.bmm(h_PCR, stack.B_PRO[self.first:self.last]).flatten(0, 1)
        y_TO[self.a:self.b].add_(out if self.gather is None else out.index_select(0, self.gather))


class Banks:
    """The stacks of a model's linear layers, and what the next row of tokens needs of them."""

    def __init__(self, modules: Mapping[str, nn.Module], *, dtype: torch.dtype, device: torch.device) -> None:
        self.modules, self.dtype, self.device = modules, dtype, device
        self.banks: dict[int, Bank] = {}
        self.where: dict[Blend, tuple[Bank, int]] = {}
        self.tokens = 0
        self.parts: list[Segment | Group] = []
        self.last_parts: list[Segment | Group] = []
        """The parts where only the last token of each sequence is left: at the output layer."""
        self.merged: Blend | None = None
        """The blend that is in the weights, and adds nothing here."""
        self.version = 0
        """Changes whenever a stack lies somewhere else than before."""
        self._hooked: set[str] = set()

    # -- who is in memory --------------------------------------------------------------------------------------------

    def enter(self, blend: Blend, factors: Factors, running: Iterable[Blend]) -> None:
        """Put a blend's factors in place, where it is not yet; entries of blends that do not run are given away."""
        if blend == BASE or blend in self.where or not factors:
            return
        rank = padded(max(A.shape[0] for A, _ in factors.values()))
        bank = self.banks.setdefault(rank, Bank(rank))
        entry = self._vacant(bank, set(running))
        for site in factors.keys() - bank.stacks.keys():
            self.version += 1
            A_RI, B_RO = factors[site]
            bank.stacks[site] = Stack(*(torch.zeros(len(bank.entries), rank, f.shape[1], dtype=self.dtype,
                                                    device=self.device) for f in (A_RI, B_RO)))
            self._hook(site)
        for site, stack in bank.stacks.items():
            for whole, part in zip((stack.A_PRI, stack.B_PRO), factors.get(site, (None, None)), strict=True):
                used = 0 if part is None else part.shape[0]
                if part is not None:
                    whole[entry, :used] = part
                if used < rank:
                    whole[entry, used:] = 0
        bank.entries[entry], self.where[blend] = blend, (bank, entry)  # at last: nobody finds what was half copied

    def forget(self, number: int) -> None:
        """Give away the entries of all blends with this adapter."""
        for blend in [blend for blend in self.where if any(number == n for n, _ in blend)]:
            bank, entry = self.where.pop(blend)
            bank.entries[entry] = None

    @property
    def nbytes(self) -> int:
        """Bytes of all stacks."""
        return sum(s.A_PRI.nbytes + s.B_PRO.nbytes for bank in self.banks.values() for s in bank.stacks.values())

    def _vacant(self, bank: Bank, running: set[Blend]) -> int:
        """An entry that nobody needs, making room for more where there is none."""
        for entry, blend in enumerate(bank.entries):
            if blend is None or blend not in running:
                if blend is not None:
                    del self.where[blend]
                bank.entries[entry] = None
                return entry
        size = len(bank.entries)
        bank.entries += [None] * max(1, size)
        self.version += 1
        for stack in bank.stacks.values():
            stack.A_PRI, stack.B_PRO = (torch.cat([whole, torch.zeros(len(bank.entries) - size, *whole.shape[1:],
                                        dtype=whole.dtype, device=whole.device)]) for whole in (stack.A_PRI,
                                                                                               stack.B_PRO))
        return size

    # -- a step ------------------------------------------------------------------------------------------------------

    def order(self, blend: Blend) -> tuple[int, int]:
        """By what the sequences of a row are to be sorted: the base first, then by stack and entry."""
        bank, entry = self.place(blend)
        return (0, -1) if bank is None else (bank.rank, entry)

    def place(self, blend: Blend) -> tuple[Bank | None, int]:
        """Where a blend's factors are; no bank where it adds nothing."""
        return (None, -1) if blend == self.merged else self.where.get(blend, (None, -1))

    def lay_out(self, rows: Sequence[tuple[Blend, int]], complete: Sequence[int] = ()) -> None:
        """Say whose the tokens of the next row are: blends with their numbers of tokens, those of one token first.

        `complete` are the sequences whose last token alone reaches the output layer.
        """
        self.tokens = sum(length for _, length in rows)
        self.parts = self._parts([(blend, length, length == 1) for blend, length in rows])
        self.last_parts = self._parts([(rows[i][0], 1, rows[i][1] == 1) for i in complete])

    def clear(self) -> None:
        """Add nothing until the next `lay_out`."""
        self.parts, self.last_parts = [], []

    def _parts(self, rows: Sequence[tuple[Blend, int, bool]]) -> list[Segment | Group]:
        """The parts of a row: blends with their numbers of tokens, and whether they may run in a group."""
        parts: list[Segment | Group] = []
        at = 0
        singles: dict[int, tuple[Bank, int, list[int]]] = {}
        for blend, length, is_single in rows:
            if blend in self.where and blend != self.merged:
                bank, entry = self.where[blend]
                if is_single:
                    singles.setdefault(bank.rank, (bank, at, []))[2].append(entry)
                else:
                    parts.append(Segment(bank, at, at + length, entry))
            at += length
        for bank, start, entries in singles.values():
            parts += _grouped(bank, start, entries, self.device)
        return parts

    def _hook(self, site: str) -> None:
        """Let a linear layer add the changes of whoever runs."""
        if site in self._hooked:
            return
        self._hooked.add(site)
        module: Any = self.modules[site]
        inner = module.forward

        def forward(x: Tensor) -> Tensor:
            y: Tensor = inner(x)
            if self.parts:
                y_TO, x_TI = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
                for part in self.parts if len(x_TI) == self.tokens else self.last_parts:
                    stack = part.bank.stacks.get(site)
                    if stack is not None:
                        part.add(y_TO, x_TI, stack)
            return y

        module.forward = forward


def _grouped(bank: Bank, start: int, entries: list[int], device: torch.device) -> list[Segment | Group]:
    """Single tokens from `start` on, of these entries in order, as one group or as a segment for each entry."""
    unique = sorted(set(entries))
    first, last, end = unique[0], unique[-1] + 1, start + len(entries)
    most = max(entries.count(entry) for entry in unique)
    if len(unique) <= FEW or last - first > SPARSE * len(unique):
        counts = [entries.count(entry) for entry in unique]
        starts = [start + sum(counts[:i]) for i in range(len(unique))]
        return [Segment(bank, a, a + n, entry) for a, n, entry in zip(starts, counts, unique, strict=True)]
    if entries == list(range(first, last)):
        return [Group(bank, start, end, first, last, None, None)]
    spread, gather = [0] * ((last - first) * most), []
    for i, entry in enumerate(entries):
        row = (entry - first) * most + entries[:i].count(entry)
        spread[row] = i
        gather.append(row)
    return [Group(bank, start, end, first, last, torch.tensor(spread, device=device),
                  torch.tensor(gather, device=device))]


def padded(rank: int) -> int:
    """The next power of two, at least 8.

    >>> padded(3), padded(8), padded(20)
    (8, 8, 32)
    """
    return max(8, 1 << (rank - 1).bit_length())


def blended(parts: Sequence[tuple[Factors, float]]) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of a weighted sum of adapters."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for site in dict.fromkeys(site for factors, _ in parts for site in factors):
        present = [(factors[site], weight) for factors, weight in parts if site in factors]
        found[site] = (torch.cat([A for (A, _), _ in present]), torch.cat([B * weight for (_, B), weight in present]))
    return found
