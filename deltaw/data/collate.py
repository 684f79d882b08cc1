"""Examples of different lengths into the tensors of one batch: padded on the right, or laid end to end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaw.bases.packed_attention import PLACES
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


def pack(examples: Sequence[Example]) -> dict[str, Tensor]:
    """The examples end to end in one row of T tokens: `input_ids`, `labels` and `position_ids` (1, T).

    Positions start anew at each example, `cu_seq_lens_q` (int32, B + 1) says where, and the first token of each has no
    label: nothing is predicted across the border. Only a model whose attention keeps the examples apart may read this
    (`deltaw.bases.packed_attention`); the mask is a placeholder that keeps transformers from making one of T × T.
    """
    lengths = [len(example.input_ids) for example in examples]
    return {
        "input_ids": torch.tensor([[token for example in examples for token in example.input_ids]]),
        "labels": torch.tensor([[label for example in examples for label in (IGNORED, *example.labels[1:])]]),
        "position_ids": torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0),
        "attention_mask": torch.zeros(1, 1, 1, 1),
        PLACES: torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
    }


def _padded(rows: Sequence[list[int]], n: int, fill: int) -> Tensor:
    return torch.tensor([row + [fill] * (n - len(row)) for row in rows], dtype=torch.long)
