"""The body of a transformers model as prompt methods see it: embedding, layers, cache, and what reads its result."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.errors import Fault, TargetError
from deltaw.inject.blocks import computes, named_layers

_TAKES = {"attention_mask", "inputs_embeds"}


class _Reached(Exception):
    """The forward has come to the body."""


class Stack:
    """The body below a model's heads."""

    def __init__(self, model: Any, method: str) -> None:
        """`TargetError` where the model has no attention over embedded tokens."""
        where, config = type(model).__name__, getattr(model, "config", None)
        if not hasattr(model, "base_model") or config is None:
            raise TargetError(Fault(f"method {method}", f"{where} is not a model of transformers",
                                    "one with word embeddings and attention"))
        self.body: Any = _body(model.base_model)
        self.config: Any = config.get_text_config()
        self.named = named_layers(self.body)
        self.layers = [layer for _, layer in self.named]
        accepts = set(inspect.signature(self.body.forward).parameters)
        if getattr(self.config, "is_encoder_decoder", False) or not self.layers:
            raise TargetError(Fault(f"method {method}", f"{where} is not one stack of layers",
                                    "an encoder or a decoder"))
        if not getattr(self.config, "num_attention_heads", None) or not accepts >= _TAKES:
            raise TargetError(Fault(f"method {method}", f"{where} has no attention over embedded tokens",
                                    "a network whose tokens attend to trained ones"))
        self.embedding: nn.Module = model.base_model.get_input_embeddings()
        if not self._is_reached_by(model):
            body = type(self.body).__name__
            raise TargetError(Fault(f"method {method}", f"{where} computes without calling its {body}, where trained "
                                    "tokens would join a row", "a model that calls it"))
        self.takes_cache = "past_key_values" in accepts
        self.is_causal = any(getattr(m, "is_causal", False) is True for m in self.layers[0].modules())

    @property
    def width(self) -> int:
        """d: channels of the word embeddings."""
        return int(self.words.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the word embeddings are."""
        return self.words.device

    @property
    def words(self) -> Tensor:
        """The word embeddings, (V, d)."""
        return self.embedding.get_parameter("weight")

    def embed(self, ids: Tensor) -> Tensor:
        """Word embeddings as the body looks them up."""
        embedded: Tensor = self.embedding(ids)
        return embedded

    def readers(self) -> list[nn.Module]:
        """What computes on the last hidden states inside the body, such as a pooler."""
        children = list(self.body.named_children())
        holder = self.named[0][0].split(".")[0]
        after = [name for name, _ in children].index(holder) + 1
        return [child for _, child in children[after:] if any(map(computes, child.modules()))]

    def makes_cache(self, given: dict[str, Any]) -> bool:
        """Whether the body would make a key-value cache of its own."""
        asked = given.get("use_cache")
        wanted = getattr(self.config, "use_cache", False) if asked is None else asked
        return self.takes_cache and self.is_causal and bool(wanted) and not (asked is None and self.body.training)

    def new_cache(self) -> Any:
        """An empty key-value cache of the kind that the body makes."""
        from transformers import DynamicCache

        return DynamicCache(config=self.config)

    def random_words(self, count: int, seed: int) -> Tensor:
        """Tokens drawn from the vocabulary, (1, count)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(len(self.words), (1, count), generator=generator).to(self.device)

    def activations_of_words(self, count: int, seed: int, *, layers: bool) -> list[Tensor]:
        """What enters the first layer's embedding, or each layer, when the network reads `count` random words.

        Float32 (count, d) each. Trained tokens that begin as real ones learn better (Li & Liang 2021, section 7.4).
        """
        if self.device.type == "meta":
            return [torch.empty(count, self.width, device="meta") for _ in (self.layers if layers else [0])]
        words = self.random_words(count, seed)
        with torch.no_grad():
            first = self.embed(words)[0].float().clone()
            return [first, *self._entering(words)[1:]] if layers else [first]

    def _is_reached_by(self, model: nn.Module) -> bool:
        """Whether the model's own forward calls the body; it goes no further than there."""
        def stop(*_: Any) -> None:
            raise _Reached

        handle = self.body.register_forward_pre_hook(stop)
        try:
            with torch.no_grad():
                model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device))
        except _Reached:
            return True
        finally:
            handle.remove()
        return False

    def _entering(self, words: Tensor) -> list[Tensor]:
        """What enters each layer, (T, d)."""
        seen: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args[0] if args else kwargs["hidden_states"])[0].float().clone())

        handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in self.layers]
        training = self.body.training
        try:
            self.body.eval()(input_ids=words, attention_mask=torch.ones_like(words))
        finally:
            self.body.train(training)
            for handle in handles:
                handle.remove()
        return seen


def _body(model: Any) -> Any:
    """What embedded tokens are given to: the innermost module around the layers that takes them.

    That is mostly the model without its heads; OPT's head calls the decoder inside that.
    """
    layers = named_layers(model)
    path = layers[0][0] if layers else ""
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path) if path else model
        if not isinstance(module, nn.ModuleList) and set(inspect.signature(module.forward).parameters) >= _TAKES:
            return module
    return model
