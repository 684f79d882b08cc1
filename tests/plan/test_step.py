"""What a step keeps, found without values, equals what autograd really keeps."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaw
from deltaw.bases import native_rows
from deltaw.bases.gated import gated_modules, product_made_again
from deltaw.bases.norms import keeping_less, norm_modules
from deltaw.bases.rotary import rotary_in_one_pass
from deltaw.core import LoraConfig, stretches
from deltaw.data import pack
from deltaw.data.examples import Example
from deltaw.plan.config import PlanConfig
from deltaw.plan.memory import Sizes, logits
from deltaw.plan.shapes import read_shapes
from deltaw.plan.step import Steps
from deltaw.plan.tape import Tape, Work
from deltaw.train import cross_entropy
from deltaw.train.memory import recompute_activations
from deltaw.train.objective import CausalLoss
from deltaw.train.tuning import LoraTuning


def saved_by_autograd(model: Any, batch: dict[str, torch.Tensor], objective: CausalLoss) -> int:
    """Bytes of distinct storages that the graph of a real step holds, weights and inputs apart."""
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *batch.values()]}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = objective.loss(model, batch)
    total = sum(found.values())
    del loss
    gc.collect()
    return total


@pytest.mark.parametrize(("checkpointing", "freeze_a"), [("off", False), ("layer", False), ("off", True)])
@pytest.mark.parametrize("layers", [2, 5])
def test_activations_without_values_equal_those_of_a_real_step(
        checkpointing: str, freeze_a: bool, layers: int, tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    fields = {"num_hidden_layers": layers, "hidden_size": 64, "intermediate_size": 160, "vocab_size": 96}
    model = tiny_llama(**fields).train()
    model.save_pretrained(tmp_path)
    lora = LoraConfig(r=4)
    config = PlanConfig(model=str(tmp_path), lora=lora, batch_size=3, max_length=50, packing="off",
                        freeze_a=freeze_a, gradient_checkpointing=checkpointing)  # type: ignore[arg-type]
    planned = Steps(read_shapes(str(tmp_path)), config, torch.float32).at("lora", 3, 50)

    board = deltaw.attach(model, lora, seed=0)
    LoraTuning(board, freeze_a=freeze_a)
    ids = torch.randint(3, 90, (3, 50))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    objective = CausalLoss()
    with torch.no_grad():
        board.share_inputs(lambda: objective.loss(model, batch))
    if checkpointing == "layer":
        recompute_activations(model)
        real = saved_by_autograd(model, batch, objective)
    else:
        gated = gated_modules(model, lambda: objective.loss(model, batch))
        assert len(gated) == layers
        with product_made_again(gated):
            real = saved_by_autograd(model, batch, objective)
    hidden = 3 * 50 * 64 * 4
    if checkpointing == "off":  # what is alive and not saved: the hidden states that the loss looks at, and angles
        assert planned.kept == pytest.approx(real, abs=2 * hidden)
    else:  # beside that the inputs of layers, which are held outside of the graph
        assert real <= planned.kept <= real + (layers + 2) * hidden


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("layers", [2, 5])
def test_activations_in_bfloat16_where_norms_keep_less(layers: int, native: bool, tiny_llama: Callable[..., Any],
                                                       tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(native_rows, "is_there", lambda: False)
    fields = {"num_hidden_layers": layers, "hidden_size": 64, "intermediate_size": 160, "vocab_size": 96}
    model = tiny_llama(**fields).train().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    config = PlanConfig(model=str(tmp_path), lora=LoraConfig(r=4), batch_size=3, max_length=50, packing="off")
    planned = Steps(read_shapes(str(tmp_path)), config, torch.bfloat16).at("lora", 3, 50)

    board, objective, ids = deltaw.attach(model, LoraConfig(r=4), seed=0), CausalLoss(), torch.randint(3, 90, (3, 50))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def look() -> None:
        objective.loss(model, batch)

    with torch.no_grad():
        board.share_inputs(look)
    norms = norm_modules(model, look)
    assert len(norms) == 2 * layers + 1
    with product_made_again(gated_modules(model, look)), rotary_in_one_pass(model):
        before = saved_by_autograd(model, batch, objective)
        with keeping_less(norms):
            real = saved_by_autograd(model, batch, objective)
    tokens = 3 * 50
    assert planned.kept == pytest.approx(real, abs=2 * tokens * 64 * 2 + tokens * 96 * 2)
    assert before - real >= 2 * layers * tokens * 64 * 2


def test_work_counts_the_products_that_torchs_counter_counts(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    """Of full fine-tuning, since torch's counter does not know products in place, as the fused node has them."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_llama(num_hidden_layers=3, hidden_size=64, intermediate_size=160).train()
    model.save_pretrained(tmp_path)
    config = PlanConfig(model=str(tmp_path), batch_size=2, max_length=40, packing="off")
    planned = Steps(read_shapes(str(tmp_path)), config, torch.float32).at("full", 2, 40).work
    ids = torch.randint(3, 60, (2, 40))
    with FlopCounterMode(display=False) as counter:
        model.model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    products = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    assert planned.flops - planned.attention == pytest.approx(products, rel=0.01)


def test_a_low_rank_step_multiplies_what_its_equations_say(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    """Forward, dx (not of the first layer's input) and, of the factors, H, HB, dH, dA and dB, for every layer."""
    tiny_llama(num_hidden_layers=4, hidden_size=64, intermediate_size=160).save_pretrained(tmp_path)
    config = PlanConfig(model=str(tmp_path), batch_size=2, max_length=40, lora=LoraConfig(r=2))
    planned = Steps(read_shapes(str(tmp_path)), config, torch.float32).at("lora", 2, 40).work
    shapes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 160), (64, 160), (160, 64)]
    tokens, rank = 80, 2
    frozen = sum(2 * 2 * tokens * i * o for i, o in shapes)
    factors = sum(3 * 2 * tokens * rank * (i + o) for i, o in shapes)
    first = sum(2 * tokens * (i * o + i * rank) for i, o in shapes[:3])
    assert planned.flops - planned.attention == pytest.approx(4 * (frozen + factors) - first, rel=0.01)


def test_a_packed_batch_is_followed_as_it_is_laid_out(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    shapes = read_shapes(str(tmp_path))
    kept = {}
    for packing in ("auto", "off"):
        config = PlanConfig(model=str(tmp_path), batch_size=4, max_length=16, packing=packing)  # type: ignore[arg-type]
        kept[packing] = Steps(shapes, config, torch.float32).at("lora", 4, 16).kept
    assert kept["auto"] == pytest.approx(kept["off"], rel=0.15)
    example = Example(input_ids=list(range(16)), labels=list(range(16)), where="row")
    assert pack([example] * 4)["input_ids"].shape == (1, 64)


def test_more_tokens_keep_more_in_proportion(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    config = PlanConfig(model=str(tmp_path), batch_size=2, max_length=64)
    steps = Steps(read_shapes(str(tmp_path)), config, torch.float32)
    assert steps.at("lora", 4, 64).kept == pytest.approx(2 * steps.at("lora", 2, 64).kept, rel=0.02)


def test_a_tape_forgets_what_is_gone() -> None:
    x = torch.zeros(1000, device="meta")
    with Tape([x]) as tape:
        y = x + 1
        z = y * 2
        assert (tape.now, tape.peak) == (8000, 8000)
        del y
        assert (tape.now, tape.peak) == (4000, 8000)
        _ = z.view(10, 100)
        assert tape.now == 4000
    assert Work().plus(tape.total(), 2.0).moved == 2 * (8000 + 8000)


@pytest.mark.parametrize("tokens", [5, 7, 8, 20, 21])
def test_the_loss_holds_as_many_logits_as_the_plan_says(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stretches, "STRETCH_VALUES", 7 * 64)
    h, head = torch.randn(tokens, 32), torch.nn.Linear(32, 64, bias=False).requires_grad_(False)
    sums = cross_entropy._Sums(h, torch.zeros(tokens, dtype=torch.long), cross_entropy.OutputLayer(head),
                               cross_entropy.Terms(), gradients=True)
    assert sums.dh_NI is not None
    sizes = Sizes(weights=0, matrices=0, largest=0, largest_tensor=0, vocabulary=64, width=32, trained=0,
                  trained_width=4, inside=False)
    planned = logits(sizes, PlanConfig(model="any"), 1, tokens, 4, learns=True)
    assert planned == sums.buffers["logits"].nbytes + sums.dh_NI.nbytes
