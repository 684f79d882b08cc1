"""A vocabulary's tables in 8 bits: the embedding that looks rows up, and the output layer that is often tied to it.

    W[v] = codes[v] · absmax[v] / 127        codes (V, I) int8, absmax (V,) float32

A lookup unpacks the rows that it finds. The product of the output layer reads codes where its kernel can, and else
unpacks a strip of rows at a time into memory that is used again (`packed.Packed.strips`), forward and backward, so that
W never exists whole; only a compiler, which lays out memory itself, and a state dict, which has to hold plain numbers,
are given all of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core import native_low_rank
from deltaw.core.frozen import Stripped, frozen_linear
from deltaw.core.native_weight import FrozenLayer
from deltaw.core.packed import Int8Rows, Packed, Workspace, packed_tensor, places_of_strips
from deltaw.core.stretches import STRIP

_WORKSPACE = Workspace()
"""Where output layers are unpacked: one for the process, since a model has one of them."""


@torch.no_grad()
def pack_rows(W_RI: Tensor) -> tuple[Tensor, Tensor]:
    """The int8 codes (R, I) of some rows and each one's largest number (R,), float32; worked out in float32."""
    wide_RI = W_RI.to(torch.float32, copy=True)
    absmax_R = wide_RI.abs().amax(1)
    # A row of zeros has no scale; one that is not finite keeps an absmax that shows it.
    step_R1 = absmax_R.div(127.0).clamp_(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    return wide_RI.div_(step_R1).round_().clamp_(-127, 127).to(torch.int8), absmax_R


def pack_table(W: Any, shape: tuple[int, int], device: torch.device) -> Int8Rows:
    """A table (V, I) of float numbers, packed a strip of rows at a time; W gives rows by `W[start:stop]`."""
    codes, absmax = torch.empty(shape, dtype=torch.int8), torch.empty(shape[0])
    rows = max(1, STRIP // 4 // shape[1])
    for start in range(0, shape[0], rows):
        part = slice(start, min(start + rows, shape[0]))
        codes[part], absmax[part] = (t.cpu() for t in pack_rows(W[part.start:part.stop]))
    return Int8Rows(codes.to(device), absmax.to(device))


class PackedTable(nn.Module):
    """What an embedding and an output layer over codes have in common."""

    weight: Int8Rows
    dtype: torch.dtype
    """The number format that W is unpacked into."""

    @property
    def packed(self) -> Packed:
        """W as it is stored."""
        found = packed_tensor(self.weight)
        assert found is not None  # an Int8Rows
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move the scales with the codes; a change of the number format leaves both as they are."""
        moved = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not self.weight.is_meta:
            self.weight.absmax = self.weight.absmax.to(self.weight.device)
        return moved

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Plain numbers in the weight's place: codes without their scales would be read as a weight."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.weight.is_meta and not keep_vars:
            destination[f"{prefix}weight"] = _shared_dense(self.weight, self.packed, self.dtype)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Pack a weight of plain numbers; copying it into the codes would cut it to whole numbers, without a word."""
        given = state_dict.get(f"{prefix}weight")
        if given is not None and given.is_floating_point() and given.shape == self.weight.shape:
            again = pack_table(given, (given.shape[0], given.shape[1]), self.weight.device)
            with torch.no_grad():
                self.weight.absmax.copy_(again.absmax)
            state_dict = {**state_dict, f"{prefix}weight": again.data}
        super()._load_from_state_dict(state_dict, prefix, *args)


class PackedEmbedding(PackedTable, nn.Embedding):  # type: ignore[misc]  # its weight is codes
    """The rows (..., I) of ids (...), in `dtype`; times `embed_scale`, where the host's class has one (Gemma)."""

    def __init__(self, like: nn.Embedding, weight: Int8Rows, dtype: torch.dtype, scale: float | None) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = like.num_embeddings, like.embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = like.padding_idx, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        self.weight, self.dtype = weight, dtype
        # The host's class rounds its scale to the weight's format. While a skeleton is made, "meta" is the default.
        self.embed_scale = 1.0 if scale is None else float(torch.tensor(scale, device="cpu").to(dtype))

    def forward(self, input: Tensor) -> Tensor:
        """The rows of these ids."""
        rows = self.packed.rows(input, self.dtype)
        return rows if self.embed_scale == 1.0 else rows * self.embed_scale


class PackedHead(PackedTable, nn.Linear):  # type: ignore[misc]
    """Logits (..., V) = h Wᵀ + b of hidden states (..., I); W is unpacked a strip at a time, once in each pass."""

    def __init__(self, like: nn.Linear, weight: Int8Rows, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.weight, self.bias, self.dtype = weight, like.bias, dtype

    def forward(self, input: Tensor) -> Tensor:
        """The logits."""
        if not input.numel():
            return input.new_empty(*input.shape[:-1], self.out_features)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        if torch.compiler.is_compiling():
            return nn.functional.linear(input, self.packed.dense(input.dtype), bias)
        return frozen_linear(input, Stripped(self.packed, _WORKSPACE), bias)


def head_strips(head: PackedHead, x_NI: Tensor) -> Iterator[tuple[slice, Tensor | Stripped]]:
    """The rows (R, I) of an output layer's W in turn, as products with x take them, with their place in W.

    They are codes where the products' kernel reads those, and else a strip in x's format that is good until the next.
    """
    packed = head.packed
    if not (native_low_rank.takes(x_NI) and FrozenLayer(packed).fits(x_NI)):
        yield from packed.strips(x_NI.dtype, _WORKSPACE)
        return
    for rows in places_of_strips(*packed.shape):
        yield rows, Stripped(packed.part(rows), _WORKSPACE)


def _shared_dense(weight: Int8Rows, packed: Packed, dtype: torch.dtype) -> Tensor:
    """All of W; one tensor for both that are tied, while somebody holds it, so that it is saved once."""
    found = None if weight.dense is None else weight.dense()
    if found is None or found.dtype != dtype:
        found = packed.dense(dtype)
        weight.dense = weakref.ref(found)
    return found
