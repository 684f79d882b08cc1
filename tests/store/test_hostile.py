"""Damaged and hostile files end in one `AdapterFileError` that names the file, and never in anything else."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deltaw import store
from deltaw.errors import AdapterFileError
from deltaw.store.tensors import MAX_FAULTS, MAX_HEADER, read_tensors
from tests.store.adapters import one_of_each, small

Header = dict[str, Any]


def safetensors(header: Header | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: Any = (2,), begin: Any = 0, end: Any = 8, dtype: Any = "F32") -> Header:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


NAN, INFINITY = b"\0\0\xc0\x7f", b"\0\0\x80\xff"
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has only 0 bytes"),
    "five_bytes": (b"\x05\0\0\0\0", "has only 5 bytes"),
    "cut_header": (safetensors({"a": entry()}, length=5000), "is cut short"),
    "cut_data": (safetensors({"a": entry()}, bytes(4)), "outside the file's 4 bytes"),
    "more_data": (safetensors({"a": entry()}, bytes(12)), "has 12 bytes of tensors; expected 8"),
    "huge_header": (safetensors({}, length=1 << 62), f"at most {MAX_HEADER}"),
    "negative_header": (b"\xff" * 8 + b"{}", f"at most {MAX_HEADER}"),
    "not_json": (safetensors(b"{nope"), "not JSON"),
    "not_utf8": (safetensors(b'{"\xff\xfe": 1}'), "not JSON"),
    "deep": (safetensors(b"[" * 100_000), "not JSON"),
    "long_number": (safetensors(b'{"a": ' + b"9" * 10_000 + b"}"), "not JSON"),
    "a_list": (safetensors(b"[]"), "not a JSON object"),
    "twice": (safetensors(b'{"a": 1, "b": 2, "a": 3}'), "'a': occurs more than once"),
    "twice_within": (safetensors(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), "'dtype': occurs more than once"),
    "metadata_list": (safetensors({"__metadata__": [1]}), "metadata that is not text"),
    "metadata_number": (safetensors({"__metadata__": {"a": 1}}), "metadata that is not text"),
    "number": (safetensors({"a": 3}), "not described by dtype"),
    "missing_key": (safetensors({"a": {"dtype": "F32"}}), "not described by dtype"),
    "more_keys": (safetensors({"a": entry() | {"code": "x"}}), "not described by dtype"),
    "unknown_dtype": (safetensors({"a": entry(dtype="F128")}, bytes(8)), "unknown dtype 'F128'"),
    "dtype_list": (safetensors({"a": entry(dtype=["F32"])}, bytes(8)), "unknown dtype"),
    "negative_size": (safetensors({"a": entry([-2])}, bytes(8)), "impossible shape"),
    "fraction": (safetensors({"a": entry([2.0])}, bytes(8)), "impossible shape"),
    "truth": (safetensors({"a": entry([True, 2])}, bytes(8)), "impossible shape"),
    "enormous_size": (safetensors({"a": entry([1 << 60])}, bytes(8)), "impossible shape"),
    "many_dimensions": (safetensors({"a": entry([1] * 100)}, bytes(8)), "impossible shape"),
    "shape_of_all_memory": (safetensors({"a": entry([1 << 40, 1 << 40])}, bytes(8)), "needs"),
    "offsets_backwards": (safetensors({"a": entry(begin=8, end=0)}, bytes(8)), "offsets [8, 0] outside"),
    "offsets_three": (safetensors({"a": entry() | {"data_offsets": [0, 4, 8]}}, bytes(8)), "outside"),
    "offsets_text": (safetensors({"a": entry(begin="0")}, bytes(8)), "outside"),
    "offsets_beyond": (safetensors({"a": entry(begin=8, end=16)}, bytes(8)), "outside the file's 8"),
    "wrong_bytes": (safetensors({"a": entry([3])}, bytes(8)), "needs 12 bytes and has 8"),
    "overlap": (safetensors({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)), "'b': overlaps"),
    "same_bytes": (safetensors({"a": entry(), "b": entry()}, bytes(8)), "'b': overlaps"),
    "gap": (safetensors({"a": entry(), "b": entry(begin=12, end=20)}, bytes(20)), "'b': leaves a gap"),
    "traversal": (safetensors({"../../etc/passwd": entry()}, bytes(8)), "not a dotted path"),
    "absolute": (safetensors({"/etc/passwd": entry()}, bytes(8)), "not a dotted path"),
    "windows": (safetensors({"a\\b": entry()}, bytes(8)), "not a dotted path"),
    "home": (safetensors({"~/x": entry()}, bytes(8)), "not a dotted path"),
    "empty_name": (safetensors({"": entry()}, bytes(8)), "not a dotted path"),
    "dots": (safetensors({"a..b": entry()}, bytes(8)), "not a dotted path"),
    "control": (safetensors({"a\nb": entry()}, bytes(8)), "'a\\nb': has control characters"),
    "nul": (safetensors({"a\0b": entry()}, bytes(8)), "control characters"),
    "right_to_left": (safetensors({"a\u202eb": entry()}, bytes(8)), "control characters"),
    "escape": (safetensors({"\x1b[2J": entry()}, bytes(8)), "'\\x1b[2J': has control characters"),
    "nan": (safetensors({"a": entry()}, bytes(4) + NAN), "holds 1 NaN and 0 infinite"),
    "infinity": (safetensors({"a": entry()}, INFINITY + bytes(4)), "holds 0 NaN and 1 infinite"),
    "half_nan": (safetensors({"a": entry([4], dtype="F16")}, b"\x01\x7c" * 4), "holds 4 NaN"),
    "f8_nan": (safetensors({"a": entry([8], dtype="F8_E5M2")}, b"\x7f" * 8), "holds 8 NaN"),
    "a_pickle": (pickle.dumps({"a": 1}), "a safetensors file"),
    "a_zip": (b"PK\x03\x04" + bytes(100), "is cut short"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    content, reason = DAMAGED[name]
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(AdapterFileError) as caught:
        read_tensors(file)
    if name != "a_pickle":
        assert reason in str(caught.value)
    assert str(file) in str(caught.value)
    assert str(caught.value).replace("\n", "").isprintable()


def test_all_faults_are_told_at_once_but_not_millions(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(safetensors({f"a\n{i}": entry() for i in range(1000)}, bytes(8)))
    with pytest.raises(AdapterFileError, match="950 more faults") as caught:
        read_tensors(file)
    assert len(caught.value.faults) == MAX_FAULTS + 1


def test_what_the_format_allows_is_read(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(3.0), "none": torch.empty(0, 4), "bool": torch.tensor([True, False]),
               "int": torch.arange(5), "f8": torch.ones(3).to(torch.float8_e4m3fn), "bf16": torch.ones(2, 3).bfloat16()}
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    found = read_tensors(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].double(), tensor.double())
    (tmp_path / "unaligned").write_bytes(safetensors({"a": entry([1], 0, 1, "U8"), "b": entry([2], 1, 9)},
                                                     b"\x07" + torch.tensor([1.5, 2.5]).numpy().tobytes()))
    assert read_tensors(tmp_path / "unaligned")["b"].tolist() == [1.5, 2.5]


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


Q = "base_model.model.layers.0.q.lora_"
FAULTY: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], tuple[str, ...]]] = {
    "no_partner": (lambda t: t.pop(Q + "A.weight"), ("q.lora_B.weight': has no lora_A", "A.weight': is missing")),
    "misspelt": (lambda t: t.update({"base_model.model.layers.0.q.lora_C.weight": t.pop(Q + "B.weight")}),
                 ("lora_C.weight': is unknown", "Did you mean base_model.model.layers.0.q.lora_", "lora_B")),
    "unknown": (lambda t: t.update({"base_model.model.norm.weight": torch.ones(2)}), ("norm.weight': is unknown",)),
    "other_ranks": (lambda t: t.update({Q + "A.weight": torch.ones(3, 4)}), ("shape",)),
    "rank_of_another_config": (lambda t: t.update({Q + "A.weight": torch.ones(3, 4), Q + "B.weight": torch.ones(6, 3)}),
                               ("rank 3; expected 2, as adapter_config.json says", "shape (3, 4)")),
    "vector": (lambda t: t.update({Q + "A.weight": torch.ones(4)}), ("shape (4,)",)),
    "whole_numbers": (lambda t: t.update({Q + "A.weight": torch.ones(2, 4, dtype=torch.int32)}), ("int32",)),
    "no_rows": (lambda t: t.update({Q + "A.weight": torch.ones(0, 4), Q + "B.weight": torch.ones(6, 0)}), ("(0, 4)",)),
    "prefix_twice": (lambda t: t.update({"layers.0.q.lora_A.weight": torch.ones(2, 4)}), ("says the same as another",)),
    "dora": (lambda t: t.update({Q + "magnitude_vector": torch.ones(6)}), ("DoRA", "is unknown")),
    "lora_bias": (lambda t: t.update({Q + "B.bias": torch.ones(6)}), ("a bias in lora_B", "is unknown")),
    "nothing": (lambda t: t.clear(), ("holds no change", "is missing")),
}


@pytest.mark.parametrize("record", [True, False], ids=["with_deltaw_json", "peft_only"])
@pytest.mark.parametrize("name", FAULTY)
def test_wrong_tensors_are_all_listed(tmp_path: Path, name: str, record: bool) -> None:
    change, reasons = FAULTY[name]
    small().save(tmp_path)
    change_tensors(tmp_path, change)
    if not record:
        (tmp_path / "deltaw.json").unlink()
    with pytest.raises(AdapterFileError) as caught:
        store.load(tmp_path)
    assert any(reason in str(caught.value) for reason in reasons)
    assert "adapter_model.safetensors" in str(caught.value)


def test_several_faults_in_one_error(tmp_path: Path) -> None:
    small().save(tmp_path)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["base_model.model.layers.0.v.lora_B.weight"]
        tensors["base_model.model.x.weight"] = torch.ones(1)
        tensors[Q + "B.weight"] = torch.ones(6, 5)

    change_tensors(tmp_path, spoil)
    for _ in range(2):
        with pytest.raises(AdapterFileError) as caught:
            store.load(tmp_path)
        assert len(caught.value.faults) == 3
        (tmp_path / "deltaw.json").unlink(missing_ok=True)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff", b"[" * 99_999,
                                     b'{"r": ' + b"9" * 9999 + b"}"])
@pytest.mark.parametrize("file", ["adapter_config.json", "deltaw.json"])
def test_json_that_is_none(tmp_path: Path, file: str, content: bytes) -> None:
    small().save(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(AdapterFileError, match=file.replace(".", r"\.")):
        store.load(tmp_path)


SITE = {"kind": "linear", "shape": [6, 4], "rank": 2}


@pytest.mark.parametrize("change", [
    {"format": 99}, {"format": "1"}, {"format": None}, {"format": True}, {"config": 3}, {"config": {"r": 0}},
    {"config": {"rr": 2}}, {"config": {"r": "2"}}, {"config": {"target_slices": 3}},
    {"config": {"target_modules": "["}}, {"config": {"target_slices": {"a": [[1]]}}},
    {"facts": []}, {"written": 3}, {"sites": []},
    {"sites": {"a\n": SITE}}, {"sites": {"a": 3}}, {"sites": {"a": SITE | {"kind": "dense"}}},
    {"sites": {"a": SITE | {"shape": [6]}}}, {"sites": {"a": SITE | {"shape": "64"}}},
    {"sites": {"a": SITE | {"rank": 1.5}}}, {"sites": {"a": SITE | {"groups": 0}}},
    {"sites": {"a": SITE | {"rank": 0}}}, {"sites": {"a": SITE | {"gain": 0}}},
    {"sites": {"a": SITE | {"gain": float("nan")}}}, {"sites": {"a": SITE | {"slices": [[4, 2]]}}},
    {"sites": {"a": SITE | {"slices": [[0, 99]]}}}, {"sites": {"a": SITE | {"slices": [[0, 3], [2, 4]]}}},
    {"sites": {"a": SITE | {"kind": "conv", "shape": [6, 4, 3], "groups": 4}}},
    {"sites": {"a": SITE | {"transposed": 1}}},
    {"sites": {"a": SITE | {"tensors": [1]}}}, {"sites": {"a": SITE | {"kind": "bias"}}}, {"sites": {"a": SITE}},
    {"sites": {}},
], ids=str)
def test_a_spoilt_record_is_refused(tmp_path: Path, change: Header) -> None:
    small().save(tmp_path)
    path = tmp_path / "deltaw.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterFileError):
        store.load(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("fuzz")
    one_of_each().save(folder / "a")
    return folder


def assert_loads_or_refuses(folder: Path) -> None:
    try:
        adapter = store.load(folder)
    except AdapterFileError as error:
        told = str(error)
    else:
        told = "nothing wrong"
        for name, site in adapter.sites.items():
            if site.is_low_rank and not site.geometry.is_dense_grouped(site.A):
                adapter.delta(name)
    assert told


FILES = st.sampled_from(["adapter_config.json", "adapter_model.safetensors", "deltaw.json"])
fuzz = settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(file=FILES, record=st.booleans(), header=st.booleans(),
       flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_changed_bytes_load_or_are_refused(saved: Path, file: str, flips: list[tuple[float, int]], record: bool,
                                               header: bool) -> None:
    folder = saved / "b"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved / "a", folder)
    if not record:
        (folder / "deltaw.json").unlink()
    content = bytearray((saved / "a" / file).read_bytes())
    size = 8 + int.from_bytes(content[:8], "little") if header and file.endswith("safetensors") else len(content)
    for place, byte in flips:
        content[int(place * size)] = byte
    (folder / file).write_bytes(content)
    assert_loads_or_refuses(folder)


@fuzz
@given(file=FILES, begin=st.floats(0, 1), length=st.floats(0, 0.2), insert=st.binary(max_size=20), record=st.booleans())
def test_any_cut_or_insertion_loads_or_is_refused(saved: Path, file: str, begin: float, length: float, insert: bytes,
                                                  record: bool) -> None:
    folder = saved / "b"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved / "a", folder)
    if not record:
        (folder / "deltaw.json").unlink()
    content = (saved / "a" / file).read_bytes()
    start = int(begin * len(content))
    (folder / file).write_bytes(content[:start] + insert + content[start + int(length * len(content)):])
    assert_loads_or_refuses(folder)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6)
OPTIONS = ("r", "lora_alpha", "target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "bias",
           "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save", "init_lora_weights",
           "task_type", "lora_dropout", "fan_in_fan_out", "peft_type", "peft_version", "use_dora", "revision")


@fuzz
@given(name=st.sampled_from(OPTIONS), value=anything, record=st.booleans())
def test_any_value_of_an_option_loads_or_is_refused(saved: Path, name: str, value: Any, record: bool) -> None:
    folder = saved / "b"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved / "a", folder)
    if not record:
        (folder / "deltaw.json").unlink()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    assert_loads_or_refuses(folder)
