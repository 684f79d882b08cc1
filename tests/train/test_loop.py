"""The loop against one written out by hand, accumulation against one big batch, early stop and keeping the best."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import deltaw
from deltaw.train.loop import better, fit
from deltaw.train.memory import recompute_activations
from deltaw.train.objective import CausalLoss
from deltaw.train.optimizer import adamw, schedule
from deltaw.train.state import Batch, Pace, State
from deltaw.train.tuning import LoraTuning
from tests.device import DEVICE, ON_CPU, randn

LOSS = 1e-6 if ON_CPU else 1e-5
"""On a GPU products of other shapes are summed in another order."""


class Recorder:
    """Keeps what the loop reports."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.rates: list[float] = []
        self.figures: list[tuple[int, Mapping[str, float]]] = []

    def step(self, state: State, *, loss: float, rate: float, norm: float) -> None:
        self.losses.append(loss)
        self.norms.append(norm)
        self.rates.append(rate)

    def evaluated(self, state: State, figures: Mapping[str, float]) -> None:
        self.figures.append((state.step, figures))


def lora(model: Any, **fields: Any) -> LoraTuning:
    return LoraTuning(deltaw.attach(model, deltaw.LoraConfig(r=4, **fields), seed=1))


def run(tuning: LoraTuning, batches: Any, *, steps: int = 6, rate: float = 1e-2, **options: Any) -> Recorder:
    recorder = Recorder()
    pace = Pace(steps=steps, rate=lambda step: rate, **{k: options.pop(k) for k in list(options)
                                                         if k in Pace.__dataclass_fields__})
    optimizer = adamw(tuning.parameters(), learning_rate=rate)
    fit(tuning, CausalLoss(), batches, optimizer, pace, watch=recorder, **options)
    return recorder


def test_the_loop_equals_one_written_by_hand(tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    """Loss curve and final tensors of transformers' own loss, torch's AdamW and transformers' schedule."""
    from transformers import get_scheduler

    steps, peak, accumulate = 8, 1e-2, 2
    tuning = lora(tiny_llama())
    rate = schedule("cosine", total=steps, warmup=2)
    recorder = Recorder()
    fit(tuning, CausalLoss(), text_batches(count=5), adamw(tuning.parameters(), learning_rate=peak, weight_decay=0.1),
        Pace(steps=steps, rate=lambda step: peak * rate(step), accumulate=accumulate, max_grad_norm=0.5),
        watch=recorder)

    model, batches = tiny_llama(), text_batches(count=5)
    reference = list(deltaw.attach(model, deltaw.LoraConfig(r=4), seed=1).parameters("default").values())
    optimizer = torch.optim.AdamW(reference, lr=peak, weight_decay=0.1)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=steps)
    model.train()
    expected = []
    for _ in range(steps):
        micro = [next(batches).inputs for _ in range(accumulate)]
        items = sum(int((b["labels"][:, 1:] != -100).sum()) for b in micro)
        total = sum(model(**b, num_items_in_batch=torch.tensor(items)).loss for b in micro)
        total.backward()
        torch.nn.utils.clip_grad_norm_(reference, 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        expected.append(total.item())
    assert expected[-1] < expected[0]
    assert recorder.losses == pytest.approx(expected, rel=LOSS)
    assert max(recorder.norms) > 0.5  # clipping had something to do
    for ours, theirs in zip(tuning.parameters().values(), reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_accumulation_equals_one_big_batch(tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    """Micro-batches with different numbers of supervised tokens: a mean of means would differ."""
    parts = text_batches(count=2)
    counts = {CausalLoss().units(b.inputs) for b in parts.batches}
    parts.batches[0].inputs["labels"][1:] = -100
    assert len({CausalLoss().units(b.inputs) for b in parts.batches} | counts) > 1
    whole = copy.deepcopy(parts)
    joined = {k: torch.cat([b.inputs[k] for b in parts.batches]) for k in parts.batches[0].inputs}
    whole.batches = [Batch(joined)]
    apart, together = lora(tiny_llama()), lora(tiny_llama())
    losses = run(apart, parts, accumulate=2).losses
    assert losses == pytest.approx(run(together, whole).losses, rel=LOSS)
    for a, b in zip(apart.parameters().values(), together.parameters().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("figure", "new", "old", "expected"), [
    ("loss", 1.0, 2.0, True), ("loss", 2.0, 2.0, False), ("f1", 0.2, 0.1, True), ("f1", 0.1, 0.1, False),
    ("loss", 5.0, None, True), ("loss", float("nan"), None, False), ("f1", float("nan"), 0.1, False)])
def test_what_is_better(figure: str, new: float, old: float | None, expected: bool) -> None:
    assert better(figure, new, old) is expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_changes_nothing(dtype: torch.dtype, tiny_llama: Any,
                                                text_batches: Callable[..., Any]) -> None:
    plain, saving = tiny_llama().to(dtype), tiny_llama().to(dtype)
    recompute_activations(saving)
    assert run(lora(saving), text_batches()).losses == pytest.approx(run(lora(plain), text_batches()).losses, rel=1e-6)


def scores(values: list[float]) -> Callable[[], Mapping[str, float]]:
    remaining = iter(values)
    return lambda: {"loss": next(remaining), "exact_match": 0.0}


def test_the_best_evaluation_is_kept(tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    tuning, seen = lora(tiny_llama()), []

    def evaluate() -> Mapping[str, float]:
        assert not tuning.model.training
        seen.append({name: p.detach().clone() for name, p in tuning.parameters().items()})
        return {"loss": [3.0, 1.0, 2.0][len(seen) - 1]}

    optimizer = adamw(tuning.parameters(), learning_rate=1e-2)
    state = fit(tuning, CausalLoss(), text_batches(), optimizer,
                Pace(steps=6, rate=lambda step: 1e-2, eval_every=2, keep_best="loss"), evaluate=evaluate)
    assert (state.best, state.best_step, state.waited) == (1.0, 4, 1)
    assert all(torch.equal(state.best_tensors[name], tensor) for name, tensor in seen[1].items())
    assert not torch.equal(seen[1]["model.layers.0.mlp.up_proj.lora_B"], seen[2]["model.layers.0.mlp.up_proj.lora_B"])


def test_a_higher_metric_is_better(tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    tuning, values = lora(tiny_llama()), iter([0.2, 0.9, 0.5])
    state = fit(tuning, CausalLoss(), text_batches(), adamw(tuning.parameters(), learning_rate=1e-2),
                Pace(steps=3, rate=lambda step: 1e-2, eval_every=1, keep_best="f1"),
                evaluate=lambda: {"f1": next(values)})
    assert (state.best, state.best_step) == (0.9, 2)


def test_it_stops_when_patience_is_out(tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    tuning = lora(tiny_llama())
    recorder = run(tuning, text_batches(), steps=20, eval_every=1, keep_best="loss", patience=2,
                   evaluate=scores([3.0, 2.0, 2.0, 2.5, 0.0]))
    assert [step for step, _ in recorder.figures] == [1, 2, 3, 4]


def test_any_module_trains_with_an_objective_of_its_own() -> None:
    class Squares:
        def units(self, batch: Mapping[str, Tensor]) -> int:
            return len(batch["x"])

        def loss(self, model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            return ((model(batch["x"]) - batch["labels"]) ** 2).sum()

    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(DEVICE)
    x = randn(16, 4)
    tuning = LoraTuning(deltaw.attach(net, deltaw.LoraConfig(r=2, target_modules=["0", "2"])))
    batch = Batch({"x": x, "labels": x[:, :3].flip(1)})

    class One:
        def __next__(self) -> Batch:
            return batch

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            pass

    recorder = Recorder()
    fit(tuning, Squares(), One(), adamw(tuning.parameters(), learning_rate=0.05),
        Pace(steps=80, rate=lambda step: 0.05), watch=recorder)
    assert recorder.losses[-1] < 0.1 * recorder.losses[0]
