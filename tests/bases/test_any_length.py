"""The choice of attention kernels is the block's alone."""

from __future__ import annotations

import torch

from deltaw.bases.any_length import attention_of_any_length


def test_cudnn_is_left_out_on_a_gpu_and_back_afterwards() -> None:
    before = enabled()
    with attention_of_any_length(torch.device("cuda")):
        assert enabled() == (False, True, True, True)
    assert enabled() == before
    with attention_of_any_length(torch.device("cpu")):
        assert enabled() == before


def enabled() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return (cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled())
