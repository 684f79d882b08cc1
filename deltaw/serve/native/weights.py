"""A model of Llama's structure as the kernel takes it: which modules it is made of, and its matrices packed.

A matrix takes 16 bits a number where that changes nothing: where the model is in bfloat16, or was written in it and
loaded as fp32. The kernel computes in fp32 in either case.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.compiled import NoKernel
from deltaw.plan.devices import available_memory, resident_memory
from deltaw.serve.native.build import library

LANES = 16
ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary positions whose angles do not depend on how long a sequence has become."""
SITES = ("q", "k", "v", "o", "gate", "up", "down")
PATHS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
         "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
CHILDREN = {"": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
            "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"}}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


class MatrixC(ctypes.Structure):
    """`Matrix` of product.h."""

    _fields_ = (("packed", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("out", ctypes.c_int32),
                ("inputs", ctypes.c_int32), ("narrow", ctypes.c_int32), ("site", ctypes.c_int32))


class LayerC(ctypes.Structure):
    """`Layer` of rows.h."""

    _fields_ = (*((site, MatrixC) for site in SITES),
                *((name, ctypes.c_void_p) for name in ("norm", "mlp_norm", "q_norm", "k_norm", "keys", "values")))


class ModelC(ctypes.Structure):
    """`Model` of rows.h."""

    _fields_ = (*((name, ctypes.c_int32) for name in ("layers", "hidden", "inner", "heads", "groups", "head_dim",
                                                      "rotary", "capacity")),
                ("eps", ctypes.c_float), ("scale", ctypes.c_float), ("cos", ctypes.c_void_p),
                ("sin", ctypes.c_void_p), ("last_norm", ctypes.c_void_p), ("head", MatrixC),
                ("layer", ctypes.POINTER(LayerC)))


class NativeModel:
    """A model's packed matrices and the kernel's view of them, with keys and values for `places` sequences."""

    def __init__(self, model: Any, *, places: int, capacity: int) -> None:
        check(model, capacity)
        self.model, self.modules = model, dict(linear_layers(model))
        self._kept: list[Tensor] = []
        attention = model.model.layers[0].self_attn
        groups = attention.k_proj.out_features // attention.head_dim
        shape = len(model.model.layers), places, capacity, groups, attention.head_dim
        self.keys_LPTGD, self.values_LPTGD = torch.empty(shape), torch.empty(shape)
        angles = model.model.rotary_emb(torch.zeros(1), torch.arange(capacity)[None])
        cos, sin = (part[0].float().contiguous() for part in angles)
        self._layers = (LayerC * len(model.model.layers))()
        self.c = ModelC(
            layers=shape[0], hidden=attention.q_proj.in_features, inner=model.model.layers[0].mlp.down_proj.in_features,
            heads=attention.q_proj.out_features // attention.head_dim, groups=groups, head_dim=attention.head_dim,
            rotary=cos.shape[-1], capacity=capacity, eps=model.model.norm.variance_epsilon, scale=attention.scaling,
            cos=self._held(cos), sin=self._held(sin), last_norm=self._held(model.model.norm.weight),
            layer=ctypes.cast(self._layers, ctypes.POINTER(LayerC)))
        for i, layer in enumerate(model.model.layers):
            self._fill(self._layers[i], layer, i)
        self._base = {name: (module.weight, packed(module.weight)) for name, module in self.modules.items()}
        self._merged: dict[str, tuple[Tensor, Tensor]] = {}
        self.refresh()

    @property
    def narrow(self) -> bool:
        """Whether all matrices take 16 bits a number."""
        return all(tensor.element_size() == 2 for _, tensor in self._base.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrices."""
        return sum(tensor.nbytes for held in (self._base, self._merged) for _, tensor in held.values())

    def refresh(self) -> None:
        """Take what is in the layers now: the base's weights, which stay packed, or others in their place."""
        before, self._merged = self._merged, {}
        for number, (name, module) in enumerate(self.modules.items()):
            found = next((held[name] for held in (self._base, before)
                          if name in held and held[name][0] is module.weight), None)
            if found is None:
                found = module.weight, packed(module.weight)
            if found[0] is not self._base[name][0]:
                self._merged[name] = found
            self._matrix(number, module, found[1])

    def _matrix(self, number: int, module: nn.Linear, data: Tensor) -> None:
        bias = None if module.bias is None else self._held(module.bias)
        made = MatrixC(data.data_ptr(), bias, module.out_features, module.in_features, data.element_size() == 2, number)
        if number == len(self.modules) - 1:
            self.c.head = made
        else:
            setattr(self._layers[number // len(SITES)], SITES[number % len(SITES)], made)

    def _fill(self, c: LayerC, layer: Any, index: int) -> None:
        attention = layer.self_attn
        c.norm, c.mlp_norm = self._held(layer.input_layernorm.weight), self._held(layer.post_attention_layernorm.weight)
        if hasattr(attention, "q_norm"):
            c.q_norm, c.k_norm = self._held(attention.q_norm.weight), self._held(attention.k_norm.weight)
        c.keys, c.values = self.keys_LPTGD[index].data_ptr(), self.values_LPTGD[index].data_ptr()

    def _held(self, tensor: Tensor) -> int:
        """A small tensor as fp32, at an address that stays."""
        self._kept.append(tensor.detach().float().contiguous())
        return self._kept[-1].data_ptr()


def linear_layers(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers in the kernel's order, by the names of sites."""
    for i, layer in enumerate(model.model.layers):
        for path in PATHS.values():
            yield f"model.layers.{i}.{path}", layer.get_submodule(path)
    yield "lm_head", model.lm_head


def check(model: Any, capacity: int) -> None:
    """Raise NoKernel unless the model is made as the kernel computes; whether it does is then tried out."""
    inner: Any = getattr(model, "model", None)
    if not isinstance(getattr(inner, "layers", None), nn.ModuleList) or not isinstance(
            getattr(model, "lm_head", None), nn.Linear):
        raise NoKernel("the model is not made like Llama")
    layers: list[Any] = list(inner.layers)
    for layer in layers:
        parts = {path: {name for name, _ in layer.get_submodule(path).named_children()} for path in CHILDREN}
        attention = {name for name, _ in layer.self_attn.named_children()} if "self_attn" in parts[""] else set()
        if parts != CHILDREN or attention - {"q_norm", "k_norm"} != ATTENTION:
            raise NoKernel("the model's layers are not made like Llama's")
    odd = [name for name, module in linear_layers(model) if type(module) is not nn.Linear
           or module.weight.device.type != "cpu" or not module.weight.is_floating_point()
           or module.in_features % LANES or (name != "lm_head" and module.out_features % LANES)]
    if odd:
        raise NoKernel(f"{odd[0]} is not a plain linear layer of multiples of {LANES} on the processor")
    config = model.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    window = getattr(config, "sliding_window", None)
    if rope not in ROPES or (window and window < capacity):
        raise NoKernel("positions change with the length" if rope not in ROPES else "attention has a window")
    if 4 * sum(module.weight.numel() for _, module in linear_layers(model)) > available_memory() - resident_memory():
        raise NoKernel("there is not enough memory to pack the weights")
    if len({layer.input_layernorm.variance_epsilon for layer in layers} | {model.model.norm.variance_epsilon}) > 1:
        raise NoKernel("norms differ")


def packed(weight_NK: Tensor) -> Tensor:
    """A matrix in the kernel's order: int16 where 16 bits hold it exactly, else fp32."""
    outputs, inputs = weight_NK.shape
    wide_NK = weight_NK.detach().float().contiguous()
    narrow = torch.equal(wide_NK.bfloat16().float(), wide_NK)
    made = torch.empty(-(-outputs // LANES) * LANES * inputs, dtype=torch.int16 if narrow else torch.float32)
    library().pack(ctypes.c_void_p(wide_NK.data_ptr()), outputs, inputs, int(narrow), ctypes.c_void_p(made.data_ptr()))
    return made
