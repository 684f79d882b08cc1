"""The losses equal what the full logits give, for every way a model makes its logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from deltaw.errors import BaseModelError
from deltaw.train.objective import CausalLoss, ClassLoss
from tests.device import DEVICE, randint


def plain_loss(model: Any, batch: Any) -> tuple[torch.Tensor, int]:
    """The loss from all logits, token by token: the definition."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    total, count = torch.zeros(()), 0
    for row in range(logits.shape[0]):
        for t in range(logits.shape[1] - 1):
            target = batch["labels"][row, t + 1]
            if target != -100:
                total = total - torch.log_softmax(logits[row, t].float(), -1)[target]
                count += 1
    return total, count


def gemma(**fields: Any) -> Any:
    """A model whose logits are squashed after the output layer."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, final_logit_softcapping=2.0, pad_token_id=0, **fields)).to(DEVICE).eval()


def of_transformers(kind: str, **fields: Any) -> Any:
    """A tiny causal model of this family."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, **fields)
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(DEVICE).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("every_position", [False, True])
def test_causal_loss_and_gradient_equal_those_of_all_logits(kind: str, every_position: bool, tiny_llama: Any,
                                                            tiny_gpt2: Any, text_batches: Callable[..., Any]) -> None:
    model = {"llama": tiny_llama, "gpt2": tiny_gpt2, "gemma": gemma}[kind]()
    batch = next(text_batches()).inputs
    objective = CausalLoss(every_position=every_position)
    expected, count = plain_loss(model, batch)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = objective.loss(model, batch)
    loss.backward()
    assert objective.units(batch) == count > 0
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-5, atol=1e-6)


def test_only_supervised_positions_reach_the_output_layer(tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    model, batch = tiny_llama(), next(text_batches()).inputs
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    objective = CausalLoss()
    units = objective.units(batch)
    objective.loss(model, batch)
    few = min(8, units)  # on which the first batch is compared
    assert seen == [(1, few, 64), (few, 64), (units, 64)]
    seen.clear()
    objective.loss(model, batch)
    assert seen == [(1, 0, 64), (units, 64)]
    assert len(model.lm_head._forward_pre_hooks) == 0


def test_the_output_layer_is_asked_with_the_strides_of_a_batch_of_its_own(tiny_llama: Any,
                                                                          text_batches: Callable[..., Any]) -> None:
    """In 16 bits torch copies the whole weight for a row whose batch has another's strides, which takes a second."""
    model, batch = tiny_llama(), next(text_batches()).inputs
    strides = []
    model.lm_head.register_forward_pre_hook(lambda module, args: strides.append((args[0].shape, args[0].stride())))
    CausalLoss().loss(model, batch)
    (shape, found), *_ = strides
    assert found == (shape[1] * shape[2], shape[2], 1)


def test_a_single_row_with_all_but_one_token_supervised(tiny_llama: Any) -> None:
    ids = randint(3, 64, (1, 7))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    model = tiny_llama()
    assert CausalLoss().loss(model, batch).item() == pytest.approx(plain_loss(model, batch)[0].item(), rel=1e-6)


def test_a_model_that_bypasses_its_output_module(tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    model, batch = tiny_llama(), next(text_batches()).inputs
    expected = plain_loss(model, batch)[0].item()
    head = model.lm_head
    model.get_output_embeddings = lambda: torch.nn.Linear(1, 1)  # never called in the forward: its hook never runs
    objective = CausalLoss()
    assert objective.loss(model, batch).item() == pytest.approx(expected, rel=1e-6)
    assert objective.uses_own_logits(model)
    assert model.lm_head is head


@pytest.mark.parametrize(("kind", "fields"), [
    ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}), ("Cohere", {"logit_scale": 0.3}),
    ("Granite", {"logits_scaling": 3.0})])
def test_what_a_model_does_to_its_logits_is_found(kind: str, fields: dict[str, Any],
                                                  text_batches: Callable[..., Any]) -> None:
    model, batch = of_transformers(kind, **fields), next(text_batches()).inputs
    objective = CausalLoss()
    expected = plain_loss(model, batch)[0].item()
    for _ in range(2):
        assert objective.loss(model, batch).item() == pytest.approx(expected, rel=1e-5)
    assert not objective.uses_own_logits(model)


def test_a_model_that_does_something_unknown_is_asked_for_its_own_logits(tiny_llama: Any,
                                                                        text_batches: Callable[..., Any]) -> None:
    class Odd(type(tiny_llama())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = torch.nn.functional.dropout(output.logits.sin() * 3, 0.3, self.training)
            return output

    model, batch = Odd(tiny_llama().config).to(DEVICE).train(), next(text_batches()).inputs
    objective = CausalLoss()
    torch.manual_seed(1)
    losses = [objective.loss(model, batch).item() for _ in range(2)]
    assert objective.uses_own_logits(model)
    torch.manual_seed(1)
    assert [objective.loss(model, batch).item() for _ in range(2)] == losses
    torch.manual_seed(1)
    assert [CausalLoss().loss(model, batch).item(), objective.loss(model, batch).item()] == losses
    model.eval()
    assert objective.loss(model, batch).item() == pytest.approx(plain_loss(model, batch)[0].item(), rel=1e-6)


def test_the_loss_is_computed_in_float32(tiny_llama: Any, text_batches: Callable[..., Any]) -> None:
    model, batch = tiny_llama().bfloat16(), next(text_batches()).inputs
    assert CausalLoss().loss(model, batch).dtype == torch.float32


def test_class_loss_is_the_sum_over_rows(tiny_bert_classifier: Any) -> None:
    model = tiny_bert_classifier()
    ids = randint(3, 64, (5, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
             "labels": torch.tensor([0, 1, 2, 1, 0], device=DEVICE)}
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    expected = sum(-torch.log_softmax(logits[i], -1)[label] for i, label in enumerate(batch["labels"]))
    assert ClassLoss().units(batch) == 5
    torch.testing.assert_close(ClassLoss().loss(model, batch), expected)


def test_one_output_is_a_regression() -> None:
    model = torch.nn.Module()
    model.forward = lambda x: x  # type: ignore[method-assign,assignment]
    batch = {"x": torch.tensor([[1.0], [2.0]]), "labels": torch.tensor([0.0, 5.0])}
    assert ClassLoss().loss(model, batch).item() == pytest.approx(1.0 + 9.0)
    assert F.mse_loss(torch.tensor([1.0, 2.0]), batch["labels"]).item() == pytest.approx(5.0)


def test_another_network_is_refused_with_the_remedy() -> None:
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(BaseModelError, match=r"is a Linear.*write an Objective"):
        CausalLoss().loss(torch.nn.Linear(1, 1), {"input_ids": ids, "labels": ids})
