"""Packed weights of checkpoints and merges: packed and unpacked to the bits of bitsandbytes."""

from __future__ import annotations

import copy

import pytest
import torch

from deltaw.bases import packing
from deltaw.bases.packed import SCALES, WEIGHT, Packing, from_parts, pack

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("block", "storage", "shape"), [
    (64, torch.uint8, (48, 192)), (128, torch.uint8, (48, 128)), (64, torch.bfloat16, (8, 64)),
    (64, torch.uint8, (5, 130)), (64, torch.uint8, (64, 32))], ids=str)
def test_4_bit_values_and_codes_are_those_of_bitsandbytes(
        kind: str, double: bool, block: int, storage: torch.dtype, shape: tuple[int, int],
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaw.core.stretches.STRIP", 1024)
    values = torch.randn(shape)
    for dtype in DTYPES:
        made = pack(values, Packing(kind=kind, shape=shape, dtype=dtype, block=block,  # type: ignore[arg-type]
                                    double=double, storage=storage))
        codes, state = bnb.functional.quantize_4bit(values, blocksize=block, compress_statistics=double,
                                                    quant_type=kind, quant_storage=storage)
        state.dtype = dtype
        assert torch.equal(made.parts[WEIGHT].view(torch.uint8), codes.view(torch.uint8))  # in bf16 some are NaN
        theirs = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
        assert theirs.keys() == made.parts.keys() - {WEIGHT}
        assert all(torch.equal(part, made.parts[name]) for name, part in theirs.items())
        expected = bnb.functional.dequantize_4bit(codes, copy.copy(state))
        assert torch.equal(made.values(), expected.float())
        assert from_parts(made.parts, dtype).packing == made.packing


def test_8_bit_values_and_codes_are_those_of_bitsandbytes() -> None:
    values = torch.randn(40, 96)
    made = pack(values, Packing(kind="int8", shape=(40, 96), dtype=torch.float16))
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(values.half())
    assert torch.equal(made.parts[WEIGHT], codes)
    assert torch.equal(made.parts[SCALES], scales)
    assert torch.equal(made.values(), bnb.functional.int8_vectorwise_dequant(codes, scales).float())


def test_packing_again_takes_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    strips: list[int] = []
    places = packing._places
    monkeypatch.setattr(packing, "_STRIP", 1024)
    monkeypatch.setattr(packing, "_places", lambda part, kind: strips.append(part.numel()) or places(part, kind))
    pack(torch.randn(64, 64), Packing(kind="nf4", shape=(64, 64), dtype=torch.float32, double=True))
    assert strips == [1024] * 4
