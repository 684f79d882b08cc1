"""When the GPU's kernel is used; its numbers in Triton's interpreter and, on a GPU, its bits beside bitsandbytes'."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaw.core import unpacking_gpu
from deltaw.core.packed import Packed, Workspace
from deltaw.core.unpacking_gpu import unpacked

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BY_BITSANDBYTES = "unpacked by bitsandbytes, which takes longer: "


@pytest.fixture(autouse=True)
def undecided() -> Iterator[None]:
    """Each test looks for the kernel anew."""
    for decision in (unpacking_gpu._writer, unpacking_gpu._say):
        decision.cache_clear()
    yield
    for decision in (unpacking_gpu._writer, unpacking_gpu._say):
        decision.cache_clear()


def quantized(*shape: int, kind: str = "nf4", nested: bool = True, stored: torch.dtype = torch.float32,
              block: int = 64, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Any]:
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, stored)
    return bnb.functional.quantize_4bit(W, quant_type=kind, compress_statistics=nested, blocksize=block)


def exact(W_OI: Tensor, codes: Tensor, state: Any) -> None:
    W_OI.copy_(bnb.functional.dequantize_4bit(codes, state))


def test_without_triton_bitsandbytes_unpacks_and_it_is_said_once(monkeypatch: pytest.MonkeyPatch,
                                                                 recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "deltaw.core.unpacking_kernel", raising=False)
    for nested in (True, False):
        for _ in range(2):
            assert unpacked(*quantized(24, 64, nested=nested), torch.float32) is None
    said = [str(w.message) for w in recwarn if BY_BITSANDBYTES in str(w.message)]
    assert len(said) == 1
    assert "pip install triton" in said[0]


def test_a_kernel_that_is_not_compiled_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(form: unpacking_gpu.Form) -> unpacking_gpu.Write:
        def write(*_: Any) -> None:
            raise RuntimeError("no compiler")
        return write

    monkeypatch.setattr(unpacking_gpu, "_compiled", compiled)
    with pytest.warns(UserWarning, match=BY_BITSANDBYTES + r".*RuntimeError: no compiler"):
        assert unpacked(*quantized(24, 64), torch.float32) is None


def test_a_kernel_is_used_only_where_it_gives_the_bits_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_a_bit_in_bf16(W_OI: Tensor, codes: Tensor, state: Any) -> None:
        exact(W_OI, codes, state)
        if W_OI.dtype == torch.bfloat16:
            W_OI.view(-1)[-1] *= 1 + 2**-7

    monkeypatch.setattr(unpacking_gpu, "_compiled", lambda form: off_by_a_bit_in_bf16)
    weight = quantized(24, 64)
    found = unpacked(*weight, torch.float32)
    assert found is not None
    assert torch.equal(found, bnb.functional.dequantize_4bit(*weight))
    with pytest.warns(UserWarning, match=BY_BITSANDBYTES + "the kernel's numbers are not"):
        assert unpacked(*weight, torch.bfloat16) is None


def test_what_the_kernel_cannot_read_is_left_to_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking_gpu, "_compiled", lambda form: exact)
    codes, state = quantized(24, 64)
    assert unpacked(codes, state, torch.float32) is not None
    elsewhere, narrow, wide = (copy.copy(state) for _ in range(3))
    elsewhere.offset = state.offset.to("meta")
    narrow.state2 = copy.copy(state.state2)
    narrow.state2.absmax = state.state2.absmax.half()
    wide.dtype = torch.float64
    shifted = torch.cat([codes[:1], codes])[1:]
    assert shifted.data_ptr() % 4
    for bad in [(codes, elsewhere), (codes, narrow), (codes, wide), (shifted, state), (codes.t(), state),
                (codes[:-4], state), quantized(3, 66)]:
        assert unpacked(*bad, torch.float32) is None
    assert unpacked(codes, state, torch.float64) is None


INTERPRETED = """
import itertools, torch, bitsandbytes.functional as bnb
from deltaw.core import unpacking_gpu
for kind, nested, dtype, shape in itertools.product(["nf4", "fp4"], [True, False], [torch.float32, torch.float16],
                                                    [(24, 64), (300, 192)]):
    codes, state = bnb.quantize_4bit(torch.randn(shape).to(dtype), quant_type=kind, compress_statistics=nested)
    W = unpacking_gpu.unpacked(codes, state, dtype)
    assert torch.equal(W, bnb.dequantize_4bit(codes, state)), (kind, nested, dtype, shape)
    halves = torch.stack([codes >> 4, codes & 15], 1).view(-1, 64).long()
    scale = state.absmax.double()
    if nested:
        outer = state.state2.absmax.double().repeat_interleave(256)[:len(scale)]
        scale = state.state2.code.double()[state.absmax.long()] * outer + state.offset.double()
    exact = (state.code.double()[halves] * scale[:, None]).view(shape)
    rounding = 2**-22 if dtype == torch.float32 else 2**-10
    assert torch.allclose(W.double(), exact, rtol=rounding, atol=1e-6)
"""


def test_the_kernel_beside_float64_in_tritons_interpreter() -> None:
    """Not in bf16, to which the interpreter does not round."""
    pytest.importorskip("triton", reason="Triton is not installed")
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", INTERPRETED], check=True,
                   env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.gpu
@pytest.mark.parametrize("block", [64, 128, 4096])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_on_a_gpu_weights_have_the_bits_of_bitsandbytes(kind: str, nested: bool, block: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    for shape in [(24, 64), (7, 192), (5, 136), (1000, 1000), (4096, 4096)]:
        for stored in DTYPES:
            weight = quantized(*shape, kind=kind, nested=nested, stored=stored, block=block, device="cuda")
            for wanted in DTYPES:
                found = unpacked(*weight, wanted)
                assert found is not None, (shape, stored, wanted)
                assert torch.equal(found, bnb.functional.dequantize_4bit(*weight).to(wanted)), (shape, stored, wanted)


@pytest.mark.gpu
def test_on_a_gpu_the_next_layer_is_unpacked_into_the_same_memory_after_the_product() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    weights = [Packed("nf4", codes, (1024, 1024), state.absmax, state) for codes, state in (
        quantized(1024, 1024, stored=torch.bfloat16, device="cuda", seed=seed) for seed in range(8))]
    x = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16)

    def products() -> tuple[set[int], list[Tensor]]:
        places, found = set(), [x.new_empty(4096, 1024) for _ in weights]
        for W, y in zip(weights, found, strict=True):
            for _, W_RI in W.strips(torch.bfloat16, Workspace()):
                places.add(W_RI.data_ptr())
                torch.mm(x, W_RI.t(), out=y)
                del W_RI
        return places, found

    products()  # compiled, and compared
    places, found = products()
    assert len(places) == 1
    for W, y in zip(weights, found, strict=True):
        dense = bnb.functional.dequantize_4bit(W.codes, W.state)
        assert torch.allclose(y.float(), (x @ dense.t()).float(), rtol=1e-2, atol=0.25)


@pytest.mark.gpu
def test_on_a_gpu_streams_do_not_share_memory() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    weights = [quantized(2048, 2048, device="cuda", seed=seed) for seed in range(2)]
    expected = [bnb.functional.dequantize_4bit(*weight).sum(1) for weight in weights]
    unpacked(*weights[0], torch.float32)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in weights]
    sums: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for i, (stream, weight) in enumerate(zip(streams, weights, strict=True)):
            with torch.cuda.stream(stream):
                W = unpacked(*weight, torch.float32)
                assert W is not None
                sums[i].append(W.sum(1))
    torch.cuda.synchronize()
    for found, wanted in zip(sums, expected, strict=True):
        assert all(torch.equal(each, wanted) for each in found)
