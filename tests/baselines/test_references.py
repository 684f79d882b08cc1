"""Each method against an independent reference: torch.optim alone, PEFT, or the paper's formula in dense float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.baselines import METHODS, BaselineConfig
from deltaw.train.loop import fit
from deltaw.train.objective import CausalLoss
from deltaw.train.optimizer import adamw
from deltaw.train.state import Pace
from tests.baselines.conftest import DECODERS, families

peft_warns = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def f(bottleneck: Any, x: Tensor, act: Callable[[Tensor], Tensor], norm: bool = False) -> Tensor:
    """U·σ(D·x + b_D) + b_U, in x's dtype."""
    if norm:
        x = F.layer_norm(x, x.shape[-1:], bottleneck.norm.weight.to(x), bottleneck.norm.bias.to(x))
    hidden = act(x @ bottleneck.down.weight.to(x).T + bottleneck.down.bias.to(x))
    return hidden @ bottleneck.up.weight.to(x).T + bottleneck.up.bias.to(x)


def randomised(tuned: Any) -> list[Any]:
    for parameter in tuned.parameters().values():
        nn.init.normal_(parameter, std=0.3)
    return list(tuned.parts[0].bottlenecks.values())


@pytest.mark.parametrize("form", ["h", "l", "p"])
def test_adapters_of_a_post_norm_block(form: str, tiny: Callable[..., Any]) -> None:
    model = tiny("bert").double()
    layer = copy.deepcopy(model.bert.encoder.layer[0])
    made = randomised(METHODS[f"adapter-{form}"](model, BaselineConfig(bottleneck=5)))
    x = torch.randn(2, 6, 32, dtype=torch.float64)

    a = layer.attention.output.dense(layer.attention.self(x)[0])
    if form == "h":
        a = a + f(made[0], a, F.silu)
    x1 = layer.attention.output.LayerNorm(a + x)
    m = layer.output.dense(layer.intermediate(x1))
    if form == "h":
        m = m + f(made[1], m, F.silu)
    s, norm = m + x1, layer.output.LayerNorm
    expected = norm(s + f(made[0], norm(s), F.relu)) if form == "p" else norm(s)
    if form == "l":
        expected = expected + f(made[0], expected, F.relu, norm=True)
    got = model.bert.encoder.layer[0](x)
    got = got[0] if isinstance(got, tuple) else got
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["h", "l", "p"])
def test_adapters_of_a_pre_norm_block(form: str, tiny: Callable[..., Any]) -> None:
    model = tiny("gpt2").double()
    block = copy.deepcopy(model.transformer.h[0])
    made = randomised(METHODS[f"adapter-{form}"](model, BaselineConfig(bottleneck=5, activation="gelu")))
    x = torch.randn(2, 6, 32, dtype=torch.float64)

    a = block.attn(block.ln_1(x))[0]
    h = x + a + (f(made[0], a, F.gelu) if form == "h" else 0)
    m = block.mlp(block.ln_2(h))
    y = h + m + (f(made[1], m, F.gelu) if form == "h" else 0)
    if form != "h":
        y = y + f(made[0], y, F.gelu, norm=form == "l")
    got = model.transformer.h[0](x)
    got = got[0] if isinstance(got, tuple) else got
    torch.testing.assert_close(got, y, rtol=1e-12, atol=1e-12)


def test_adapter_drop_leaves_the_first_layers_alone(tiny: Callable[..., Any]) -> None:
    tuned = METHODS["adapter-d"](tiny("gpt2", n_layer=4), BaselineConfig(drop_layers=3, bottleneck=2))
    assert {name.split(".")[2] for name in tuned.parameters()} == {"3"}


@pytest.mark.parametrize(("method", "family"), [("bitfit", "gpt2"), ("full", "gpt2"), ("full", "llama"),
                                               ("ft-top-k", "llama"), ("head", "llama")])
def test_training_the_models_own_parameters_is_what_torch_does(method: str, family: str, tiny: Callable[..., Any],
                                                               batches: Callable[[str], Any]) -> None:
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    model, plain = tiny(family, **still).double(), tiny(family, **still).double()
    chosen = {"bitfit": lambda n: n.endswith("bias"), "full": lambda n: True,
              "ft-top-k": lambda n: ".layers.1." in n, "head": lambda n: n.startswith("lm_head")}[method]
    tuned = METHODS[method](model, BaselineConfig(**({"top_layers": 1} if method == "ft-top-k" else {})))
    fit(tuned, CausalLoss(), batches(family), adamw(tuned.parameters(), learning_rate=1e-2),
        Pace(steps=4, rate=lambda step: 1e-2, max_grad_norm=0))

    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(chosen(name))
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for step, batch in zip(range(4), batches(family), strict=False):
        assert step < 4
        labels = batch.inputs["labels"][:, 1:]
        logits = plain(**{k: v for k, v in batch.inputs.items() if k != "labels"}).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(moved[name], parameter, rtol=1e-7, atol=1e-9)
    assert set(tuned.parameters()) == {name for name, p in plain.named_parameters() if p.requires_grad}


@peft_warns
@pytest.mark.parametrize("family", families(*DECODERS))
def test_prompt_tuning_is_pefts(family: str, tiny: Callable[..., Any], rows: dict[str, Any]) -> None:
    import peft

    tuned = METHODS["preembed"](tiny(family), BaselineConfig(prefix_tokens=4), 1)
    theirs = peft.get_peft_model(tiny(family), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(tuned.parameters()["tokens.0"])
        expected = theirs.eval()(**rows).logits[:, 4:]
        got = tuned.model(**rows).logits
    there = rows["attention_mask"].bool()
    torch.testing.assert_close(got[there], expected[there], rtol=1e-5, atol=1e-5)


@peft_warns
@pytest.mark.parametrize("family", families(*DECODERS))
def test_prefix_tuning_of_keys_and_values_is_pefts(family: str, tiny: Callable[..., Any], rows: dict[str, Any]) -> None:
    import peft

    tuned = METHODS["prelayer"](tiny(family), BaselineConfig(prefix_tokens=4, prefix_form="past"), 1)
    theirs = peft.get_peft_model(tiny(family), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(tuned.parameters()["past.prefix"])
        expected = theirs.eval()(**rows).logits
        got = tuned.model(**rows).logits
    there = rows["attention_mask"].bool()
    torch.testing.assert_close(got[there], expected[there], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_prefix_of_an_encoder_joins_the_softmax_of_every_token(family: str, tiny: Callable[..., Any]) -> None:
    model = tiny(family).double()
    tuned = METHODS["prelayer"](model, BaselineConfig(prefix_tokens=3, prefix_form="past"), 1)
    for parameter in tuned.parameters().values():
        nn.init.normal_(parameter)
    seen: dict[str, Tensor] = {}
    attention = getattr(model, family).encoder.layer[1].attention.self
    attention.register_forward_hook(lambda m, a, k, out: seen.update(x=a[0] if a else k["hidden_states"], out=out[0]),
                                    with_kwargs=True)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    model(input_ids=torch.randint(3, 64, (2, 5)), attention_mask=mask)

    past = tuned.parameters()["past.prefix"].double().view(3, 4, 4, 8)  # tokens, layer and kind, heads, width
    heads = [layer(seen["x"]).view(2, 5, 4, 8).transpose(1, 2) for layer in (attention.query, attention.key,
                                                                            attention.value)]
    k, v = (torch.cat([past[:, 2 + i].transpose(0, 1).expand(2, -1, -1, -1), heads[1 + i]], 2) for i in (0, 1))
    scores = heads[0] @ k.transpose(2, 3) / 8**0.5
    scores = scores.masked_fill(torch.cat([torch.ones(2, 3), mask], 1)[:, None, None] == 0, -torch.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen["out"], expected, rtol=1e-9, atol=1e-9)


def test_the_mlp_of_a_prefix_is_folded_away(tiny: Callable[..., Any], rows: dict[str, Any]) -> None:
    tuned = METHODS["prelayer"](tiny("llama"), BaselineConfig(prefix_tokens=3, prefix_form="past", prefix_hidden=6), 1)
    p = tuned.parameters()
    assert {name: tuple(v.shape) for name, v in p.items()} == {
        "past.prefix": (3, 32), "past.mlp.0.weight": (6, 32), "past.mlp.0.bias": (6,), "past.mlp.2.weight": (64, 6),
        "past.mlp.2.bias": (64,)}
    hidden = torch.tanh(p["past.prefix"] @ p["past.mlp.0.weight"].T + p["past.mlp.0.bias"])
    table = hidden @ p["past.mlp.2.weight"].T + p["past.mlp.2.bias"]
    torch.testing.assert_close(tuned.values()["past.prefix"], table.detach())
    assert tuned.count() == 3 * 2 * 2 * 16  # l_p · L · 2 · d_kv
    folded = METHODS["prelayer"](tiny("llama"), BaselineConfig(prefix_tokens=3, prefix_form="past"))
    folded.put(tuned.values())
    torch.testing.assert_close(folded.model(**rows).logits, tuned.model(**rows).logits)
