"""What tests of attention over packed rows share."""

from __future__ import annotations

import torch

from deltaw.bases.packed_attention import attend


def made(batch: int, tokens: int, heads: int, kv: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value as a model lays them out: tokens first in memory."""
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(batch, tokens, n, width, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
            for n in (heads, kv, kv)]


def check_that_nan_stays_with_its_example(width: int) -> None:
    """Of three examples in bfloat16, that of the second changes no bit of the others."""
    lengths = [66, 70, 69]
    places = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    inputs = made(1, sum(lengths), 4, 2, width, torch.bfloat16)

    def results() -> list[torch.Tensor]:
        out, _ = attend(torch.nn.Module(), *inputs, None, cu_seq_lens_q=places)
        return [out.transpose(1, 2), *torch.autograd.grad(out.float().square().sum(), inputs)]

    before = results()
    with torch.no_grad():
        for t in inputs:
            t[:, :, 66:136] = torch.nan
    for mine, was in zip(results(), before, strict=True):
        assert mine[:, :, 66:136].isnan().all()
        for others in (slice(0, 66), slice(136, None)):
            assert torch.equal(mine[:, :, others], was[:, :, others])
