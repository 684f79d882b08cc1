"""Examples of different lengths into the tensors of one batch, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaw.data.examples import IGNORED, Example, LabelledExample


def collate(examples: Sequence[Example | LabelledExample], pad_id: int | None, *,
            pad_to_multiple_of: int = 1) -> dict[str, Tensor]:
    """The batch as int64 tensors: `input_ids`, `attention_mask` (B, n) and `labels` (B, n), -100 at padding.

    n is the longest example, rounded up to `pad_to_multiple_of`. For a classifier `labels` is (B,), and there is
    `token_type_ids` (B, n) when some row has a second text. A `pad_id` of None pads with 0: padding is told by the
    mask alone, so that a padding token which is also the end token does no harm.
    """
    longest = max(len(example.input_ids) for example in examples)
    n = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    batch = {
        "input_ids": _padded([example.input_ids for example in examples], n, pad_id or 0),
        "attention_mask": _padded([[1] * len(example.input_ids) for example in examples], n, 0),
    }
    causal = [example for example in examples if isinstance(example, Example)]
    if causal:
        assert len(causal) == len(examples), "a batch holds examples of one kind"
        batch["labels"] = _padded([example.labels for example in causal], n, IGNORED)
        return batch
    labelled = [example for example in examples if isinstance(example, LabelledExample)]
    batch["labels"] = torch.tensor([example.label for example in labelled])
    if any(any(example.token_type_ids) for example in labelled):
        batch["token_type_ids"] = _padded([example.token_type_ids for example in labelled], n, 0)
    return batch


def _padded(rows: Sequence[list[int]], n: int, fill: int) -> Tensor:
    return torch.tensor([row + [fill] * (n - len(row)) for row in rows], dtype=torch.long)
