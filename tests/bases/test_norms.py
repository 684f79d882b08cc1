"""Frozen RMSNorms are found by what they compute, keep x and a number a token, and are as exact as torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaw.bases import native_rows
from deltaw.bases.norms import Form, Norm, keeping_less, norm_modules

HALF = torch.bfloat16
needs_kernel = pytest.mark.skipif(not native_rows.fit(torch.empty(1, dtype=HALF)),
                                  reason="the kernel wants AVX512-BF16 without AMX, and a C compiler")


class RMS(nn.Module):
    """The formula in one of its forms, or something close to it, under names that say nothing."""

    def __init__(self, width: int, kind: str = "llama", eps: float = 1e-5) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.thing = nn.Parameter(torch.randn(width, generator=torch.Generator().manual_seed(3)))

    def forward(self, h: Tensor) -> Tensor:
        x = h.float()
        if self.kind == "centred":
            x = x - x.mean(-1, keepdim=True)
        eps = 0.0 if self.kind == "no eps" else 3 * self.eps if self.kind == "other eps" else self.eps
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        if self.kind == "dropout":
            normed = nn.functional.dropout(normed, 0.3, self.training)
        if self.kind == "gemma":
            return (normed * (1 + self.thing.float())).to(h.dtype)
        if self.kind == "olmo":
            return (normed * self.thing).to(h.dtype)
        if self.kind == "residual":
            return h + self.thing * normed.to(h.dtype)
        return self.thing * normed.to(h.dtype)


FORMS = {"llama": Form.NORMED_ROUNDED, "gemma": Form.ONE_MORE, "olmo": Form.PRODUCT_ROUNDED}


def frozen(module: nn.Module, dtype: torch.dtype = HALF) -> Any:
    return module.to(dtype).requires_grad_(False)


def found_in(module: nn.Module, width: int, dtype: torch.dtype = HALF) -> list[Norm]:
    return norm_modules(module, lambda: module(torch.randn(2, 3, width).to(dtype)))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(HALF)


def results(module: Any, x: Tensor, g: Tensor) -> list[Tensor]:
    """y and dx."""
    x = x.detach().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, x, g)]


def exact(kind: str, x: Tensor, w: Tensor, eps: float, g: Tensor) -> list[Tensor]:
    """The same in float64, rounded nowhere."""
    x = x.detach().double().requires_grad_()
    y = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (w.double() + (kind == "gemma"))
    return [y.detach(), *torch.autograd.grad(y, x, g.double())]


def error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("kind", list(FORMS))
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (7, 33), (33, 576), (2, 1), (300, 100), (5, 64)])
def test_as_near_to_float64_as_torch(kind: str, tokens: int, width: int, native: bool,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(native_rows, "is_there", lambda: False)
    module = frozen(RMS(width, kind))
    found = found_in(module, width)
    assert [(one.module, one.name, one.eps) for one in found] == [(module, "thing", 1e-5)]
    assert found[0].form == FORMS[kind] or width == 1  # of one number all forms may give the same
    x, g = random(2, tokens, width), random(2, tokens, width, seed=1)
    theirs = results(module, x, g)
    with keeping_less(found):
        mine = results(module, x, g)
    assert "forward" not in module.__dict__
    for a, b, true in zip(mine, theirs, exact(kind, x, module.thing, 1e-5, g), strict=True):
        assert error(a, true) < max(1.1 * error(b, true), 0.003)
    assert (mine[0] != theirs[0]).float().mean() < 0.02  # where sums differ in their last bit


@needs_kernel
@pytest.mark.parametrize("lay", [lambda t: t.transpose(0, 1), lambda t: t[:, ::2], lambda t: t[..., 5:38],
                                 lambda t: t[:, :1].expand(-1, 6, -1)])
def test_inputs_that_lie_apart(lay: Callable[[Tensor], Tensor]) -> None:
    x, g = lay(random(4, 9, 48)), lay(random(4, 9, 48, seed=1))
    module = frozen(RMS(x.shape[-1]))
    with keeping_less(found_in(module, x.shape[-1])):
        apart, together = results(module, x, g), results(module, x.contiguous(), g.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


@needs_kernel
def test_a_token_has_the_same_bits_alone_and_by_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    x, g, module = random(90, 576), random(90, 576, seed=1), frozen(RMS(576))
    with keeping_less(found_in(module, 576)):
        every = []
        for threads in (1, 2, 7):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            every.append(results(module, x, g))
        alone = results(module, x[40:41], g[40:41])
        with torch.no_grad():
            x[3] = torch.nan
        spoiled = results(module, x, g)
    for results_ in every[1:]:
        assert all(torch.equal(a, b) for a, b in zip(every[0], results_, strict=True))
    for whole, one, nan in zip(every[0], alone, spoiled, strict=True):
        assert torch.equal(whole[40:41], one)
        assert nan[3].isnan().all()
        assert torch.equal(whole[4:], nan[4:])
        assert torch.equal(whole[:3], nan[:3])


@pytest.mark.parametrize("kind", ["no eps", "other eps", "centred", "residual", "dropout"])
def test_what_only_looks_like_it_is_left_alone(kind: str) -> None:
    module = frozen(RMS(32, kind)).eval()
    assert found_in(module, 32) == []


def test_other_norms_and_float32_are_left_alone() -> None:
    assert found_in(frozen(RMS(32), torch.float32), 32, torch.float32) == []
    for other in (nn.LayerNorm(32), nn.LayerNorm(32, bias=False)):
        assert found_in(frozen(other), 32) == []
    assert [one.form for one in found_in(frozen(nn.RMSNorm(32, eps=1e-6)), 32)] == [Form.PRODUCT_ROUNDED]
    assert len(found_in(frozen(RMS(32), torch.float16), 32, torch.float16)) == 1


def test_without_values_the_same_modules_are_found() -> None:
    others = nn.LayerNorm(32, bias=False), nn.RMSNorm(32, 1e-6)
    model = nn.Sequential(RMS(32), RMS(32, "gemma"), RMS(32, "centred"), *others)
    real = found_in(frozen(model), 32)
    blank = model.to("meta")
    meta = norm_modules(blank, lambda: blank(torch.empty(2, 32, dtype=HALF, device="meta")))
    assert [one[1:] for one in meta] == [one[1:] for one in real]
    assert [one.module for one in meta] == [model[0], model[1], model[4]]


def kept(module: nn.Module, x: Tensor) -> int:
    """Bytes that the graph keeps, parameters apart."""
    sizes = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    assert y.requires_grad
    return sum(sizes.values()) - sum(sizes.get(p.untyped_storage()._cdata, 0) for p in module.parameters())


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_kept(native: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(native_rows, "is_there", lambda: False)
    module = frozen(RMS(64))
    found = found_in(module, 64)
    x = random(2, 5, 64).to(device).requires_grad_()
    module.to(device)
    assert kept(module, x) > 10 * 64 * 4
    with keeping_less(found):
        assert kept(module, x) == 10 * 64 * 2 + 10 * 4


def test_what_the_node_is_not_for_is_the_modules_own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = frozen(RMS(16))
    x = random(3, 16)
    plain = module(x)
    with keeping_less(found_in(module, 16)):
        monkeypatch.setattr(native_rows, "norm", lambda *_: pytest.fail("was asked"))
        with torch.no_grad():
            assert torch.equal(module(x), plain)
        assert torch.equal(module(h=x), plain)
        assert torch.equal(torch.func.vmap(module)(x), plain)
        assert module(x.float()).dtype == torch.float32
        assert module(random(16, 3).t()).shape == (3, 16)
        assert module(x[:0]).shape == (0, 16)
        module.thing.requires_grad_()
        module(x).float().sum().backward()
    assert module.thing.grad is not None


def test_hooks_and_a_forward_of_its_own() -> None:
    module = frozen(RMS(16))
    found, seen = found_in(module, 16), []
    hooks = [module.register_forward_hook(lambda *_: seen.append("forward")),
             module.register_full_backward_hook(lambda *_: seen.append("backward"))]
    own = module.forward
    module.forward = lambda x: own(x)
    mine = module.__dict__["forward"]
    with keeping_less(found), keeping_less(found):
        results(module, random(3, 16), random(3, 16))
    assert seen == ["forward", "backward"]
    assert module.__dict__["forward"] is mine
    assert len(hooks) == 2


def test_computed_again() -> None:
    module, x, g = frozen(RMS(48)), random(5, 48), random(5, 48, seed=1)
    with keeping_less(found_in(module, 48)):
        once = results(module, x, g)
        again = results(lambda t: checkpoint(module, t, use_reentrant=False), x, g)
    assert torch.equal(once[1], again[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiler_sees_the_plain_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, g = frozen(RMS(48)), random(5, 48), random(5, 48, seed=1)
    expected = results(module, x, g)
    with keeping_less(found_in(module, 48)):
        monkeypatch.setattr(native_rows, "norm", lambda *_: pytest.fail("was asked"))
        torch.compiler.reset()
        again = results(torch.compile(module, backend="eager", fullgraph=True), x, g)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def test_models_of_transformers(tiny_llama: Callable[..., Any], tiny_gpt2: Callable[..., Any]) -> None:
    ids = torch.randint(3, 60, (2, 9))
    llama, gpt2 = frozen(tiny_llama()), frozen(tiny_gpt2())
    layers = llama.model.layers
    expected = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    assert [one.module for one in norm_modules(llama, lambda: llama(input_ids=ids))] == [*expected, llama.model.norm]
    assert norm_modules(gpt2, lambda: gpt2(input_ids=ids)) == []
