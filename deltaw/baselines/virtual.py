"""Trained tokens among a row's own: PreEmbed and PreLayer (Hu et al. 2021, section 5.1).

    preembed    the tokens' word embeddings are trained                |Θ| = d·(l_p + l_i)     (Lester et al. 2021)
    prelayer    what enters each of the L layers at them is trained,
                and replaces what the layer before computed            |Θ| = L·d·(l_p + l_i)   (Li & Liang 2021)

The network's body gets longer rows, and what comes out has the rows' own tokens only: heads, losses and `generate` need
not know. A key-value cache holds the trained tokens like any others; a mark on it says where they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.baselines.layout import Layout, ends_of, layout, positions
from deltaw.baselines.part import Hooked
from deltaw.baselines.stack import Stack
from deltaw.errors import Fault, StateError

CHILD = "deltaw_tokens"
_MARK = "deltaw_prompt_end"


class VirtualTokens(Hooked):
    """`prefix` trained tokens before each row's prompt and `infix` after it."""

    def __init__(self, stack: Stack, *, prefix: int, infix: int, every_layer: bool, seed: int) -> None:
        super().__init__()
        self.kind = "prelayer" if every_layer else "preembed"
        self.stack, self.prefix, self.infix = stack, prefix, infix
        drawn = stack.activations_of_words(prefix + infix, seed, layers=every_layer)
        self.tokens = nn.ParameterList([nn.Parameter(h_VI) for h_VI in drawn])
        self.now: Layout | None = None
        self.keep(stack.body, CHILD, self.tokens)
        add = self.handles.append
        add(stack.body.register_forward_pre_hook(self._enter, with_kwargs=True))
        for trained, layer in zip(list(self.tokens)[1:], stack.layers[1:], strict=False):
            add(layer.register_forward_pre_hook(self._replacer(trained), with_kwargs=True))
        for module in stack.readers():
            add(module.register_forward_pre_hook(self._read))
        add(stack.body.register_forward_hook(self._leave))

    def parameters(self) -> dict[str, nn.Parameter]:
        """"tokens.0" is what enters the first layer, (l_p + l_i, d); and so on."""
        return {f"tokens.{layer}": parameter for layer, parameter in enumerate(self.tokens)}

    # -- one forward -------------------------------------------------------------------------------------------------

    def _enter(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Lengthen what the body is given."""
        self.now = None  # whatever became of the forward before
        if not self.on:
            return None
        given = by_name(body, args, kwargs)
        ids, x_BTI = given.pop("input_ids", None), given.pop("inputs_embeds", None)
        own = ids if x_BTI is None else x_BTI
        cache = given.get("past_key_values")
        seen = 0 if cache is None else int(cache.get_seq_length())
        mask_BT = plain_mask(given.get("attention_mask"), own, seen and self._own_tokens(cache, seen))
        if seen:
            place = self._place(mask_BT, cache)
            given |= {"input_ids": ids} if x_BTI is None else {"inputs_embeds": x_BTI}
            mask_BS = place.spread(mask_BT, 1)
            return (), given | {"attention_mask": mask_BS, "position_ids": positions(mask_BS)[:, -own.shape[1]:]}
        self.now = self._place(mask_BT, self._marked(given, mask_BT))
        mask_BS = self.now.spread(mask_BT, 1)
        x_BTI = self.stack.embed(ids) if x_BTI is None else x_BTI
        given |= {"inputs_embeds": self.now.join(x_BTI, self.tokens[0]), "attention_mask": mask_BS}
        if given.get("token_type_ids") is not None:
            given["token_type_ids"] = self.now.spread(given["token_type_ids"], 0)
        given.pop("position_ids", None)
        if self.stack.is_causal:
            given["position_ids"] = positions(mask_BS)
        return (), given

    def turn(self, on: bool) -> None:
        """Let the hooks act, or not."""
        self.on, self.now = on, None

    def _replacer(self, trained: nn.Parameter) -> Any:
        def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.now is None:
                return None
            if args:
                return (self.now.overwrite(args[0], trained), *args[1:]), kwargs
            return (), kwargs | {"hidden_states": self.now.overwrite(kwargs["hidden_states"], trained)}

        return replace

    def _read(self, _: nn.Module, args: tuple[Any, ...]) -> Any:
        """A pooler sees the row's own tokens."""
        return None if self.now is None else (self.now.strip(args[0]), *args[1:])

    def _leave(self, _: nn.Module, __: Any, output: Any) -> Any:
        """Shorten what the body gives."""
        if self.now is None:
            return None
        now, self.now = self.now, None
        if isinstance(output, tuple):
            return now.strip(output[0]), *output[1:]
        output.last_hidden_state = now.strip(output.last_hidden_state)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(map(now.strip, output.hidden_states))
        return output

    # -- a cache -----------------------------------------------------------------------------------------------------

    def _marked(self, given: dict[str, Any], mask_BT: Tensor) -> Any:
        """The cache that this forward fills, told where the prompts end; None where there is none."""
        cache = given.get("past_key_values")
        if cache is None and self.stack.makes_cache(given):
            cache = given["past_key_values"] = self.stack.new_cache()
        if cache is not None:
            setattr(cache, _MARK, ends_of(mask_BT))
        return cache

    def _place(self, mask_BT: Tensor, cache: Any) -> Layout:
        ends_B = ends_of(mask_BT) if cache is None else getattr(cache, _MARK)
        if len(ends_B) != len(mask_BT):  # beams: rows were repeated, and all of them end together
            ends_B = ends_B[:1].expand(len(mask_BT))
        return layout(ends_B, mask_BT.shape[1], self.prefix, self.infix, causal=self.stack.is_causal)

    def _own_tokens(self, cache: Any, seen: int) -> int:
        """How many of a cache's entries are the rows' own tokens."""
        if not hasattr(cache, _MARK):
            raise StateError(Fault("past_key_values", "were computed without the trained tokens", "a cache that began "
                                   "while the method was on", "Start the text anew"))
        ends = sorted(set(getattr(cache, _MARK).tolist()))
        if self.infix and len(ends) > 1:  # rows may have changed places since
            raise StateError(Fault("the cache", f"holds prompts that end at {ends[:4]}", "prompts that end together, "
                                   "since infix tokens stand after them", "Pad on the left"))
        return seen - self.prefix - self.infix


def by_name(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's forward, all by name."""
    names = list(inspect.signature(module.forward).parameters)
    return dict(zip(names, args, strict=False)) | kwargs


def plain_mask(mask: Any, own: Tensor, seen: int) -> Tensor:
    """The attention mask of the rows' own tokens, cached ones first: 1 for tokens, 0 for padding; (B, T)."""
    if mask is None:
        return torch.ones(own.shape[0], own.shape[1] + seen, dtype=torch.long, device=own.device)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise StateError(Fault("attention_mask", "has an entry for each pair of tokens", "one for each token: (B, T)",
                               "Compiled caches do not go with trained tokens"))
    return mask
