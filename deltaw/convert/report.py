"""What a conversion wrote."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Dtype = Literal["f32", "f16", "bf16", "q8_0"]
DTYPES: tuple[Dtype, ...] = ("f32", "f16", "bf16", "q8_0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertReport:
    """One GGUF file."""

    out: Path
    kind: Literal["adapter", "model"]
    architecture: str
    """llama.cpp's name of it."""
    dtype: Dtype
    """The number format of its matrices."""
    tensors: int
    bytes: int
    """Size of the file."""
    tokenizer: str | None
    """What the tokenizer was taken from; None for an adapter, which has none."""
    alpha: float | None = None
    """An adapter's `adapter.lora.alpha`: llama.cpp multiplies by it over the rank."""
    rescaled: int = 0
    """How many of an adapter's factors carry a scale of their own, because alpha over their rank is not it."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "out": str(self.out)}
