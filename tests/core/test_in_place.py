"""A layer's output may be changed in place, as a plain linear layer's may, whichever way it was computed."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaw
from deltaw import LoraConfig
from tests.device import DEVICE, randn

WAYS = ("one layer", "shared input", "dropout", "two adapters", "rows", "tokens")
"""How the change is computed: a node for each layer, for all layers of an input, for segments of a batch, plainly."""
BATCH, TOKENS, INPUTS, HEADS = 2, 5, 64, 4


class Queries(nn.Module):
    """Three projections of one input, each changed in place in a way that models have."""

    def __init__(self, kind: type[nn.Linear]) -> None:
        super().__init__()
        self.q, self.k, self.v = (kind(INPUTS, 32, bias=i != 1) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(*x.shape[:2], HEADS, -1).permute(0, 2, 1, 3)
        q /= 3.0  # as DeBERTa scales its queries
        k = self.k(x)
        k.add_(1.0).mul_(2.0)
        v = self.v(x)
        v[:, 1:] += v[:, :-1].clone()
        return torch.cat([q.permute(0, 2, 1, 3).flatten(2), k, v], -1)


def plain(x: Tensor, projections: dict[str, Tensor], change: dict[str, Tensor], model: nn.Module) -> Tensor:
    """`Queries.forward` in float64 without a change in place, W and the change of each output given."""
    q, k, v = (x @ projections[site].double().t() + change[site] for site in "qkv")
    q, v = (y + model.get_submodule(site).get_parameter("bias").double() for site, y in (("q", q), ("v", v)))
    return torch.cat([q / 3.0, 2.0 * (k + 1.0), torch.cat([v[:, :1], v[:, 1:] + v[:, :-1]], 1)], -1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("packed", [False, True], ids=["float32", "nf4"])
@pytest.mark.parametrize("way", WAYS)
def test_an_output_is_changed_in_place_and_gradients_are_those_of_dense_float64(way: str, packed: bool) -> None:
    kind: Any = nn.Linear
    if packed:
        kind = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").nn.LinearNF4
    model = Queries(kind).to(DEVICE).train()
    weights = {site: unpacked(model.get_submodule(site)) for site in "qkv"}
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False,
                        lora_dropout=1e-9 if way == "dropout" else 0.0)
    board = deltaw.attach(model, config, "a", seed=0)
    board.add("b", config, seed=1)
    board.use({"a": 1.0, "b": 1.0} if way == "two adapters" else "a")
    x, owners = randn(BATCH, TOKENS, INPUTS), {"a": torch.ones(BATCH, TOKENS, 1, device=DEVICE)}
    route: Any = nullcontext()
    if way == "shared input":
        assert board.share_inputs(lambda: model(x)) == [("q", "k", "v")]
    elif way == "two adapters":
        owners["b"] = owners["a"]
    elif way == "rows":
        route = board.route(["a", "b"])
        owners["a"] = torch.tensor([1.0, 0.0], device=DEVICE).view(2, 1, 1).expand(BATCH, TOKENS, 1)
    elif way == "tokens":
        x, route = x[:1], board.route(["a", "b"], lengths=[2, 3])
        owners["a"] = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0], device=DEVICE).view(1, TOKENS, 1)
    if way in ("rows", "tokens"):
        owners["b"] = 1.0 - owners["a"]
    exact = {name: {key: p.detach().double().requires_grad_() for key, p in board.parameters(name).items()}
             for name in owners}

    def of(site: str, name: str, factor: str) -> Tensor:
        return next(t for key, t in exact[name].items() if key.startswith(site) and key.endswith(factor))

    with route:
        y = model(x)
        y.sin().sum().backward()
    wide = x.double()
    change = {site: sum((2.0 * owner * (wide @ of(site, name, "A").t() @ of(site, name, "B").t())
                         for name, owner in owners.items()), torch.zeros((), device=DEVICE)) for site in "qkv"}
    expected = plain(wide, weights, change, model)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    expected.sin().sum().backward()
    for name in owners:
        for key, p in board.parameters(name).items():
            assert p.grad is not None
            torch.testing.assert_close(p.grad.double(), exact[name][key].grad, rtol=1e-4, atol=1e-4)


def unpacked(layer: Any) -> Tensor:
    """A layer's weight as numbers."""
    if type(layer) is nn.Linear:
        return layer.weight.detach()
    import bitsandbytes as bnb

    dense: Tensor = bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
    return dense
