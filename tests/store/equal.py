"""When two adapters are the same."""

from __future__ import annotations

import torch

from deltaw.core import Adapter


def assert_same_adapter(got: Adapter, wanted: Adapter) -> None:
    """Same config, facts, sites in the same order and bits; rounding is allowed where B was scaled for the file."""
    assert got.config == wanted.config
    assert got.facts == wanted.facts
    assert list(got.sites) == list(wanted.sites)
    for name, site in wanted.sites.items():
        assert got.sites[name].geometry == site.geometry, name
        assert list(got.sites[name].tensors) == list(site.tensors), name
        for tensor, value in site.tensors.items():
            other = got.sites[name].tensors[tensor]
            assert other.dtype == value.dtype
            if site.geometry.kind == "attention":
                torch.testing.assert_close(other, value, atol=1e-7, rtol=1e-6)
            else:
                assert torch.equal(other, value), (name, tensor)
