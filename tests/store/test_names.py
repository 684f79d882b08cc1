"""Tensor names: what PEFT would call each tensor, and what each key says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.core import Kind
from deltaw.store import names
from deltaw.store.names import FileNames, canonical, parse

P = names.PREFIX
KEYS: list[tuple[dict[str, Kind], str, str, str]] = [
    # sites, site, tensor, key after the prefix
    ({"a.q": "linear"}, "a.q", "lora_A", "a.q.lora_A.weight"),
    ({"a.q": "linear"}, "a.q", "lora_B", "a.q.lora_B.weight"),
    ({"conv1": "conv"}, "conv1", "lora_A", "conv1.lora_A.weight"),
    ({"": "linear"}, "", "lora_A", "lora_A.weight"),
    ({"e": "embedding"}, "e", "lora_A", "e.lora_embedding_A"),
    ({"e": "embedding"}, "e", "lora_B", "e.lora_embedding_B"),
    ({"m.in_proj": "attention", "m.out_proj": "attention"}, "m.in_proj", "lora_A", "m.lora_A.weight"),
    ({"m.in_proj": "attention", "m.out_proj": "attention"}, "m.out_proj", "lora_B",
     "m.base_layer.out_proj.lora_B.weight"),
    ({"m.out_proj": "attention", "m.out_proj.bias": "bias"}, "m.out_proj.bias", "bias",
     "m.base_layer.out_proj.base_layer.bias"),
    ({"m.in_proj": "attention", "m.in_proj_bias": "bias"}, "m.in_proj_bias", "bias", "m.base_layer.in_proj_bias"),
    ({"in_proj": "attention", "out_proj": "attention"}, "in_proj", "lora_A", "lora_A.weight"),
    ({"x.w": "parameter"}, "x.w", "lora_A", "x.lora_A.weight"),
    ({"x.a": "parameter", "x.b": "parameter"}, "x.a", "lora_A", "x.base_layer.lora_A.weight"),
    ({"x.a": "parameter", "x.b": "parameter"}, "x.b", "lora_A", "x.lora_A.weight"),
    ({"x.b": "parameter", "x.a": "parameter"}, "x.b", "lora_A", "x.base_layer.lora_A.weight"),
    ({"x.a": "parameter", "x.b": "parameter", "x.l": "linear"}, "x.l", "lora_A",
     "x.base_layer.base_layer.l.lora_A.weight"),
    ({"x.a": "parameter", "x.l": "linear", "x.l.bias": "bias"}, "x.l.bias", "bias", "x.base_layer.l.base_layer.bias"),
    ({"w": "parameter"}, "w", "lora_A", "lora_A.weight"),
    ({"v": "parameter", "w": "parameter"}, "v", "lora_A", "base_layer.lora_A.weight"),
    ({"v": "parameter", "w": "parameter"}, "w", "lora_A", "lora_A.weight"),
    ({"a.q": "linear", "a.q.bias": "bias"}, "a.q.bias", "bias", "a.q.base_layer.bias"),
    ({"a.q": "linear", "n.bias": "bias"}, "n.bias", "bias", "n.bias"),
    ({"bias": "bias"}, "bias", "bias", "bias"),
    ({"head": "saved"}, "head", "dense.weight", "head.dense.weight"),
    ({"x.a": "parameter", "x.head": "saved"}, "x.head", "weight", "x.base_layer.head.weight"),
]


@pytest.mark.parametrize(("kinds", "site", "tensor", "key"), KEYS, ids=[row[3] for row in KEYS])
def test_the_key_of_each_tensor(kinds: dict[str, Kind], site: str, tensor: str, key: str) -> None:
    assert FileNames(kinds).key(site, tensor) == P + key


@pytest.mark.parametrize(("key", "module", "tensor", "depth", "hosts"), [
    ("a.q.lora_A.weight", "a.q", "lora_A", 0, ()),
    ("a.q.lora_A.default.weight", "a.q", "lora_A", 0, ()),
    ("a.q.lora_embedding_B", "a.q", "lora_B", 0, ()),
    ("x.base_layer.base_layer.lora_B.weight", "x", "lora_B", 2, ()),
    ("m.base_layer.out_proj.lora_A.weight", "m.out_proj", "lora_A", 0, ("m",)),
    ("x.base_layer.y.base_layer.z.lora_A.weight", "x.y.z", "lora_A", 0, ("x", "x.y")),
    ("lora_A.weight", "", "lora_A", 0, ()),
    ("a.q.base_layer.bias", "a.q", "bias", 1, ()),
    ("explora_A.weight", "explora_A", "weight", 0, ()),
    ("a.lora_A.weight.x", "a.lora_A.weight", "x", 0, ()),
    ("bias", "", "bias", 0, ()),
])
def test_what_a_key_says(key: str, module: str, tensor: str, depth: int, hosts: tuple[str, ...]) -> None:
    found = parse(P + key)
    assert (found.module, found.tensor, found.depth, found.hosts) == (module, tensor, depth, hosts)
    assert found.embedding == ("embedding" in key)


@pytest.mark.parametrize("key", ["a.q.lora_A.weight", P + "a.q.lora_A.weight", P + "_orig_mod.a.q.lora_A.weight",
                                 "_orig_mod." + P + "a.q.lora_A.weight", P + "a._orig_mod.q._orig_mod.lora_A.weight",
                                 P + "_fsdp_wrapped_module.a.q.lora_A.weight"])
def test_prefixes_and_marks_of_compilation_make_no_difference(key: str) -> None:
    assert canonical(key) == P + "a.q.lora_A.weight"


def test_only_one_prefix_is_stripped() -> None:
    assert parse(canonical(P + P + "q.lora_A.weight")).module == "base_model.model.q"


parts = st.sampled_from(["a", "layers", "0", "1", "out_proj", "in_proj", "lora_A", "weight", "q"])
paths = st.lists(parts, min_size=1, max_size=4).map(".".join)


@given(st.dictionaries(paths, st.sampled_from(["linear", "embedding", "bias"]), min_size=1, max_size=5))
def test_no_two_tensors_share_a_key(kinds: dict[str, Kind]) -> None:
    keys = FileNames(kinds)
    tensors = [(site, tensor) for site, kind in kinds.items()
               for tensor in (("bias",) if kind == "bias" else ("lora_A", "lora_B"))]
    found = {keys.key(site, tensor) for site, tensor in tensors}
    # A bias called like a factor of its own module is the one clash; no module names a bias so.
    clashes = [site for site, kind in kinds.items() if kind == "bias" and site.endswith(".weight")]
    assert len(found) == len(tensors) or clashes


@given(st.dictionaries(paths, st.just("linear"), min_size=1, max_size=4))
def test_modules_are_read_back_from_their_keys(kinds: dict[str, Kind]) -> None:
    keys = FileNames(kinds)
    assert {parse(keys.key(site, "lora_A")).module for site in kinds} == set(kinds)


@pytest.mark.parametrize(("path", "ends", "found"), [
    ("model.score", ["score"], "model.score"), ("classifier.dense", ["classifier", "score"], "classifier"),
    ("a.b.a.c", ["a"], "a"), ("lm_head", ["head"], "lm_head"), ("model.layers", ["score"], None), ("x", [], None),
])
def test_the_outermost_module_to_save(path: str, ends: list[str], found: str | None) -> None:
    assert names.outermost(path, ends) == found
