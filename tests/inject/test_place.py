"""Where torch or a model would pass an adapted layer by, or hide the rows of a batch from it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import deltaw
from deltaw import LoraConfig
from deltaw.errors import RoutingError
from tests.laws.dense import dense, error, fill
from tests.laws.test_undo import snapshot

# What torch says when an encoder packs rows, or will not; not what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is")


def encoder(*, batch_first: bool = True, layers: int = 2) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, layers)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("target", ["layers.0.linear1", "layers.1.self_attn", "layers.1.linear2"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_path_of_evaluation_does_not_skip_adapters(target: str, padded: bool) -> None:
    model, x = encoder(), torch.randn(3, 5, 8)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [4]]) if padded else None
    before = snapshot(model)
    with torch.no_grad():
        plain = model(x, src_key_padding_mask=mask)
    expected_base = encoder()
    board = deltaw.attach(model, LoraConfig(r=2, target_modules=[target]), "a")
    fill(board, "a", seed=1)
    expected = dense(expected_base, [(board.adapter("a"), 1.0)])(x.double(), src_key_padding_mask=mask)
    with torch.no_grad():
        output = model(x, src_key_padding_mask=mask)
    seen = ~mask if mask is not None else torch.ones(3, 5, dtype=torch.bool)
    assert error(output[seen], expected[seen]) < 1e-5
    assert error(plain[seen], expected[seen]) > 1e-2
    deltaw.detach(model)
    assert snapshot(model) == before
    assert model.use_nested_tensor
    with torch.no_grad():
        assert torch.equal(model(x, src_key_padding_mask=mask), plain)


def test_rows_in_the_second_dimension_are_refused_and_not_mixed_up() -> None:
    model, x = encoder(batch_first=False), torch.randn(4, 2, 8)  # 4 tokens of 2 rows: 4 divides by 2
    board = deltaw.attach(model, LoraConfig(r=2, target_modules=["linear1"]), "a")
    fill(board, "a", seed=1)
    with board.route(["a", "a"]):
        routed = model(x)
    assert torch.equal(routed, model(x))
    with board.route(["a", None]), pytest.raises(RoutingError, match="second dimension"):
        model(x)


def test_a_recurrent_layer_refuses_rows_of_several_adapters() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 4, batch_first=True)})
    board = deltaw.attach(model, LoraConfig(r=2, target_modules=[], target_parameters=["weight_hh_l0"]), "a")
    with board.route(["a", None]), pytest.raises(RoutingError, match="second dimension"):
        model["lstm"](torch.randn(2, 3, 4))


class Sparse(nn.Module):
    """Experts as a list in each layer of a list; each sees some tokens of all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])})])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        out = torch.empty_like(tokens)
        for which, some in enumerate((torch.arange(0, 4), torch.arange(4, len(tokens)))):
            expert = self.layers[0].get_submodule(f"experts.{which}")
            out[some] = expert(tokens[some])
        return out.view_as(x)


def test_experts_of_gathered_tokens() -> None:
    model, x = Sparse(), torch.randn(2, 3, 4)
    board = deltaw.attach(model, LoraConfig(r=2), "a")
    fill(board, "a", seed=1)
    expected = model(x)
    with board.route(["a", "a"]):  # one adapter for all: no token needs to be traced
        assert torch.equal(model(x), expected)
    with board.route(["a", None]), pytest.raises(RoutingError, match="list of experts"):
        model(x)


def test_the_input_may_be_given_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.conv, self.linear = nn.Embedding(5, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 4)

        def forward(self, ids: Tensor) -> Tensor:
            h = self.conv(input=self.embed(input=ids).transpose(1, 2)).transpose(1, 2)
            y: Tensor = self.linear(input=h)
            return y

    torch.manual_seed(0)
    model, ids = Named(), torch.tensor([[1, 2, 3], [3, 4, 0]])
    plain = dense(model, [])
    board = deltaw.attach(model, LoraConfig(r=2, target_modules=["embed", "conv", "linear"]), "a")
    fill(board, "a", seed=1)
    expected = dense(plain, [(board.adapter("a"), 1.0)])(ids)
    assert error(model(ids), expected) < 1e-5
    with board.route(["a", None]):
        routed = model(ids)
    assert error(routed[0], expected[0]) < 1e-5
    assert error(routed[1], plain(ids)[1]) < 1e-5
