"""Every fault that makes a run learn nothing, or harm the base, stops it; a sound run passes every check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import deltaw
from deltaw.errors import DoctorError, NonFiniteError
from deltaw.train.checksum import checksum
from deltaw.train.doctor import Doctor
from deltaw.train.loop import fit
from deltaw.train.objective import CausalLoss
from deltaw.train.optimizer import adamw
from deltaw.train.state import Pace
from deltaw.train.tuning import LoraTuning, PartTuning
from tests.device import randint

CONFIG = deltaw.LoraConfig(r=4)


def run(tuning: Any, batches: Any, *, steps: int = 5, rate: Callable[[int], float] = lambda step: 1e-2,
        optimizer: Any = None, **options: Any) -> Doctor:
    doctor = Doctor(tuning, **options)
    optimizer = optimizer or adamw(tuning.parameters(), learning_rate=1e-2)
    fit(tuning, CausalLoss(), batches, optimizer, Pace(steps=steps, rate=rate), doctor=doctor)
    return doctor


def test_a_sound_run_passes_and_says_what_was_found(tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    tuning = LoraTuning(deltaw.attach(tiny_llama(), CONFIG))
    found = {check.name: check.found for check in run(tuning, text_batches()).checks}
    count = sum(p.numel() for p in tuning.parameters().values())
    assert found["trainable"] == f"{count:,} values in 28 tensors at 14 sites"
    assert found["gradients"] == "a finite, non-zero gradient in all 28 tensors by step 2"
    assert found["movement"] == "all 14 tensors that began at zero moved by step 3"
    assert found["base"].startswith("all ")
    assert found["supervision"] == "at least 7 supervised tokens in every step"


def test_a_warm_up_from_zero_and_a_run_of_one_step_are_sound(tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    run(LoraTuning(deltaw.attach(tiny_llama(), CONFIG)), text_batches(), rate=lambda step: step * 1e-3, window=2)
    run(LoraTuning(deltaw.attach(tiny_llama(), CONFIG)), text_batches(), steps=1)


def test_an_embedding_needs_a_gradient_for_some_tokens_only(tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    config = deltaw.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])
    doctor = run(LoraTuning(deltaw.attach(tiny_llama(), config)), text_batches())
    assert not any(check.name == "unused" for check in doctor.checks)


def test_nothing_to_train() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(DoctorError, match=r"has no tensors to train.*target_modules"):
        Doctor(PartTuning(model, {})).start()


def test_a_frozen_tensor_of_the_adapter(tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    tuning = LoraTuning(deltaw.attach(tiny_llama(), CONFIG))
    name = "model.layers.1.mlp.up_proj.lora_B"
    tuning.parameters()[name].requires_grad_(False)
    with pytest.raises(DoctorError, match=rf"does not train {name}"):
        run(tuning, text_batches())


def test_a_trainable_tensor_of_the_base(tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    tuning = LoraTuning(deltaw.attach(tiny_llama(), CONFIG))
    tuning.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(DoctorError, match=r"the base: is trainable at model\.norm\.weight"):
        run(tuning, text_batches())


def test_an_adapter_that_is_not_in_use(tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    board = deltaw.attach(tiny_llama(), CONFIG)
    board.use(None)
    with pytest.raises(DoctorError, match=r"step 1: no tensor of the tuning got a gradient.*detach\(\)"):
        run(LoraTuning(board), text_batches())


def test_one_site_that_is_cut_off_from_the_loss(tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    model = tiny_llama()
    tuning = LoraTuning(deltaw.attach(model, CONFIG))
    model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(DoctorError, match=r"2 of 28 tensors got no gradient within 3 steps: "
                                          r"model\.layers\.0\.self_attn\.v_proj\.lora_A, .*lora_B"):
        run(tuning, text_batches())


def test_unused_tensors_can_be_accepted_and_are_reported(tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    model = tiny_llama()
    tuning = LoraTuning(deltaw.attach(model, CONFIG))
    model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda module, args, output: output.detach())
    found = {check.name: check.found for check in run(tuning, text_batches(), allow_unused=True).checks}
    assert "v_proj.lora_A" in found["unused"]


def test_an_optimizer_without_some_of_the_tensors(tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    tuning = LoraTuning(deltaw.attach(tiny_llama(), CONFIG))
    some = {name: p for name, p in tuning.parameters().items() if "layers.1.mlp.up_proj" not in name}
    with pytest.raises(DoctorError, match=r"1 of 28 tensors did not move so far: "
                                          r"model\.layers\.1\.mlp\.up_proj\.lora_B.*optimizer does not hold"):
        run(tuning, text_batches(), optimizer=adamw(some, learning_rate=1e-2))


def test_a_rate_too_small_for_the_tensors_dtype(tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    """A moves by less than bfloat16 can hold next to its values; B, near zero, moves."""
    tuning = LoraTuning(deltaw.attach(tiny_llama(), CONFIG, dtype=torch.bfloat16))
    with pytest.raises(DoctorError, match=r"did not move by the end.*lora_A.*too small for their dtype"):
        run(tuning, text_batches(), rate=lambda step: 1e-9)


def test_a_batch_whose_labels_are_all_masked(tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    batches = text_batches()
    batches.batches[1].inputs["labels"][:] = -100
    with pytest.raises(DoctorError, match=r"step 2: has no supervised token in its rows \(rows\.jsonl:5, .*train_on"):
        run(LoraTuning(deltaw.attach(tiny_llama(), CONFIG)), batches)


def test_a_loss_that_is_not_a_number_names_the_rows(tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    tuning = LoraTuning(deltaw.attach(tiny_llama(), CONFIG))
    before = {name: p.detach().clone() for name, p in tuning.parameters().items()}
    tuning.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"step 1: the loss is nan on rows rows\.jsonl:1, .*learning_rate"):
        run(tuning, text_batches())
    assert all(torch.equal(before[name], p) for name, p in tuning.parameters().items())


def test_a_gradient_that_is_not_finite_names_the_tensors(tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    tuning = LoraTuning(deltaw.attach(tiny_llama(), CONFIG))
    name = "model.layers.0.mlp.down_proj.lora_B"
    tuning.parameters()[name].register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match=rf"the gradient is not finite in {name}"):
        run(tuning, text_batches())


@pytest.mark.parametrize("what", ["parameter", "buffer"])
def test_a_base_that_changes(what: str, tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    model = tiny_llama()
    model.register_buffer("statistics", torch.zeros(3))
    tuning, batches = LoraTuning(deltaw.attach(model, CONFIG)), text_batches()
    target = model.statistics if what == "buffer" else model.model.layers[1].mlp.gate_proj.weight

    class Meddling:
        def __next__(self) -> Any:
            target.view(-1)[-1] += 1e-6
            return next(batches)

        state_dict, load_state_dict = batches.state_dict, batches.load_state_dict

    name = "statistics" if what == "buffer" else r"model\.layers\.1\.mlp\.gate_proj\.weight"
    with pytest.raises(DoctorError, match=rf"the base: changed at {name};"):
        run(tuning, Meddling())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool])
def test_the_checksum_sees_any_single_bit_and_any_swap(dtype: torch.dtype) -> None:
    tensor = randint(0, 2, (300, 500)).to(dtype)
    before = checksum(tensor)
    assert checksum(tensor.clone()) == before
    for place in (0, 77_777, tensor.numel() - 1):
        changed = tensor.clone().view(-1)
        changed[place] = 1 - changed[place].to(torch.int64)
        assert checksum(changed.view(300, 500)) != before
    swapped = torch.cat([tensor[150:], tensor[:150]])
    assert checksum(swapped) != before
    assert checksum(tensor.t()) != before
