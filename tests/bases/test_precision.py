"""The dtype policy, with the processor's capabilities given as data."""

from __future__ import annotations

import pytest
import torch

from deltaw.bases import precision
from deltaw.bases.precision import choose_dtype, native_bf16
from deltaw.errors import ConfigError


@pytest.mark.parametrize(("name", "dtype"), [
    ("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16), ("float32", torch.float32),
    (torch.float16, torch.float16),
])
def test_an_explicit_request_is_honoured(name, dtype):
    assert choose_dtype(name, "cpu") == (dtype, "asked for")


@pytest.mark.parametrize(("capabilities", "expected"), [
    ({"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, ""),
    ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, "avx512_bf16"),
    ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": True}, "amx_bf16"),
    ({"architecture": "aarch64", "neon": True, "bf16": True}, "bf16"),
    ({}, ""),
])
def test_native_bf16_is_read_from_the_instructions(capabilities, expected):
    assert native_bf16(capabilities) == expected


@pytest.mark.parametrize(("found", "dtype", "says"), [
    ("", torch.float32, "no bfloat16"), ("amx_bf16", torch.bfloat16, "amx_bf16"),
])
def test_auto_on_a_cpu_follows_the_instructions(monkeypatch, found, dtype, says):
    monkeypatch.setattr(precision, "native_bf16", lambda capabilities: found)
    chosen, reason = choose_dtype("auto", "cpu")
    assert chosen == dtype
    assert says in reason


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_on_a_gpu_asks_for_native_support(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert choose_dtype("auto", "cuda:0")[0] == dtype


def test_an_unknown_dtype_is_refused_with_its_near_match():
    with pytest.raises(ConfigError, match="Did you mean bfloat16"):
        choose_dtype("bfloat_16", "cpu")
    with pytest.raises(ConfigError, match=r"torch\.int8"):
        choose_dtype(torch.int8, "cpu")
