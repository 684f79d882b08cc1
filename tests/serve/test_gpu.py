"""Serving where the base is not on the processor: adapters are read there, and all else is on the base's device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deltaw import bases
from deltaw.inject import find_sites
from deltaw.serve.merging import AutoMerge
from deltaw.serve.service import open_service
from tests.serve.conftest import config, tokens_of
from tests.serve.test_engine import CASES, ask


def test_factors_are_merged_into_a_base_elsewhere(base_folder: Path) -> None:
    model = bases.load_base(str(base_folder), dtype="fp32", device="meta").model
    site = "model.layers.0.self_attn.q_proj"
    before = model.get_submodule(site).weight
    merge = AutoMerge(model, find_sites(model), after=0.0)
    merge.merge(((1, 1.0),), {site: (torch.ones(2, before.shape[1]), torch.ones(2, before.shape[0]))})
    assert model.get_submodule(site).weight is not before
    assert model.get_submodule(site).weight.device.type == "meta"
    merge.undo()
    assert model.get_submodule(site).weight is before


@pytest.mark.gpu
@pytest.mark.parametrize("auto_merge", [0.0, 1e-9])
def test_answers_on_a_gpu_are_pefts(auto_merge: float, base_folder: Path, adapter_folders: dict[str, Path],
                                    reference: Callable[..., list[int]]) -> None:
    with open_service(config(base_folder, device="cuda", auto_merge=auto_merge), adapter_folders) as service:
        assert "one row" in service.says
        together = [ask(service, prompt, mix) for prompt, mix in CASES]
        for (prompt, mix), listener in zip(CASES, together, strict=True):
            assert listener.tokens == reference(tokens_of(prompt), mix, 12), (prompt, mix)
        alone = ask(service, CASES[2][0], {"wide": 1.0})
        assert alone.tokens == reference(tokens_of(CASES[2][0]), {"wide": 1.0}, 12)
        if auto_merge:
            assert service.engine._merge is not None
            assert service.engine._merge.merges
