"""Names that differ by one prefix, and sites that are not modules."""

from __future__ import annotations

import pytest

from deltaw.merge.naming import tensor_name, with_common_prefix


@pytest.mark.parametrize(("site", "kind", "tensor"), [
    ("a.q", "linear", "a.q.weight"), ("a.emb", "embedding", "a.emb.weight"), ("a.conv", "conv", "a.conv.weight"),
    ("a.in_proj", "attention", "a.in_proj_weight"), ("a.k_proj", "attention", "a.k_proj_weight"),
    ("a.out_proj", "attention", "a.out_proj.weight"), ("a.bias", "bias", "a.bias"), ("a.w", "parameter", "a.w"),
])
def test_each_kind_of_site_names_its_tensor(site: str, kind: str, tensor: str) -> None:
    assert tensor_name(site, kind) == tensor  # type: ignore[arg-type]


def test_a_prefix_is_added_or_taken_away_for_all() -> None:
    long = {"model.a.x.weight", "model.b.x.weight", "head.weight"}
    assert with_common_prefix(["a.x.weight", "b.x.weight"], long) == {
        "a.x.weight": "model.a.x.weight", "b.x.weight": "model.b.x.weight"}
    short = {"a.x.weight", "b.x.weight"}
    assert with_common_prefix(["model.a.x.weight", "model.c.x.weight", "b.x.weight"], short) == {
        "model.a.x.weight": "a.x.weight", "model.c.x.weight": None, "b.x.weight": "b.x.weight"}


def test_what_fits_in_two_ways_fits_in_none() -> None:
    known = {"encoder.layers.0.q.weight", "decoder.layers.0.q.weight"}
    assert with_common_prefix(["layers.0.q.weight"], known) == {"layers.0.q.weight": None}


def test_one_prefix_must_explain_all_names() -> None:
    known = {"model.a.x.weight", "model.b.x.weight", "other.c.x.weight"}
    names = with_common_prefix(["a.x.weight", "b.x.weight", "c.x.weight"], known)
    assert names == {"a.x.weight": "model.a.x.weight", "b.x.weight": "model.b.x.weight", "c.x.weight": None}


def test_a_last_part_alone_tells_nothing() -> None:
    assert with_common_prefix(["weight", "x.weight"], {"a.weight", "b.x.bias"}) == {"weight": None, "x.weight": None}
