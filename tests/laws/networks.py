"""Small networks, one for each way in which a weight can stand in a model. Rows come first unless a network says so."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` over one sequence, with its weights averaged over heads."""

    def __init__(self, width: int, heads: int, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class CrossAttention(nn.Module):
    """`nn.MultiheadAttention` whose keys and values have other widths, hence projections of their own."""

    def __init__(self, width: int, heads: int, keys: int, values: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, kdim=keys, vdim=values, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attention(query, key, value)[0]


class ScaledEmbedding(nn.Embedding):
    """An embedding that multiplies its rows, as Gemma's does."""

    def __init__(self, rows: int, width: int, scale: float) -> None:
        super().__init__(rows, width, padding_idx=0)
        self.register_buffer("embed_scale", torch.tensor(scale), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class SelfPadding(nn.Conv2d):
    """A convolution that pads and scales its weight in a forward of its own, as "same" and standardised ones do."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, self.bias, self.stride, groups=self.groups)


class Positions(nn.Module):
    """Ids, and positions of shape (1, T) that all rows share."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(11, 6), nn.Embedding(5, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.embed(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)))


class Matrix(nn.Module):
    """A bare 2-D parameter and a bias that is not added last."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.q_bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.matrix.t() + self.q_bias)


class MatrixAround(nn.Module):
    """A bare parameter of a module that also runs a linear layer, so that one change stands inside another."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.matrix = nn.Linear(6, 5), nn.Parameter(torch.randn(4, 5) / 5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inside(x)) @ self.matrix.t()


class ListOfMatrices(nn.Module):
    """Parameters in a `ParameterList`, which is never run itself."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList([torch.randn(6, 6) / 6**0.5 for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.matrices[0].t()) @ self.matrices[1].t()


class Recurrent(nn.Module):
    """An LSTM, which keeps its matrices in a list of its own too.

    Without cuDNN, which wants all matrices in one piece of memory, and gives gradients in training mode alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return self.lstm(x)[0]


class Experts(nn.Module):
    """E stacked two-layer experts; `is_transposed` is transformers' mark of weights stored inputs first."""

    def __init__(self, experts: int, width: int, hidden: int, *, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        shapes = [(experts, hidden, width), (experts, width, hidden)]
        up, down = (torch.randn(e, i, o) if transposed else torch.randn(e, o, i) for e, o, i in shapes)
        self.up, self.down = nn.Parameter(up / width**0.5), nn.Parameter(down / hidden**0.5)

    def forward(self, tokens: Tensor, expert: Tensor) -> Tensor:
        up, down = (w[expert] if self.is_transposed else w[expert].transpose(1, 2) for w in (self.up, self.down))
        return torch.bmm(torch.relu(torch.bmm(tokens.unsqueeze(1), up)), down).squeeze(1)


class Mixture(nn.Module):
    """Experts over tokens flattened row by row; which expert a token takes is fixed, so that all dtypes agree."""

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        self.experts = Experts(3, 6, 7, transposed=transposed)
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        expert = torch.arange(x.shape[1], device=x.device).repeat(x.shape[0]) % 3
        return self.out(self.experts(tokens, expert).view_as(x))


class Tied(nn.Module):
    """A language model in the small: the head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))))


class Normed(nn.Module):
    """Biases of every kind: convolution, norm over channels, linear, layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.group = nn.Conv1d(4, 6, 3, padding=1), nn.GroupNorm(2, 6)
        self.linear, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.group(self.conv(x)).mean(-1)
        return self.head(F.gelu(self.norm(self.linear(h))))


class Logits(nn.Module):
    """A transformers model, seen as a function from ids to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids).logits
        return logits

    def double(self) -> Logits:
        """In float64, which only the plain way of running experts knows."""
        if hasattr(self.model.config, "num_local_experts"):
            self.model.set_experts_implementation("eager")
        return super().double()


def conv1d_of_transformers(inputs: int, outputs: int) -> nn.Module:
    """transformers' `Conv1D`: a linear layer stored inputs first."""
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(outputs, inputs)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    nn.init.normal_(layer.bias)
    return layer


def mixtral() -> nn.Module:
    """A two-layer Mixtral: a router and stacked experts in each layer."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return Logits(MixtralForCausalLM(MixtralConfig(
        vocab_size=23, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=32,
        initializer_range=0.3)))


def gpt2() -> nn.Module:
    """A two-layer GPT-2: `Conv1D` layers, fused query-key-value, tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return Logits(GPT2LMHeadModel(GPT2Config(
        vocab_size=23, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2)))


def llama() -> nn.Module:
    """A two-layer Llama with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return Logits(LlamaForCausalLM(LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.3, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0)))
