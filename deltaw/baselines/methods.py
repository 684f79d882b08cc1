"""`METHODS`: each method of the papers as a function (model, config, seed) that puts it on the model.

    full        every parameter                       head        the head alone
    ft-top-k    the last k layers                     bitfit      every bias vector
    preembed    trained word embeddings               prelayer    trained activations, or keys and values, in each layer
    adapter-h   -l  -p  -d                            bottlenecks (see `bottleneck`)
    lora        lora+pe  lora+pl                      low-rank changes, alone and with trained tokens
    subspace    d values for all parameters           (see `subspace`)

A head that is new for a task (a classifier's) is trained with each of them. Everything is found by structure; a model
that lacks what a method needs is refused before anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from torch import nn

from deltaw.baselines.bottleneck import Bottlenecks
from deltaw.baselines.config import OPTIONS, BaselineConfig, trains_lora, virtual_tokens
from deltaw.baselines.lora import LoraPart
from deltaw.baselines.part import Part
from deltaw.baselines.past import Past
from deltaw.baselines.replaced import Replaced
from deltaw.baselines.stack import Stack
from deltaw.baselines.subspace import Subspace
from deltaw.baselines.tuned import Baseline, Recipe
from deltaw.baselines.virtual import VirtualTokens
from deltaw.bases.heads import head_modules
from deltaw.core import LoraConfig
from deltaw.errors import ConfigError, Fault, TargetError
from deltaw.inject.blocks import find_blocks, is_norm, named_layers


class Factory(Protocol):
    """Puts a method on a model."""

    def __call__(self, model: nn.Module, config: BaselineConfig | None = None, seed: int = 0, *,
                 lora: LoraConfig | None = None) -> Baseline:
        """The method on `model`, on and trainable; everything else is frozen.

        Raises ConfigError for options that the method does not take, TargetError for a model that lacks what it needs;
        the model is then as before.
        """


def _put_on(model: nn.Module, config: BaselineConfig | None = None, seed: int = 0, *, lora: LoraConfig | None = None,
            method: str) -> Baseline:
    config = config if config is not None else BaselineConfig()
    faults = config.faults(method)
    if lora is not None and not trains_lora(method):
        faults.append(Fault("lora", f"is given for {method}", "a method with LoRA", "Leave it out"))
    if faults:
        raise ConfigError(*faults)
    lora = _for_task(lora if lora is not None else LoraConfig(), model)
    recipe = Recipe(method=method, config=config, lora=lora, seed=seed)
    whole_rows = bool(virtual_tokens(method, config))
    head = _new_head(model)
    return Baseline(model, recipe, partial(_parts, model, recipe, head), head=head,
                    takes=virtual_tokens(method, config), packs=not whole_rows,
                    compiles=not whole_rows and method != "subspace")


METHODS: Mapping[str, Factory] = {name: partial(_put_on, method=name) for name in OPTIONS}


def _parts(model: nn.Module, recipe: Recipe, head: list[str]) -> Iterator[Part]:
    """What a method puts on the model, one after another; a LoRA comes first, since it lists the base's modules."""
    method, config, seed = recipe.method, recipe.config, recipe.seed
    if virtual_tokens(method, config):
        Stack(model, method)  # refuses a model without attention before anything else is put on it
    if trains_lora(method):
        yield LoraPart(model, recipe.lora, seed)
    match method.rpartition("+")[2]:
        case "pe" | "pl" | "preembed" | "prelayer" as tokens:
            yield _tokens(tokens, model, recipe)
        case "adapter-h" | "adapter-l" | "adapter-p" | "adapter-d":
            yield from _adapters(model, recipe)
        case "full" | "ft-top-k" | "head" | "bitfit" as kind:
            yield Replaced(kind, model, _CHOSEN[kind](model, config, head))
        case "subspace":
            yield Subspace(model, dimension=config.dimension, structure_aware=config.structure_aware, seed=seed,
                           kept=head)
    if head and method not in ("full", "head", "subspace") and not trains_lora(method):
        yield Replaced("head", model, head)


def _tokens(kind: str, model: nn.Module, recipe: Recipe) -> Part:
    config, stack = recipe.config, Stack(model, recipe.method)
    if config.prefix_form == "past":
        return Past(stack, prefix=config.prefix_tokens, hidden=config.prefix_hidden, seed=recipe.seed)
    return VirtualTokens(stack, prefix=config.prefix_tokens, infix=config.infix_tokens,
                         every_layer=kind in ("pl", "prelayer"), seed=recipe.seed)


def _adapters(model: nn.Module, recipe: Recipe) -> Iterator[Part]:
    form, config = recipe.method.removeprefix("adapter-"), recipe.config
    blocks = find_blocks(model)
    if form == "d":
        form, blocks = "p", blocks[config.drop_layers:]
    if not blocks:
        raise TargetError(Fault("BaselineConfig.drop_layers", f"got {config.drop_layers}, and the model has no more "
                                "layers", "fewer than its layers"))
    activation = config.activation if config.activation != "auto" else "silu" if form == "h" else "relu"
    device = next(blocks[0].module.parameters()).device
    yield Bottlenecks(form, blocks, width=blocks[0].width, rank=config.bottleneck, activation=activation, device=device,
                      seed=recipe.seed)
    if config.train_norms:
        yield Replaced("norm", model, _norms(model, blocks[0].width))


# ------------------------------------------------------------------------------- which of the model's own parameters


def _every(model: nn.Module, config: BaselineConfig, head: list[str]) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _top(model: nn.Module, config: BaselineConfig, head: list[str]) -> list[str]:
    layers = named_layers(model)
    if len(layers) < config.top_layers:
        raise TargetError(Fault("BaselineConfig.top_layers", f"got {config.top_layers}",
                                f"at most the {len(layers)} layers of {type(model).__name__}"))
    return [f"{layer}.{name}" for layer, module in layers[-config.top_layers:] for name, _ in module.named_parameters()]


def _biases(model: nn.Module, config: BaselineConfig, head: list[str]) -> list[str]:
    """What modules add to their output or sum: vectors that are their `bias`, and attention's `in_proj_bias`."""
    found = [f"{prefix}.{leaf}" if prefix else leaf for prefix, module in model.named_modules()
             for leaf, p in module._parameters.items()
             if p is not None and p.dim() == 1 and leaf in ("bias", "in_proj_bias")]
    found = [name for name in found if name not in head]
    if not found:
        raise TargetError(Fault("method bitfit", f"{type(model).__name__} has no bias vectors", "a model with some",
                                "Use another method"))
    return found


def _head(model: nn.Module, config: BaselineConfig, head: list[str]) -> list[str]:
    if head:
        return head
    modules = head_modules(model) if hasattr(model, "base_model") else ()
    if not modules:
        raise TargetError(Fault("method head", f"{type(model).__name__} has no head of its own", "one that is not "
                                "tied to the word embeddings", "Use another method"))
    return [f"{name}.{leaf}" for name in modules for leaf, _ in model.get_submodule(name).named_parameters()]


_CHOSEN: Mapping[str, Callable[[nn.Module, BaselineConfig, list[str]], list[str]]] = {
    "full": _every, "ft-top-k": _top, "bitfit": _biases, "head": _head}


def _norms(model: nn.Module, width: int) -> list[str]:
    """The parameters of the norms in the layers."""
    return [f"{layer}.{path}.{leaf}" for layer, module in named_layers(model)
            for path, inner in module.named_modules() if path and is_norm(inner, width)
            for leaf, _ in inner.named_parameters()]


def _new_head(model: Any) -> list[str]:
    """The parameters of a head that is new for the task: a classifier's, but not a language model's output layer."""
    if not hasattr(model, "base_model") or model.base_model is model or model.get_output_embeddings() is not None:
        return []
    return [f"{name}.{leaf}" for name in head_modules(model) for leaf, _ in
            model.get_submodule(name).named_parameters()]


def _for_task(lora: LoraConfig, model: nn.Module) -> LoraConfig:
    """The config with a task's name where the model has a new head, so that LoRA trains it too."""
    return replace(lora, task_type="SEQ_CLS") if lora.task_type is None and _new_head(model) else lora
