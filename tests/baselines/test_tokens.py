"""Trained tokens in a row: where they stand, that rows do not see each other, and that a cache changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deltaw.baselines import METHODS, BaselineConfig, prompt_ends
from deltaw.baselines.layout import layout
from deltaw.errors import StateError
from tests.baselines.conftest import DECODERS, ENCODERS, families

KINDS = {"preembed": {"prefix_tokens": 3, "infix_tokens": 2}, "prelayer": {"prefix_tokens": 3, "infix_tokens": 2},
         "past": {"prefix_tokens": 3, "prefix_form": "past"},
         "lora+pl": {"prefix_tokens": 3, "infix_tokens": 2}}


def put_on(kind: str, model: Any) -> Any:
    tuned = METHODS["prelayer" if kind == "past" else kind](model, BaselineConfig(**KINDS[kind]), 5)
    for parameter in tuned.parameters().values():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    return tuned


def test_a_layout_by_hand() -> None:
    found = layout(torch.tensor([2, 3]), 4, prefix=2, infix=1, causal=True)
    # 0-3 are the row's own tokens, 4 and 5 the prefix, 6 the infix
    assert found.source_BS.tolist() == [[4, 5, 0, 1, 6, 2, 3], [4, 5, 0, 1, 2, 6, 3]]
    assert found.back_BT.tolist() == [[2, 4, 5, 6], [2, 3, 5, 6]]  # the infix answers for the prompt's last token
    assert layout(torch.tensor([2]), 4, 2, 1, causal=False).back_BT.tolist() == [[2, 3, 5, 6]]
    assert found.spread(torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), 9).tolist() == [
        [9, 9, 1, 1, 9, 1, 0], [9, 9, 1, 1, 1, 9, 1]]


@pytest.mark.parametrize("family", families(*DECODERS))
def test_preembed_is_a_row_with_the_embeddings_put_in(family: str, tiny: Callable[..., Any]) -> None:
    model = tiny(family)
    ids, ends = torch.randint(3, 64, (2, 7)), torch.tensor([4, 6])
    tuned = put_on("preembed", model)
    soft = tuned.parameters()["tokens.0"].detach()
    with prompt_ends(ends), torch.no_grad():
        got = model(input_ids=ids).logits
    for row, end in enumerate(ends.tolist()):
        with tuned.off(), torch.no_grad():
            words = model.get_input_embeddings()(ids[row])
            joined = torch.cat([soft[:3], words[:end], soft[3:], words[end:]])[None]
            expected = model(inputs_embeds=joined).logits[0]
        kept = [3 + t for t in range(end - 1)] + [3 + end + 1] + [5 + t for t in range(end, 7)]
        torch.testing.assert_close(got[row], expected[kept], rtol=1e-5, atol=1e-5)


def test_prelayer_replaces_what_layers_computed(tiny: Callable[..., Any]) -> None:
    model = tiny("llama", num_hidden_layers=3)
    tuned = put_on("prelayer", model)
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda m, a, k: seen.append((a[0] if a else k["hidden_states"]).clone()),
                                        with_kwargs=True)
    model(input_ids=torch.randint(3, 64, (2, 6)))
    for layer, hidden in enumerate(seen):
        trained = tuned.parameters()[f"tokens.{layer}"]
        assert torch.equal(hidden[:, :3], trained[:3].expand(2, -1, -1))
        assert torch.equal(hidden[:, -2:], trained[3:].expand(2, -1, -1))
    assert tuned.count() == 3 * 32 * 5  # L·d·(l_p + l_i)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", families(*DECODERS))
def test_generation_with_a_cache_and_left_padding_is_that_without(kind: str, family: str,
                                                                  tiny: Callable[..., Any]) -> None:
    model = tiny(family)
    put_on(kind, model)
    prompts = [torch.randint(3, 64, (n,)).tolist() for n in (7, 4, 1)]
    expected = []
    for prompt in prompts:  # one at a time, all of the row anew for each token
        row = list(prompt)
        for _ in range(5):
            with torch.no_grad(), prompt_ends(torch.tensor([len(prompt)])):
                row.append(int(model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
        expected.append(row[len(prompt):])
    ids = torch.tensor([[0] * (7 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (7 - len(p)) + [1] * len(p) for p in prompts])
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
    got = model.generate(input_ids=ids, attention_mask=mask, **options)
    assert got[:, 7:].tolist() == expected
    beams = model.generate(input_ids=ids, attention_mask=mask, num_beams=3, **options)
    for row, prompt in enumerate(prompts):
        alone = model.generate(input_ids=torch.tensor([prompt]), num_beams=3, **options)
        assert torch.equal(beams[row, 7:], alone[0, len(prompt):])
    if kind == "past":
        assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options), got)


@pytest.mark.parametrize("kind", ["preembed", "prelayer", "past"])
@pytest.mark.parametrize("family", families("llama", "gpt2", "bert", "roberta", "deberta"))
def test_a_row_does_not_see_the_batch_around_it(kind: str, family: str, tiny: Callable[..., Any],
                                                rows: dict[str, Any]) -> None:
    if (kind, family) == ("past", "deberta"):
        pytest.skip("DeBERTa takes no past")
    model = tiny(family)
    put_on(kind, model)
    with torch.no_grad():
        together = model(**rows).logits
        for row, length in enumerate((9, 6, 4)):
            alone = model(input_ids=rows["input_ids"][row:row + 1, :length]).logits[0]
            mine = together[row] if family in ENCODERS else together[row, :length]
            torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-5)


def test_a_cache_belongs_to_the_method_that_began_it(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    base = model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=True).past_key_values
    for kind in ("preembed", "past"):
        tuned = put_on(kind, model)
        with pytest.raises(StateError, match="were computed without"):
            model(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=base)
        tuned.remove()
    put_on("preembed", model)
    ids, mask = torch.ones(2, 4, dtype=torch.long), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(StateError, match="Pad on the left"):
        model(input_ids=ids[:, :1], past_key_values=cache)


def test_positions_are_taken_from_the_limit(tiny: Callable[..., Any]) -> None:
    from deltaw.bases.load import taken_positions

    model = tiny("gpt2")
    tuned = put_on("preembed", model)
    assert taken_positions(model) == 5
    tuned.remove()
    assert taken_positions(model) == 0
