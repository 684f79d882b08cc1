"""The data of a run: what is trained on, what is held out, and the stream of micro-batches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deltaw import baselines, bases
from deltaw.bases.packed_attention import PLACES
from deltaw.data import (
    BatchStream,
    EncodedData,
    Example,
    LabelledExample,
    Subset,
    available_splits,
    collate,
    load_data,
    pack,
    split_valid,
)
from deltaw.train.config import TrainConfig
from deltaw.train.decoding import device_of
from deltaw.train.metrics import EXECUTION
from deltaw.train.metrics.execution import databases_of
from deltaw.train.prefetch import Prefetched
from deltaw.train.state import Batch

_LONGEST = 1024
_HELD_OUT = 0.1
_TRAIN_THE_BASE = ("full", "ft-top-k", "head", "bitfit", "subspace")


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Tokenised examples, split."""

    config: TrainConfig
    train: EncodedData
    train_rows: NDArray[np.int64]
    valid: EncodedData
    valid_rows: Sequence[int]
    digest: str
    """SHA-256 of the training file, or of the tokens where the data is not one file."""

    @property
    def has_prompts(self) -> bool:
        """Whether the rows have a prompt to be answered: chats and completions, but not plain text."""
        return self.valid.label_names is None and self.valid.shape != "text"

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches in a pass over the training data."""
        return self.stream().batches_per_epoch

    def batches(self, base: bases.Base, *, packed: bool = False) -> Prefetched:
        """The seeded stream of micro-batches, on the model's device, padded or end to end; each made ahead."""
        return Prefetched(ExampleBatches(self.stream(), Layout(base, packed=packed)))

    def first_batch(self, base: bases.Base) -> Batch:
        """The first micro-batch end to end, to try something on."""
        return next(ExampleBatches(self.stream(), Layout(base, packed=True)))

    def stream(self) -> BatchStream[Example | LabelledExample]:
        """The seeded stream of the examples of each micro-batch."""
        config = self.config
        lengths = self.train.lengths[self.train_rows]
        return BatchStream(Subset(self.train, self.train_rows), config.batch_size, config.seed, lengths=lengths,
                           grouped=config.group_by_length, max_tokens=config.batch_tokens)

    def facts(self) -> dict[str, Any]:
        """Where the data is from and how much there is of it."""
        stats = self.train.stats
        return {"source": self.config.data, "sha256": self.digest, "train_rows": len(self.train_rows),
                "valid_rows": len(self.valid_rows), "tokens": stats.tokens,
                "supervised_tokens": stats.supervised_tokens, "longest": stats.longest, "truncated": stats.truncated,
                "dropped_no_supervision": stats.dropped_no_supervision, "shape": self.train.shape,
                "labels": None if self.train.label_names is None else list(self.train.label_names)}

    def describe(self) -> str:
        """One or two lines on what there is and what was left out."""
        stats = self.train.stats
        text = (f"data {self.config.data}: {len(self.train_rows):,} examples to train on, {len(self.valid_rows):,} "
                f"held out; {stats.supervised_tokens:,} of {stats.tokens:,} tokens are learned from")
        if stats.truncated or stats.dropped_no_supervision:
            text += (f"\n{stats.truncated:,} examples were cut to max_length; {stats.dropped_no_supervision:,} lost "
                     "every supervised token by that and were left out")
        if self.train.from_cache:
            text += "\nthe tokens are those that an earlier run made of this data"
        return text


class Layout:
    """How the examples of a batch become tensors on the model's device: padded, or end to end."""

    def __init__(self, base: bases.Base, *, packed: bool) -> None:
        self.pad, self.device, self.packed = base.tokenizer.pad_token_id, device_of(base.model), packed

    def batch(self, examples: Sequence[Example | LabelledExample]) -> Batch:
        """One micro-batch; where packed examples begin stays on the CPU, which asks for it."""
        inputs = pack([e for e in examples if isinstance(e, Example)]) if self.packed else collate(examples, self.pad)
        return Batch({name: tensor if name == PLACES else self.moved(tensor) for name, tensor in inputs.items()},
                     tuple(example.where for example in examples))

    def moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the model's device; to a GPU by way of pinned memory, without waiting."""
        fast = self.device.type == "cuda"
        return (tensor.pin_memory() if fast else tensor).to(self.device, non_blocking=fast)


class ExampleBatches:
    """`Batches` over a stream of examples."""

    def __init__(self, stream: BatchStream[Example | LabelledExample], layout: Layout) -> None:
        self.stream, self.layout = stream, layout

    def __next__(self) -> Batch:
        return self.layout.batch(next(self.stream))

    def state_dict(self) -> dict[str, Any]:
        """The stream's place."""
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a place in the stream."""
        self.stream.load_state_dict(dict(state))


def load_examples(config: TrainConfig) -> tuple[bases.Base, Examples]:
    """The base and the data that the config names.

    A classifier's head has as many outputs as the data has labels, and the data is tokenised with the base's tokenizer:
    so there the base is opened without weights first.
    """
    if config.task != "seq-cls":
        base = _load_base(config, config.chosen_device())
        return base, examples_for(config, base)
    examples = examples_for(config, open_base(config))
    return load_base(config, examples), examples


def open_base(config: TrainConfig) -> bases.Base:
    """The base without its weights: enough to tokenise, and to find where changes go."""
    return _load_base(config, "meta")


def load_base(config: TrainConfig, examples: Examples) -> bases.Base:
    """The base with its weights, and a classifier's head for the labels of the data."""
    return _load_base(config, config.chosen_device(), examples.train.label_names if config.task == "seq-cls" else None)


def _load_base(config: TrainConfig, device: str, labels: Sequence[str] | None = None) -> bases.Base:
    # Steps of a usual size are lost when they are added to weights in bfloat16.
    dtype = "fp32" if config.dtype == "auto" and config.method in _TRAIN_THE_BASE else config.dtype
    quantize = None if config.quantize == "none" else config.quantize
    return bases.load_base(config.model, task=config.task, dtype=dtype, labels=labels, device=device,
                           quantize=quantize, double_quant=config.double_quant,
                           quantize_tables=config.quantize_tables)


def examples_for(config: TrainConfig, base: bases.Base) -> Examples:
    """The data that the config names, tokenised for this base."""
    train = _load(config, config.data, base, "train")
    rows: NDArray[np.int64] = np.arange(len(train))
    named = isinstance(config.valid, str)
    if named or (config.valid is None and "valid" in available_splits(config.data)):
        source = str(config.valid) if named else config.data
        split = "train" if named and Path(source).expanduser().is_file() else "valid"
        valid = _load(config, source, base, split, labels=train.label_names)
        held: NDArray[np.int64] = np.arange(len(valid))
    else:
        share = _HELD_OUT if config.valid is None else float(config.valid)
        rows, held = split_valid(len(train), share, config.seed)
        valid = train
    chosen = [int(row) for row in held[:config.eval_rows]]
    if EXECUTION in config.metrics:
        databases_of(valid, chosen)  # asked before training whether every row has what the figure needs
    digest = _digest(config.data, train)
    return Examples(config=config, train=train, train_rows=rows, valid=valid, valid_rows=chosen, digest=digest)


def _load(config: TrainConfig, source: str, base: bases.Base, split: str,
          labels: Sequence[str] | None = None) -> EncodedData:
    limit = base.max_positions
    if limit is not None:
        limit -= baselines.virtual_tokens(config.method, config.baseline)
    longest = config.max_length or min(_LONGEST, limit or _LONGEST)
    return load_data(source, tokenizer=base.tokenizer, task=config.task, split=split, columns=config.columns or None,
                     max_length=longest, model_limit=limit, train_on=config.train_on, labels=labels,
                     cache=config.cache_data)


def _digest(source: str, data: EncodedData) -> str:
    path = Path(source).expanduser()
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256(data.lengths.tobytes())
    for index in range(len(data)):
        digest.update(np.asarray(data[index].input_ids, dtype=np.int32).tobytes())
    return digest.hexdigest()
