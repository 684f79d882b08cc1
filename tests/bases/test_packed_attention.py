"""Examples end to end give the loss and the gradients that they give apart, and do not see one another."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import deltaw
from deltaw.bases.packed_attention import attend, attention_modules, packed_attention, takes_packed
from deltaw.data import Example, collate, pack
from deltaw.train.objective import CausalLoss

SHAPE: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": SHAPE, "Qwen2": SHAPE, "Qwen3": SHAPE | {"head_dim": 8}, "Mistral": SHAPE | {"sliding_window": 5},
    "Gemma3Text": SHAPE | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "GPT2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0, "attn_pdrop": 0.0}}
CLASSES = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**MODELS[kind])
    model = getattr(transformers, CLASSES.get(kind, f"{kind}ForCausalLM"))(config).to(dtype).eval()
    model.set_attn_implementation("sdpa")
    return model


def examples(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for n in lengths:
        ids = torch.randint(3, 64, (n,), generator=generator).tolist()
        made.append(Example(ids, [-100 if i < n // 3 else token for i, token in enumerate(ids)], "rows.jsonl:1"))
    return made


def loss_and_gradients(model: Any, board: Any, batch: Any) -> tuple[float, dict[str, torch.Tensor]]:
    objective = CausalLoss()
    loss = objective.loss(model, batch)
    loss.backward()
    gradients = {name: p.grad for name, p in board.parameters("default").items() if p.grad is not None}
    model.zero_grad()
    return loss.item(), gradients


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_end_to_end_equals_padded(kind: str, dtype: torch.dtype) -> None:
    model, rows = model_of(kind, dtype), examples(9, 3, 17, 2, 9)
    config = deltaw.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    board = deltaw.attach(model, config, seed=0)
    assert takes_packed(model)
    apart, wanted = loss_and_gradients(model, board, collate(rows, 0))
    with packed_attention(model):
        together, got = loss_and_gradients(model, board, pack(rows))
        assert loss_and_gradients(model, board, collate(rows, 0))[0] == pytest.approx(apart, rel=1e-6)
    assert CausalLoss().units(pack(rows)) == CausalLoss().units(collate(rows, 0))
    assert together == pytest.approx(apart, rel=1e-5 if dtype == torch.float32 else 1e-2)
    assert got.keys() == wanted.keys()
    if dtype == torch.float32:
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-4, msg=name)
    assert model.config._attn_implementation == "sdpa"


def test_no_example_sees_another() -> None:
    model, rows = model_of("Llama"), examples(7, 6, 5)
    with packed_attention(model), torch.no_grad():
        inputs = {name: t for name, t in pack(rows).items() if name != "labels"}
        before = model(**inputs, use_cache=False).logits[0]
        inputs["input_ids"][0, 7:13] = 5  # the middle one becomes another
        after = model(**inputs, use_cache=False).logits[0]
    assert torch.equal(before[:7], after[:7])
    assert torch.equal(before[13:], after[13:])
    assert not torch.allclose(before[7:13], after[7:13])


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 3}, {"scaling": 0.3}], ids=str)
def test_the_attention_itself_against_softmax_in_float64(heads: int, kv: int, options: dict[str, Any]) -> None:
    lengths, width = [5, 1, 8], 4
    total = sum(lengths)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, total, n, width, generator=generator).transpose(1, 2).requires_grad_()
               for n in (heads, kv, kv))
    places = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    out, _ = attend(torch.nn.Module(), q, k, v, None, cu_seq_lens_q=places, **options)
    of = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    at = torch.arange(total)
    sees = (of[:, None] == of[None]) & (at[:, None] >= at[None])
    if "sliding_window" in options:
        sees &= at[:, None] - at[None] < options["sliding_window"]
    wide = [t.double() for t in (q, k.repeat_interleave(heads // kv, 1), v.repeat_interleave(heads // kv, 1))]
    scores = wide[0] @ wide[1].transpose(2, 3) * options.get("scaling", width**-0.5)
    expected = (scores.masked_fill(~sees, -torch.inf).softmax(-1) @ wide[2]).transpose(1, 2)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    gradient = torch.randn(out.shape, generator=generator)
    for mine, true in zip(torch.autograd.grad(out, [q, k, v], gradient),
                          torch.autograd.grad(expected, [q, k, v], gradient.double()), strict=True):
        torch.testing.assert_close(mine.double(), true.double(), rtol=1e-4, atol=1e-5)


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    """The output of a packed row, tokens first, and the gradients of its sum of squares."""
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    places = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    out, _ = attend(torch.nn.Module(), *leaves, None, cu_seq_lens_q=places)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize(("lengths", "calls"), [([3, 3, 5, 5, 5, 2], 3), ([4] * 6, 1), ([3, 4, 3], 3)], ids=str)
def test_neighbours_of_one_length_are_one_call_and_keep_their_bits(lengths: list[int], calls: int) -> None:
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(1, sum(lengths), n, 8, generator=generator).transpose(1, 2) for n in (6, 2, 2)]
    with torch.profiler.profile() as profile:
        together = attended(*whole, lengths)
    names = [event.name for event in profile.events()]
    for operation in ("", "_backward"):
        assert names.count(f"aten::_scaled_dot_product_flash_attention_for_cpu{operation}") == calls
    apart = [attended(*(t[:, :, stop - n:stop] for t in whole), [n])
             for n, stop in zip(lengths, itertools.accumulate(lengths), strict=True)]
    for mine, parts, dim in zip(together, zip(*apart, strict=True), (1, 2, 2, 2), strict=True):
        assert torch.equal(mine, torch.cat(parts, dim))


def test_the_operation_is_sound_for_the_compiler() -> None:
    q, k, v = (torch.randn(1, n, 9, 4, requires_grad=True) for n in (4, 2, 2))
    places = torch.tensor([0, 4, 9], dtype=torch.int32)
    torch.library.opcheck(torch.ops.deltaw.packed_attention, (q, k, v, places, 0.5))


def test_attention_dropout_goes_the_plain_way() -> None:
    q, k, v = (torch.randn(1, 2, 6, 4) for _ in range(3))
    places = torch.tensor([0, 2, 6], dtype=torch.int32)
    torch.manual_seed(0)
    out, _ = attend(torch.nn.Module(), q, k, v, None, dropout=0.5, cu_seq_lens_q=places)
    torch.manual_seed(0)
    first = F.scaled_dot_product_attention(q[:, :, :2], k[:, :, :2], v[:, :, :2], is_causal=True, dropout_p=0.5)
    assert torch.equal(out[:, :2], first.transpose(1, 2))


def test_which_modules_attend() -> None:
    model = model_of("Llama")
    with packed_attention(model), attention_modules() as found:
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert found == [layer.self_attn for layer in model.model.layers]


def test_networks_that_cannot_be_asked() -> None:
    import transformers

    bert = transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48))
    eager = model_of("Llama")
    eager.set_attn_implementation("eager")
    assert not takes_packed(eager)
    assert not takes_packed(torch.nn.Linear(2, 2))
    bert.set_attn_implementation("eager")
    assert not takes_packed(bert)
