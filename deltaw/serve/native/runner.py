"""The runner that computes a whole step in the kernel: all rows of all sequences, with their adapters."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Rows
from typing import Any

import torch
from torch import Tensor

from deltaw.serve.banks import Banks
from deltaw.serve.native.build import library
from deltaw.serve.native.weights import LANES, ModelC, NativeModel
from deltaw.serve.places import Start
from deltaw.serve.scheduler import Chunk


class StepC(ctypes.Structure):
    """`Step` of rows.h."""

    _fields_ = (*((name, ctypes.c_int32) for name in ("rows", "kept", "banks", "narrow", "threads")),
                *((name, ctypes.c_void_p) for name in ("position", "place", "bank", "entry", "keep", "rank", "factors",
                                                       "x", "logits")))


class NativeRunner:
    """All tokens of a step in one call of the kernel."""

    reuses = True

    def __init__(self, model: Any, banks: Banks, *, places: int, capacity: int) -> None:
        self.native, self.banks = NativeModel(model, places=places, capacity=capacity), banks
        self._embed, self._vocabulary = model.get_input_embeddings(), model.lm_head.out_features
        self._step = library().step
        self._step.argtypes = (ctypes.POINTER(ModelC), ctypes.POINTER(StepC))
        self._table = torch.empty(0, dtype=torch.int64)
        self._ranks = torch.empty(0, dtype=torch.int32)
        self._version = -1
        self._merged: object = None
        narrow = self.native.narrow
        # Merged weights would need 32 bits where the base's, though fp32, fit in 16: twice as much to read.
        self.merges = not narrow or banks.dtype == torch.bfloat16
        self.says = (f"steps run in a kernel compiled here, {16 if narrow else 32} bits a weight, "
                     f"{self.native.nbytes / 2**20:.0f} MiB")

    def begin(self, start: Start) -> None:
        """Copy what can be reused from another place."""
        if start.copy_from is not None:
            for held in (self.native.keys_LPTGD, self.native.values_LPTGD):
                held[:, start.place, :start.reused] = held[:, start.copy_from, :start.reused]

    @torch.inference_mode()
    def run(self, chunks: Rows[Chunk]) -> tuple[list[Chunk], Tensor]:
        """One call for all chunks; the logits of the last token of those that complete their sequence."""
        if self._merged != self.banks.merged:
            self.native.refresh()
            self._merged = self.banks.merged
        ordered = sorted(chunks, key=lambda chunk: self.banks.order(chunk.sequence.blend))
        banks = sorted(self.banks.banks)
        rows: list[tuple[int, int, int, int]] = []
        keep, ids = [], []
        for chunk in ordered:
            sequence, (bank, entry) = chunk.sequence, self.banks.place(chunk.sequence.blend)
            number = -1 if bank is None else banks.index(bank.rank)
            rows += [(position, sequence.place, number, entry) for position in range(chunk.start, chunk.end)]
            ids += sequence.tokens(chunk.start, chunk.end)
            if chunk.completes:
                keep.append(len(rows) - 1)
        return [chunk for chunk in ordered if chunk.completes], self._call(ids, rows, keep)

    def _call(self, ids: list[int], rows: list[tuple[int, int, int, int]], keep: list[int]) -> Tensor:
        x_TH = self._embed(torch.tensor(ids)).float()
        of_rows = torch.tensor(list(zip(*rows, strict=True)), dtype=torch.int32)
        kept = torch.tensor(keep, dtype=torch.int32)
        padded = -(-max(1, len(keep)) // LANES) * LANES
        logits_BV = torch.empty(padded, -(-self._vocabulary // LANES) * LANES)
        self._look_up()
        step = StepC(len(rows), len(keep), len(self._ranks), self.banks.dtype == torch.bfloat16,
                     torch.get_num_threads(), *(of_rows[i].data_ptr() for i in range(4)), kept.data_ptr(),
                     self._ranks.data_ptr(), self._table.data_ptr(), x_TH.data_ptr(), logits_BV.data_ptr())
        if self._step(ctypes.byref(self.native.c), ctypes.byref(step)):
            raise MemoryError("not enough memory for a step")
        return logits_BV[:len(keep), :self._vocabulary]

    def _look_up(self) -> None:
        """Where the stacks of all sites are, (sites, banks, 2), if they are not where they were."""
        if self._version == self.banks.version:
            return
        self._version = self.banks.version
        banks = [self.banks.banks[rank] for rank in sorted(self.banks.banks)]
        stacks = [[bank.stacks.get(site) for bank in banks] for site in self.native.modules]
        addresses = [[(0, 0) if s is None else (s.A_PRI.data_ptr(), s.B_PRO.data_ptr()) for s in row] for row in stacks]
        self._table = torch.tensor(addresses, dtype=torch.int64).view(-1)
        self._ranks = torch.tensor([bank.rank for bank in banks], dtype=torch.int32)
