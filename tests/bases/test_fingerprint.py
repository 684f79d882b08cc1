"""The fingerprint tells networks apart, and not dtypes, layouts or the order of the parameters."""

from __future__ import annotations

import dataclasses
import json
import math
import time

import pytest
import torch

from deltaw.bases.fingerprint import SAMPLES, Fingerprint, compare, fingerprint
from deltaw.errors import AdapterFileError


def tensors(seed=0, count=5, dtype=torch.float32, shape=(12, 7)):
    draw = torch.Generator().manual_seed(seed)
    return [(f"layers.{i}.weight", torch.randn(shape, generator=draw).to(dtype)) for i in range(count)]


@pytest.mark.parametrize("count", [1, 3, 255, 256, 257, 700])
def test_it_draws_256_weights_over_any_number_of_tensors(count):
    made = fingerprint(tensors(count=count))
    assert len(made.sample) == SAMPLES
    assert all(math.isfinite(x) for x in made.sample)


def test_the_sample_holds_weights_of_every_tensor():
    parts = [(name, torch.full((4, 3), float(i))) for i, (name, _) in enumerate(tensors(count=9))]
    assert set(fingerprint(parts).sample) == set(map(float, range(9)))


def test_order_and_memory_layout_do_not_matter():
    parts = tensors()
    strided = [(name, t.t().contiguous().t()) for name, t in reversed(parts)]
    assert not strided[0][1].is_contiguous()
    assert fingerprint(parts) == fingerprint(strided)


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("second", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-7])
def test_every_dtype_of_one_network_agrees(first, second, scale):
    parts = [(name, t * scale) for name, t in tensors()]
    one = fingerprint((name, t.to(first)) for name, t in parts)
    other = fingerprint((name, t.to(second)) for name, t in parts)
    assert compare(one, other) is None


def test_other_weights_of_the_same_shapes_are_told_apart():
    fault = compare(fingerprint(tensors(0)), fingerprint(tensors(1)))
    assert "other weights" in str(fault)
    assert "of 256" in str(fault)


def test_one_other_tensor_is_enough():
    changed = tensors()
    changed[3] = (changed[3][0], changed[3][1] * 1.02)
    assert compare(fingerprint(tensors()), fingerprint(changed)) is not None


@pytest.mark.parametrize("other", [tensors(shape=(7, 12)), tensors(count=6), [("x", torch.zeros(12, 7))]])
def test_other_names_or_shapes_are_told_apart(other):
    assert "names or shapes" in str(compare(fingerprint(tensors()), fingerprint(other)))


def test_a_name_cannot_flow_into_a_shape():
    assert fingerprint([("a", torch.zeros(1)), ("b", torch.zeros(2))]).architecture != fingerprint(
        [("a(1,)", torch.zeros(1)), ("b", torch.zeros(2))]).architecture


def test_meta_tensors_count_for_the_architecture_only():
    meta = fingerprint((name, t.to("meta")) for name, t in tensors())
    assert meta.sample == ()
    assert compare(fingerprint(tensors(3)), meta) is None
    assert compare(fingerprint(tensors(count=4)), meta) is not None


def test_partly_missing_tensors_leave_the_others_compared():
    half = [(name, t.to("meta") if i < 2 else t) for i, (name, t) in enumerate(tensors())]
    assert compare(fingerprint(tensors()), fingerprint(half)) is None
    assert compare(fingerprint(tensors(1)), fingerprint(half)) is not None


def test_packed_bytes_are_left_out_of_the_sample():
    packed = [(name, torch.zeros(42, 1, dtype=torch.uint8) if i else t) for i, (name, t) in enumerate(tensors())]
    sample = fingerprint(packed).sample
    assert 0 < sum(math.isfinite(x) for x in sample) < SAMPLES


def test_quantized_tensors_are_compared_by_direction_and_the_others_as_ever():
    coarse = [(name, (t * 2).round() / 2) for name, t in tensors()]
    exact, rounded = fingerprint(tensors()), fingerprint(coarse)
    assert compare(exact, rounded) is not None
    everywhere = tuple(range(SAMPLES))
    marked = Fingerprint(rounded.architecture, rounded.sample, everywhere)
    assert compare(exact, marked) is None
    assert compare(marked, exact) is None
    assert "cosine" in str(compare(marked, fingerprint(tensors(1))))
    half = Fingerprint(rounded.architecture, rounded.sample, everywhere[::2])
    assert "sampled ones differ" in str(compare(exact, half))
    assert Fingerprint.from_dict(marked.to_dict()) == marked


def test_a_real_4bit_linear_keeps_the_architecture():
    bnb = pytest.importorskip("bitsandbytes", exc_type=ImportError)
    weight = torch.randn(64, 64)
    packed = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4").to("cpu")
    assert packed.dtype == torch.uint8
    plain, quantized = fingerprint([("w", weight)]), fingerprint([("w", packed)])
    assert plain.architecture == quantized.architecture
    assert len(quantized.rounded) == len(quantized.sample) == SAMPLES
    assert max(abs(a - b) for a, b in zip(plain.sample, quantized.sample, strict=True)) < 0.2 * weight.abs().max()
    assert compare(plain, quantized) is None
    assert compare(fingerprint([("w", torch.randn(64, 64))]), quantized) is not None


def test_json_round_trip_keeps_everything():
    parts = [(name, t.to("meta") if i == 1 else t) for i, (name, t) in enumerate(tensors())]
    made = fingerprint(parts)
    again = Fingerprint.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False)))
    assert again.architecture == made.architecture
    assert [x for x in again.sample if x == x] == [x for x in made.sample if x == x]
    assert compare(made, again) is None


@pytest.mark.parametrize("damage", [{}, {"architecture": 3, "sample": []}, {"architecture": "a", "sample": ["x"]},
                                    {"architecture": "a", "sample": "abc"}])
def test_a_damaged_record_is_refused(damage):
    with pytest.raises(AdapterFileError, match="damaged"):
        Fingerprint.from_dict(damage)


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        fingerprint(tensors()).architecture = "x"


def test_it_is_cheap_at_the_size_of_a_real_model():
    block = torch.randn(1024, 512)
    parts = [(f"layers.{i}", block) for i in range(270)]
    best = min(_timed(lambda: fingerprint(parts)) for _ in range(5))
    assert best < 0.03


def _timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
