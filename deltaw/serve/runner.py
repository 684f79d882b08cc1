"""One forward over the tokens of a step: by the kernel, of all sequences in one row, or of each by itself.

The fastest way is the kernel of `native/`, for models of Llama's structure on a processor. In one row is the fast way
everywhere else, for every model of transformers whose attention can be replaced and does nothing that
`cache` does not know. Whether that holds is not read from a list of models: a short trial compares its logits with the
model's own. A model that fails it (recurrent states, position biases inside attention) runs sequence by sequence with a
cache that it makes itself; slower, and as correct. What such a cache is good for is tried out too: recurrent models go
on from theirs by one token, but not all of them by several.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence as Rows
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from deltaw.bases.any_length import attention_of_any_length
from deltaw.core.compiled import NoKernel
from deltaw.serve.banks import Banks
from deltaw.serve.cache import RaggedCache, Span, UnknownAttention
from deltaw.serve.places import Start
from deltaw.serve.request import BASE
from deltaw.serve.scheduler import Chunk

TRIAL = (7, 4)
"""Lengths of the sequences of the trial."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Largest difference of logits in the trial, in proportion to the largest logit; 0.05 for 16-bit numbers."""


class Runner(Protocol):
    """What the engine needs of a model."""

    reuses: bool
    """Whether what one sequence computed can be copied for another."""
    says: str
    """How steps are computed, for the line that tells of it."""
    merges: bool
    """Whether an adapter in the weights would cost nothing."""

    def begin(self, start: Start) -> None:
        """Make a place ready for a sequence."""

    def run(self, chunks: Rows[Chunk]) -> tuple[list[Chunk], Tensor]:
        """Compute these tokens; the chunks that complete their sequence, and their logits (B, V)."""


class RowRunner:
    """All tokens of a step in one row."""

    reuses = True
    merges = True
    says = "steps run in the model's own layers, all sequences in one row"

    def __init__(self, model: Any, banks: Banks, *, places: int, capacity: int) -> None:
        weight = next(model.parameters())
        self.model, self.banks, self.device = model, banks, weight.device
        self.cache = RaggedCache(places, capacity, dtype=weight.dtype, device=weight.device)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def begin(self, start: Start) -> None:
        """Copy what can be reused from another place."""
        if start.copy_from is not None:
            self.cache.copy(start.copy_from, start.place, start.reused)

    @torch.inference_mode()
    def run(self, chunks: Rows[Chunk]) -> tuple[list[Chunk], Tensor]:
        """One forward over all chunks, the logits of the last token of those that complete their sequence."""
        ordered = sorted(chunks, key=lambda c: (c.end - c.start > 1, *self.banks.order(c.sequence.blend)))
        rows, at = [], 0
        for chunk in ordered:
            rows.append(Span(at, at + chunk.end - chunk.start, chunk.sequence.place, chunk.end))
            at = rows[-1].b
        ids = [token for c in ordered for token in c.sequence.tokens(c.start, c.end)]
        positions = [position for c in ordered for position in range(c.start, c.end)]
        self.cache.lay_out(rows)
        complete = [i for i, chunk in enumerate(ordered) if chunk.completes]
        self.banks.lay_out([(c.sequence.blend, c.end - c.start) for c in ordered], complete)
        logits = self._forward(ids, positions, [rows[i].b - 1 for i in complete])
        return [ordered[i] for i in complete], logits

    def _forward(self, ids: list[int], positions: list[int], keep: list[int]) -> Tensor:
        at = torch.tensor(keep, device=self.device, dtype=torch.long)
        chosen = {"logits_to_keep": at} if self._keeps_logits else {}
        try:
            with attention_of_any_length(self.device):
                out = self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=False, return_dict=True,
                                 position_ids=torch.tensor([positions], device=self.device), **chosen)
        finally:
            self.banks.clear()
        logits: Tensor = out.logits[0]
        return logits if self._keeps_logits else logits.index_select(0, at)


Keeps = Literal["parts", "whole", "nothing"]
"""What a model's cache is good for: to go on with several tokens, with one, or not at all."""
CACHES = ("past_key_values", "cache_params", "state")
"""What models call the cache that they take and give back."""


class ApartRunner:
    """Each sequence by itself, with a cache of its own that the model makes."""

    reuses = False
    merges = True

    def __init__(self, model: Any, banks: Banks, keeps: Keeps = "nothing") -> None:
        self.model, self.banks, self.device, self.keeps = model, banks, next(model.parameters()).device, keeps
        self.says = "steps run in the model's own layers, each sequence by itself: it cannot run with others in one row"
        self.says += ", and is computed anew for each token" if keeps == "nothing" else ""
        asked = inspect.signature(model.forward).parameters
        self._cache = next((name for name in CACHES if name in asked), "")
        self._caches: dict[int, Any] = {}

    def begin(self, start: Start) -> None:
        """Start with an empty cache."""
        self._caches.pop(start.place, None)

    @torch.inference_mode()
    def run(self, chunks: Rows[Chunk]) -> tuple[list[Chunk], Tensor]:
        """One forward for each chunk; where the cache is not good for parts, they are computed with the last."""
        computed = [(chunk, self._forward(chunk)) for chunk in chunks if chunk.completes or self.keeps == "parts"]
        logits = [found for chunk, found in computed if chunk.completes]
        return [chunk for chunk in chunks if chunk.completes], torch.stack(logits) if logits else torch.empty(0)

    def _forward(self, chunk: Chunk) -> Tensor:
        """The logits (V,) after the last token of a chunk."""
        sequence = chunk.sequence
        held = self._caches.get(sequence.place)
        start = 0 if held is None else chunk.start
        self.banks.lay_out([(sequence.blend, chunk.end - start)])
        ids = torch.tensor([sequence.tokens(start, chunk.end)], device=self.device)
        options = {} if self.keeps == "nothing" else {self._cache: held, "use_cache": True}
        try:
            out = self.model(input_ids=ids, return_dict=True, **options)
        finally:
            self.banks.clear()
        if options:
            self._caches[sequence.place] = getattr(out, self._cache)
        logits: Tensor = out.logits[0, -1]
        return logits


def choose_runner(model: nn.Module, banks: Banks, *, places: int, capacity: int, kernel: bool = True) -> Runner:
    """The fastest runner with which the model gives the same logits; one always does."""
    expected = _trial_alone(model)
    reason = "not asked for"
    if kernel:
        try:
            return _by_kernel(model, banks, places, capacity, expected)
        except NoKernel as error:
            reason = str(error)
    runner = _in_one_row(model, banks, places, capacity, expected) or _apart(model, banks, expected)
    runner.says += f" (no kernel: {reason})"
    return runner


def _by_kernel(model: Any, banks: Banks, places: int, capacity: int, expected: Rows[Tensor]) -> Runner:
    """The kernel's runner; NoKernel where there is none, it does not fit, or computes something else."""
    from deltaw.serve.native.runner import NativeRunner

    try:
        runner = NativeRunner(model, banks, places=max(places, 3), capacity=max(capacity, 2 * max(TRIAL)))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:  # a part is called or shaped otherwise
        raise NoKernel(f"the model is not made like Llama ({type(error).__name__})") from error
    if not _agrees(expected, _trial_together(runner, model)):
        raise NoKernel("it gives other logits than the model")
    return runner


def _in_one_row(model: Any, banks: Banks, places: int, capacity: int, expected: Rows[Tensor]) -> RowRunner | None:
    before = getattr(model.config, "_attn_implementation", None)
    try:
        trial = RowRunner(model, banks, places=3, capacity=2 * max(TRIAL))
        trial.cache.register(model)
        same = _agrees(expected, _trial_together(trial, model))
    except (UnknownAttention, TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError, IndexError):
        same = False
    if not same:
        if before is not None:
            model.set_attn_implementation(before)
        return None
    runner = RowRunner(model, banks, places=places, capacity=capacity)
    runner.cache.register(model)
    return runner


def _apart(model: Any, banks: Banks, expected: Rows[Tensor]) -> ApartRunner:
    ways: tuple[Keeps, ...] = ("parts", "whole")
    for keeps in ways:
        try:
            if _agrees(expected, _trial_together(ApartRunner(model, banks, keeps), model, parts=True)):
                return ApartRunner(model, banks, keeps)
        except (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError, IndexError):
            pass
    return ApartRunner(model, banks)


def _trial_tokens(model: Any) -> list[list[int]]:
    size = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(size, (length + 1,), generator=generator).tolist() for length in TRIAL]


@torch.inference_mode()
def _trial_alone(model: Any) -> list[Tensor]:
    """The logits of the last two tokens of each trial sequence, by the model's own forward."""
    device = next(model.parameters()).device
    return [model(input_ids=torch.tensor([tokens], device=device)).logits[0, -2:] for tokens in _trial_tokens(model)]


def _trial_together(runner: Runner, model: Any, *, parts: bool = False) -> list[Tensor]:
    """The same: the first computed as two prompts in one row, whole or in `parts`, the second as two single tokens."""
    from deltaw.serve.request import SamplingParams, Sequence

    sequences = [Sequence(i, tuple(tokens[:-1]), BASE, SamplingParams(), print, place=2 - 2 * i)
                 for i, tokens in enumerate(_trial_tokens(model))]
    last = [tokens[-1] for tokens in _trial_tokens(model)]
    split = 2 if parts else 0
    if parts:
        runner.run([Chunk(s, 0, split) for s in sequences])
    _, first = runner.run([Chunk(s, split, s.length) for s in sequences])
    for sequence, token in zip(sequences, last, strict=True):
        sequence.computed = sequence.length
        sequence.written.append(token)
    _, second = runner.run([Chunk(s, s.length - 1, s.length) for s in sequences])
    return [torch.stack([first[i], second[i]]) for i in range(len(sequences))]


def _agrees(expected: Rows[Tensor], got: Rows[Tensor]) -> bool:
    tolerance = TOLERANCE.get(expected[0].dtype, 0.05)
    return all(float((a.float() - b.float()).abs().max()) <= tolerance * float(a.float().abs().max()) + 1e-6
               for a, b in zip(expected, got, strict=True))
