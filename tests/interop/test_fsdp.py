"""torch's FSDP (`fully_shard`) over an attached model, as one process on a CPU: the same loss and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaw
from deltaw.core import kernels

dist = pytest.importorskip("torch.distributed")


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[Any]:
    if not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_layers_train_as_whole_ones(one_process: Any, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.fsdp import fully_shard

    model = tiny_llama()
    board = deltaw.attach(model, deltaw.LoraConfig(r=2, init_lora_weights=False), seed=0)
    ids = torch.randint(3, 64, (2, 9))
    board.share_inputs(lambda: model(input_ids=ids))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for layer in model.model.layers:
        fully_shard(layer, mesh=one_process)
    fully_shard(model, mesh=one_process)
    fused, real = [], kernels._LowRankLinear.apply
    monkeypatch.setattr(kernels._LowRankLinear, "apply", lambda *args: (fused.append(1), real(*args))[1])
    sharded = model(input_ids=ids, labels=ids).loss
    sharded.backward()
    got = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
    assert fused
    assert sharded.item() == pytest.approx(loss.item(), rel=1e-6)
    assert len(got) == len(wanted) > 0
    for mine, true in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-7)
