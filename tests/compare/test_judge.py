"""What timing a forward asks of a model."""

from __future__ import annotations

from typing import Any

import torch

from deltaw.compare.judge import _pass


def test_the_output_layer_has_the_last_token_alone_with_the_strides_of_its_own(tiny_llama: Any) -> None:
    """In 16 bits torch copies the whole weight for a slice of a longer batch, which would be most of the time."""
    model, seen = tiny_llama(), []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    _pass(model, torch.full((2, 9), 5))()
    width = model.config.hidden_size
    assert [(tuple(x.shape), x.stride()) for x in seen] == [((2, 1, width), (width, width, 1))] * 2
