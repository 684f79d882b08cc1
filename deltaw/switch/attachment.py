"""`attach` and `detach`: put a switchboard on a model and take it off again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltaw.bases.original import Source
from deltaw.core import Adapter, LoraConfig
from deltaw.core.packed import reordered
from deltaw.errors import Fault, StateError
from deltaw.inject import strip
from deltaw.switch import pretrained
from deltaw.switch.pretrained import BOARD
from deltaw.switch.switchboard import Switchboard


def attach(model: nn.Module, adapter: LoraConfig | Adapter, name: str = "default", *, seed: int | None = None,
           trainable: bool | None = None, dtype: torch.dtype | None = torch.float32,
           compute_dtype: torch.dtype | None = None, any_base: bool = False, partial: bool = False,
           original: Source | None = None) -> Switchboard:
    """Freeze `model`, put a low-rank adapter on it in place, turn it on, and return the model's switchboard.

    The model keeps its class, its modules and its parameters' names. New factors are stored in `dtype` (float32, which
    training needs) and multiplied in the activation's dtype, or in `compute_dtype` where given. The other options are
    those of `Switchboard.add`.

    >>> board = attach(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
    >>> board.parameters("default")["0.lora_A"].shape
    torch.Size([2, 4])

    Raises StateError if a board is attached already, and what `add` raises; the model is then as before.
    """
    if isinstance(getattr(model, BOARD, None), Switchboard):
        raise StateError(Fault("attach()", "this model has a switchboard already", "a model without one",
                               "Use deltaw.board(model).add(name, ...)"))
    out_of_order = reordered(model)
    if out_of_order:
        raise StateError(Fault("attach()", f"bitsandbytes has reordered the codes of {len(out_of_order)} layers for "
                               f"evaluation on this processor, '{out_of_order[0]}' first, which pass no gradient since",
                               "4-bit layers as they were loaded", "Load the base anew, and attach before its first "
                               "forward in evaluation mode; a base from deltaw.load_base is never reordered"))
    board = Switchboard(model, compute_dtype=compute_dtype)
    board.add(name, adapter, seed=seed, trainable=trainable, dtype=dtype, any_base=any_base, partial=partial,
              original=original)
    board.freeze_base()
    board.use(name)
    # Past nn.Module's own registration: the board is no part of the network.
    object.__setattr__(model, BOARD, board)
    pretrained.install(model, board)
    return board


def board(model: nn.Module) -> Switchboard:
    """The switchboard of a model that was attached to."""
    found = getattr(model, BOARD, None)
    if not isinstance(found, Switchboard):
        raise StateError(Fault("board()", f"this {type(model).__name__} has no switchboard", "an attached model",
                               "Call deltaw.attach(model, config) first"))
    return found


def detach(model: nn.Module, *, merge: str | None = None, **options: Any) -> nn.Module:
    """Take everything off again and return the model: same modules, same bits, same `requires_grad` as before `attach`.

    With `merge`, that adapter's change stays in the weights for good, in the base's dtype; the base's own are dropped.
    `options` are those of `Switchboard.merge`, for a base that is packed.
    """
    held = board(model)
    if merge is not None:
        held.keep_merged(merge, **options)
    else:
        if held.merged_mix:
            held.unmerge()
        held.use(None)
    strip(model)
    pretrained.uninstall(model)
    held.thaw_base()
    object.__delattr__(model, BOARD)
    return model
