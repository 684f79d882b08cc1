"""A base laid out without values, to be measured: sizes, sites, and steps. Needs torch and transformers."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import nn

from deltaw.bases.heads import head_modules
from deltaw.bases.quantize import linear_layers, stored_quantization
from deltaw.bases.tables import table_sizes
from deltaw.bases.unpacked import UNPACKED
from deltaw.inject import Target, factors_as_drawn
from deltaw.plan import counts
from deltaw.plan.config import PlanConfig
from deltaw.plan.found import Network, Place, Point, Step
from deltaw.plan.shapes import Shapes
from deltaw.plan.step import Steps


class Survey:
    """Measures one base in one number format."""

    def __init__(self, shapes: Shapes, dtype: str) -> None:
        self.shapes, self.dtype = shapes, getattr(torch, dtype)

    @cached_property
    def model(self) -> nn.Module:
        """The whole network, without values."""
        return self.shapes.skeleton(self.shapes.task, self.dtype)

    def network(self) -> Network:
        """What it weighs."""
        model, config, task = self.model, self.shapes.config, self.shapes.task
        matrices, method = _matrices(model), stored_quantization(config)
        tables, table_rows = table_sizes(model)
        return Network(
            values=counts.full(model), matrices=sum(matrices), largest_matrix=max(matrices),
            weights=sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]),
            largest_tensor=max(t.numel() for t in model.parameters()), head=counts.heads(model, task),
            tables=tables, table_rows=table_rows,
            biases=counts.bitfit(model, task), vocabulary=int(config.get_text_config().vocab_size),
            positions=self.shapes.positions, quantized=None if method in UNPACKED else method,
            stated_item=2 if config.dtype is None else config.dtype.itemsize,
            dims=counts.Dimensions.of(config))

    def places(self, config: PlanConfig) -> list[Place]:
        """Where the config's low-rank change goes."""
        found = counts.low_rank(self.model, config.lora, config.task)
        drawn = factors_as_drawn(found) if config.freeze_a else set()
        return [_place(t, drawn=f"{t.site.name}.lora_A" in drawn) for t in found]

    def step(self, config: PlanConfig, point: Point, *, kernels: bool = False) -> Step:
        """A step, run on the network's first layers."""
        return Steps(self.shapes, config, self.dtype, kernels=kernels).at(*point)


def _place(target: Target, *, drawn: bool) -> Place:
    """The sizes of a site, whose A may stay as it was drawn."""
    geometry = target.site.geometry
    of_A = math.prod(geometry.factor_shapes(1)[0]) if drawn else 0
    return Place(target.site.name, target.rank, geometry.count(1) - of_A, geometry.max_rank if target.rank else 0, of_A)


def _matrices(model: Any) -> list[int]:
    """Sizes of the matrices that a quantizer takes: linear layers that are no output layer."""
    heads, output = head_modules(model), model.get_output_embeddings()
    return [layer.weight.numel() for name, layer in linear_layers(model).items() if layer is not output
            and not any(name == head or name.startswith(head + ".") for head in heads)] or [0]
