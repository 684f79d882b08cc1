"""Which number format a base is loaded and computed in, and why.

bfloat16 halves the memory of a base, but a CPU without bfloat16 instructions converts every operand in software, so
that each step becomes several times slower than in float32. "auto" therefore looks at the processor before it
chooses. The reason is returned with the choice, to be shown and logged: precision is never a silent decision.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from deltaw.errors import ConfigError, Fault, near

_NAMES: Mapping[str, torch.dtype] = {
    "float32": torch.float32, "fp32": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}
# What torch calls the instructions that multiply bfloat16 without converting it first.
_NATIVE_BF16 = ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16")


def choose_dtype(requested: str | torch.dtype, device: str | torch.device) -> tuple[torch.dtype, str]:
    """The dtype to load a base in on `device`, and the reason in a few words.

    `requested` is "auto", a name ("bf16", "float32", ...) or a dtype; anything but "auto" is honoured. "auto" is
    bfloat16 where the device multiplies it natively and float32 elsewhere. An unknown name is a `ConfigError`.

    >>> choose_dtype("bf16", "cpu")
    (torch.bfloat16, 'asked for')
    """
    dtype = _parse(requested)
    if dtype is not None:
        return dtype, "asked for"
    kind = torch.device(device).type
    if kind == "cuda":
        # Compute capability 8.0 (Ampere) is the first with bfloat16 matrix units; older cards emulate it.
        if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU multiplies bfloat16 natively"
        return torch.float32, "this GPU has no native bfloat16"
    if kind == "cpu":
        found = native_bf16(torch.cpu.get_capabilities())
        if found:
            return torch.bfloat16, f"this CPU multiplies bfloat16 natively ({found})"
        return torch.float32, "this CPU has no bfloat16 instructions, and bfloat16 would be slower than float32"
    return torch.float32, f"float32 is exact and works everywhere; no faster choice is known for '{kind}'"


def native_bf16(capabilities: Mapping[str, object]) -> str:
    """The name of the CPU's bfloat16 instructions in `torch.cpu.get_capabilities()`, or "" when it has none."""
    return next((name for name in _NATIVE_BF16 if capabilities.get(name)), "")


def _parse(requested: str | torch.dtype) -> torch.dtype | None:
    """The dtype meant, or None for "auto"."""
    if isinstance(requested, torch.dtype):
        if requested in _NAMES.values():
            return requested
    elif requested == "auto":
        return None
    elif requested in _NAMES:
        return _NAMES[requested]
    raise ConfigError(Fault("dtype", f"got {requested!r}", "auto, " + ", ".join(_NAMES),
                            near(str(requested), ["auto", *_NAMES])))
