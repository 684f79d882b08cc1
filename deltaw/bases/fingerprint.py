"""Whether two loads of a base hold the same network: a hash of its names and shapes, and a few of its weights.

An adapter is a change to one frozen network; on another network of the same shapes it is noise that no shape check
sees. The fingerprint is stored with the adapter and compared when it is loaded. It costs milliseconds because it
reads 256 weights and not all of them: it tells different training runs of an architecture apart, and does not
detect that single weights were edited. A quantized weight is read through its codes, so that an adapter of a 4-bit base
is accepted on the same base in 16 bits, and the other way round. Hand it the base's own parameters: neither adapters
nor a head that is newly initialised at each load.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaw.core.packed import packed_tensor, wrapped
from deltaw.errors import AdapterFileError, Fault

SAMPLES = 256
TOLERANCE = 2.0**-7
"""Relative difference allowed: rounding to bfloat16 moves a weight by up to 2^-9, rounding twice by up to 2^-8."""
FLOOR = 2.0**-24
"""Absolute difference allowed beside it: float16 holds nothing between 0 and 2^-24."""
QUANTIZED_COSINE = 0.9
"""Least cosine between the samples of tensors that either side has quantized; 4-bit rounding keeps about 0.99."""
_ENOUGH = 8
"""Least number of such samples for a cosine to say anything."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What identifies a base. Two of them are compared with `compare`, not with ==."""

    architecture: str
    """SHA-256 over the sorted names and shapes of the parameters."""
    sample: tuple[float, ...]
    """Weights at fixed positions; NaN where a tensor cannot be read, empty when none can."""
    rounded: tuple[int, ...] = ()
    """Which of them come from quantized tensors."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` of it gives the same fingerprint."""
        values: dict[str, Any] = {"architecture": self.architecture,
                                  "sample": [x if math.isfinite(x) else None for x in self.sample]}
        return values | ({"rounded": list(self.rounded)} if self.rounded else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fingerprint:
        """The fingerprint written by `to_dict`; values of another form are an `AdapterFileError`."""
        architecture, sample, rounded = values.get("architecture"), values.get("sample"), values.get("rounded", [])
        if not isinstance(architecture, str) or not isinstance(sample, list) or not all(
            x is None or (isinstance(x, (int, float)) and not isinstance(x, bool)) for x in sample
        ) or not isinstance(rounded, list) or not all(type(i) is int for i in rounded):
            raise AdapterFileError(Fault("base fingerprint", "is damaged", "a hash and a list of numbers",
                                         "Save the adapter again, or load it with the check turned off"))
        return cls(architecture, tuple(math.nan if x is None else float(x) for x in sample), tuple(rounded))


def fingerprint(named_tensors: Iterable[tuple[str, Tensor]]) -> Fingerprint:
    """The fingerprint of a base with these parameters, as `model.named_parameters()` gives them.

    Works with tensors of any dtype, on any device, in any memory layout; a tensor on the meta device and one packed in
    an unknown way count for the architecture only.
    """
    tensors = sorted(named_tensors, key=lambda pair: pair[0])
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}\0{_logical_shape(tensor)}\n".encode())
    draws = _spread(tensors)
    drawn = [_element(tensor, _position(name, k, math.prod(_logical_shape(tensor)))) for name, tensor, k in draws]
    rounded = tuple(i for i, (_, tensor, _) in enumerate(draws) if not tensor.is_floating_point())
    present = [x for x in drawn if x is not None]
    if not present:
        return Fingerprint(digest.hexdigest(), ())
    device = present[0].device  # gathered before reading, so that a GPU is waited for once and not 256 times
    read = iter(torch.stack([x.to(device) for x in present]).tolist())
    return Fingerprint(digest.hexdigest(), tuple(math.nan if x is None else next(read) for x in drawn), rounded)


def compare(recorded: Fingerprint, current: Fingerprint) -> Fault | None:
    """What tells the two bases apart, or None when they are the same network.

    The architectures must be equal. The samples must agree to 2^-7, which any conversion between float32, bfloat16
    and float16 keeps; those of tensors that either side has quantized, to a cosine of 0.9. Positions that either side
    could not read are left out.
    """
    remedy = "Load the base that the adapter was trained on, or override the check if they are known to be the same"
    if recorded.architecture != current.architecture:
        return Fault("base", "has other parameter names or shapes", "the base that the adapter was made for", remedy)
    if not recorded.sample or not current.sample:
        return None
    if len(recorded.sample) != len(current.sample):
        return Fault("base", "cannot be compared: the fingerprint has another number of samples",
                     f"{len(current.sample)}, got {len(recorded.sample)}", remedy)
    rounded = {*recorded.rounded, *current.rounded}
    pairs: list[tuple[float, float]] = []
    coarse: list[tuple[float, float]] = []
    for i, (a, b) in enumerate(zip(recorded.sample, current.sample, strict=True)):
        if math.isfinite(a) and math.isfinite(b):
            (coarse if i in rounded else pairs).append((a, b))
    if len(coarse) >= _ENOUGH and _cosine(coarse) < QUANTIZED_COSINE:
        return Fault("base", f"has other weights: the sampled ones have a cosine of {_cosine(coarse):.2f}",
                     f"at least {QUANTIZED_COSINE} after quantization", remedy)
    wrong = sum(abs(a - b) > TOLERANCE * max(abs(a), abs(b)) + FLOOR for a, b in pairs)
    if not wrong:
        return None
    return Fault("base", f"has other weights: {wrong} of {len(pairs)} sampled ones differ",
                 "the weights that the adapter was trained on", remedy)


def _spread(tensors: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor, int]]:
    """Up to SAMPLES draws (name, tensor, number of the draw), as even over the tensors as can be."""
    filled = [(name, tensor) for name, tensor in tensors if tensor.numel()]
    if len(filled) >= SAMPLES:
        picked = [filled[i * len(filled) // SAMPLES] for i in range(SAMPLES)]
        return [(name, tensor, 0) for name, tensor in picked]
    return [(*filled[i % len(filled)], i // len(filled)) for i in range(SAMPLES)] if filled else []


def _position(name: str, draw: int, numel: int) -> int:
    """A fixed place in a tensor that depends on its name only; hashing spreads the places over rows and columns."""
    return int.from_bytes(hashlib.sha256(f"{name}\0{draw}".encode()).digest()[:8], "big") % numel


def _element(tensor: Tensor, position: int) -> Tensor | None:
    """One element as a 0-dimensional float32 tensor, or None where it cannot be read as a weight."""
    if tensor.is_meta or wrapped(tensor):
        return None
    if not tensor.is_floating_point():
        packed = packed_tensor(tensor)
        return None if packed is None else packed.element(position)
    index = []
    for size in reversed(tensor.shape):  # row-major, without a copy of a strided tensor
        position, at = divmod(position, size)
        index.append(at)
    return tensor.detach()[tuple(reversed(index))].float()


def _logical_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the weight, also where a quantizer has packed it into bytes."""
    packed = packed_tensor(tensor)
    return tuple(tensor.shape) if packed is None else packed.shape


def _cosine(pairs: Sequence[tuple[float, float]]) -> float:
    norms = math.sqrt(sum(a * a for a, _ in pairs)) * math.sqrt(sum(b * b for _, b in pairs))
    return sum(a * b for a, b in pairs) / norms if norms else 1.0
