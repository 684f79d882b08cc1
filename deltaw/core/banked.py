"""Layers of one input whose adapters all lie in banks: what the kernel reads of an adapter is made once, and kept.

With dozens of adapters at hundreds of layers, asking each of them for its tensors takes as long as their products. Here
it is only asked whether it is still where it was. The numbers are those of `batched`, which takes all other cases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from deltaw.core import native_linear, native_low_rank
from deltaw.core.bank import Place
from deltaw.core.batched import Frozen
from deltaw.core.frozen import output_for
from deltaw.core.native_low_rank import Packed, Part, Segment, Target


class Slot(Protocol):
    """What is asked of an adapter's slot."""

    place: Place | None
    scaling: float


class Held(NamedTuple):
    """What an adapter has at a layer, when its entry was made."""

    slot: Slot
    place: Place
    scaling: float
    address: int
    """Of A."""

    @property
    def is_current(self) -> bool:
        """Whether nothing moved."""
        slot, place, scaling, address = self
        return slot.place is place and slot.scaling == scaling and place.factors[0].data_ptr() == address


@dataclass(frozen=True, slots=True)
class Entry:
    """What one adapter changes at the layers of an input."""

    held: Sequence[Held | None]
    parts: Sequence[Part]
    places: Sequence[Place]
    packed: bytes
    columns: int

    def is_of(self, name: str, slots: Sequence[Mapping[str, Slot]]) -> bool:
        """Whether it is still what the adapter has in these slots."""
        if len(slots) != len(self.held):
            return False
        for own, held in zip(slots, self.held, strict=True):
            slot = own.get(name)
            if held is None:
                if slot is not None:
                    return False
            elif slot is not held.slot or not held.is_current:
                return False
        return True

    @property
    def is_fresh(self) -> bool:
        """Whether it has no gradient here yet."""
        return all(place.is_fresh for place in self.places)


class Entries:
    """Every adapter's entry at the layers of one input, made when it is first asked for."""

    def __init__(self) -> None:
        self._kept: dict[str, Entry] = {}

    def __reduce__(self) -> tuple[type[Entries], tuple[()]]:
        """A copy of a model has other tensors: it starts with none."""
        return Entries, ()

    def of(self, name: str, slots: Sequence[Mapping[str, Slot]]) -> Entry | None:
        """An adapter's entry at layers with these slots; None where it does not lie in a bank as the kernel wants."""
        kept = self._kept.get(name)
        if kept is None or not kept.is_of(name, slots):
            kept = _entry([own.get(name) for own in slots])
            if kept is not None:
                self._kept[name] = kept
        return kept


def _entry(slots: Sequence[Slot | None]) -> Entry | None:
    held = [None if slot is None or slot.place is None else
            Held(slot, slot.place, slot.scaling, slot.place.factors[0].data_ptr()) for slot in slots]
    found = [(i, own) for i, own in enumerate(held) if own is not None]
    if not found or len(found) < sum(slot is not None for slot in slots):
        return None
    places = [own.place for _, own in found]
    parts = [Part(i, *own.place.factors, own.scaling) for i, own in found]
    columns = Segment(0, 0, parts).columns
    if columns > native_low_rank.WIDEST or any(t.dtype != torch.float32 for place in places
                                               for t in (*place.factors, *place.gradients)):
        return None
    packed = b"".join(native_low_rank.packed_part(part, Target(*place.gradients))
                      for part, place in zip(parts, places, strict=True))
    return Entry(held, parts, places, packed, columns)


def banked_linear(x: Tensor, layers: Sequence[Frozen], spans: Sequence[tuple[int, int]],
                  entries: Sequence[Entry]) -> tuple[Tensor, ...] | None:
    """The outputs (..., O) of layers of x (..., I), with an entry's change for each span of tokens; None where the
    kernel cannot be asked.

    Gradients of factors are written, or added, where the banks keep them.
    """
    if not (native_low_rank.takes(x) and entries and all(layer.outputs % 32 == 0 for layer in layers)):
        return None
    leaf = torch.zeros((), requires_grad=True)  # autograd has to be told that there is something to differentiate
    made: tuple[Tensor, ...] = _BankedLinear.apply(x, leaf, spans, entries, layers)  # type: ignore[no-untyped-call]
    return made


class _BankedLinear(torch.autograd.Function):
    """The node. What is kept of the layers are their frozen weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor, spans: Sequence[tuple[int, int]], entries: Sequence[Entry],
                layers: Sequence[Frozen]) -> tuple[Tensor, ...]:
        made = [output_for(x, layer.outputs) for layer in layers]
        W, b = [layer.W for layer in layers], [layer.b for layer in layers]
        segments = Packed(
            native_low_rank.packed_spans([(*span, len(e.parts)) for span, e in zip(spans, entries, strict=True)]),
            b"".join(entry.packed for entry in entries), max(entry.columns for entry in entries), wide=True)
        h_TC = native_linear.outputs(x.reshape(-1, x.shape[-1]), [y_TO for _, y_TO in made], W, b, segments)
        ctx.save_for_backward(x, h_TC)
        ctx.spans, ctx.entries, ctx.W, ctx.segments = spans, entries, W, segments
        ctx.set_materialize_grads(False)
        return tuple(y for y, _ in made)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 4
        if all(grad is None for grad in grads):
            return (None, *nothing)
        x, h_TC = ctx.saved_tensors
        x_TI, of_x = x.reshape(-1, x.shape[-1]), ctx.needs_input_grad[0]
        g = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        entries: Sequence[Entry] = ctx.entries
        once = len({id(entry) for entry in entries}) == len(entries)
        if once and all(t is not None for t in g) and all(entry.is_fresh for entry in entries):
            dx_TI = native_linear.through(x_TI, h_TC, g, ctx.W, ctx.segments, of_x=of_x)
            for entry in entries:
                for place in entry.places:
                    place.show()
        else:
            segments = [Segment(span[0], span[1], entry.parts) for span, entry in zip(ctx.spans, entries, strict=True)]
            dx_TI, _ = native_linear.gradients(x_TI, h_TC, g, ctx.W, segments, [
                place for entry in entries for place in entry.places], of_x=of_x)
        return (None if dx_TI is None else dx_TI.view(x.shape), *nothing)
