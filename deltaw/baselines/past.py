"""Trained keys and values before every row, in every attention: prefix tuning as it is usually implemented.

    P (l_p, L·2·d_kv)      P[i] holds, layer by layer, the key and the value of trained token i; PEFT's layout

Training P itself is unstable; P = MLP(P') with a narrow P' is not, and the MLP is gone afterwards (Li & Liang 2021,
section 4.3): what is saved and counted is P. Tokens keep their distance to the prefix: their positions begin at l_p.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltaw.baselines.part import Hooked
from deltaw.baselines.stack import Stack
from deltaw.baselines.virtual import by_name, plain_mask
from deltaw.errors import Fault, StateError, TargetError

CHILD = "deltaw_past"
_MARK = "deltaw_past"


class Past(Hooked):
    """A prefix of keys and values, through an MLP of width `hidden` in training where one is given."""

    kind = "prelayer"

    def __init__(self, stack: Stack, *, prefix: int, hidden: int | None, seed: int) -> None:
        super().__init__()
        self.stack, self.prefix = stack, prefix
        if not stack.takes_cache:
            raise TargetError(Fault("method prelayer", f"{type(stack.body).__name__} takes no keys and values of the "
                                    "past", "a network with a key-value cache", "Use prefix_form activations"))
        config = stack.config
        self.heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        self.head_width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.held = nn.Module()
        self._fill(hidden, seed)
        self.keep(stack.body, CHILD, self.held)
        self.handles.append(stack.body.register_forward_pre_hook(self._enter, with_kwargs=True))
        self.handles.append(stack.body.register_forward_hook(self._leave))
        self.lent = False

    @property
    def numbers(self) -> int:
        """L·2·d_kv: values of one trained token."""
        return len(self.stack.layers) * 2 * self.heads * self.head_width

    def parameters(self) -> dict[str, nn.Parameter]:
        """"past.prefix", or the narrow prefix and the MLP."""
        return {f"past.{name}": parameter for name, parameter in self.held.named_parameters()}

    def values(self) -> dict[str, Tensor]:
        """P, with the MLP folded away."""
        with torch.no_grad():
            return {"past.prefix": self.table().detach()}

    def table(self) -> Tensor:
        """P, (l_p, L·2·d_kv)."""
        P: Tensor = self.held.prefix  # type: ignore[assignment]
        return P if "mlp" not in self.held._modules else self.held.mlp(P)  # type: ignore[operator]

    def _fill(self, hidden: int | None, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if hidden is None:
                self.held.prefix = nn.Parameter(self._of_words(seed))
            else:
                width = self.stack.width
                self.held.prefix = nn.Parameter(torch.randn(self.prefix, width))
                self.held.mlp = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, self.numbers))
        self.held.float().to(self.stack.device)

    def _of_words(self, seed: int) -> Tensor:
        """Keys and values of random words, or small random ones where the network keeps none."""
        if self.stack.device.type == "meta":
            return torch.empty(self.prefix, self.numbers, device="meta")
        if not self.stack.is_causal:
            return torch.randn(self.prefix, self.numbers).mul_(0.02).to(self.stack.device)
        cache = self.stack.new_cache()
        with torch.no_grad():
            self.stack.body(input_ids=self.stack.random_words(self.prefix, seed), past_key_values=cache, use_cache=True)
        pairs = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return torch.cat([t[0].transpose(0, 1).flatten(1) for t in pairs], 1).float()

    # -- one forward -------------------------------------------------------------------------------------------------

    def _enter(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Put the prefix into the past."""
        if not self.on:
            return None
        if body.training and getattr(self.stack.layers[0], "gradient_checkpointing", False):
            raise StateError(Fault("gradient_checkpointing", "of whole layers leaves out what is in the past", "it to "
                                   "be off with prefix_form past", "Use prefix_form activations"))
        given = by_name(body, args, kwargs)
        own = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
        cache = given.get("past_key_values")
        seen = 0 if cache is None else int(cache.get_seq_length())
        if seen and not hasattr(cache, _MARK):
            raise StateError(Fault("past_key_values", "were computed without the prefix", "a cache that began while "
                                   "the method was on", "Start the text anew"))
        mask_BT = plain_mask(given.get("attention_mask"), own, seen and seen - self.prefix)
        self.lent = cache is None and not self.stack.makes_cache(given)
        if not seen:
            cache = given["past_key_values"] = self._begin(cache, given, len(own))
        mask_BS = torch.cat([mask_BT.new_ones(len(mask_BT), self.prefix), mask_BT], 1)
        given["attention_mask"] = mask_BS if self.stack.is_causal else self._pairs(mask_BS, own.shape[1])
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + self.prefix
        return (), given

    def _leave(self, _: nn.Module, __: Any, output: Any) -> None:
        """Keep a cache that nobody asked for to oneself."""
        if self.lent and not isinstance(output, tuple):
            output.past_key_values = None
        self.lent = False

    def _begin(self, cache: Any, given: dict[str, Any], rows: int) -> Any:
        """A cache that holds the prefix of every row."""
        from transformers import DynamicCache

        if cache is None:
            cache = self.stack.new_cache() if self.stack.makes_cache(given) else DynamicCache()
        weight = next(self.stack.layers[0].parameters())
        shaped = self.table().to(weight.dtype).view(1, self.prefix, -1, self.heads, self.head_width)
        for layer in range(len(self.stack.layers)):
            key, value = (shaped[:, :, 2 * layer + i].transpose(1, 2).expand(rows, -1, -1, -1) for i in (0, 1))
            cache.update(key, value, layer)
        setattr(cache, _MARK, True)
        return cache

    def _pairs(self, mask_BS: Tensor, tokens: int) -> Tensor:
        """The mask of a network that looks both ways, which makes none for keys beyond its own: (B, 1, T, S)."""
        dtype = next(p for p in self.stack.layers[0].parameters() if p.is_floating_point()).dtype
        away = torch.zeros(mask_BS.shape, dtype=dtype, device=mask_BS.device)
        away = away.masked_fill(mask_BS == 0, torch.finfo(dtype).min)
        return away[:, None, None, :].expand(-1, 1, tokens, -1)
