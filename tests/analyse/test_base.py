"""A change beside its base's weight: Table 7, largest directions, intruders; dense float64 is the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deltaw
from deltaw.analyse import amplification, analyse, decompose, findings, intruders, open_weights
from deltaw.analyse.factors import factors_of
from deltaw.analyse.intruders import largest_cosines
from deltaw.analyse.singular import Matrix, largest_singular
from deltaw.errors import BaseMismatchError, ConfigError
from tests.analyse.changes import SITES, adapter, dense


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def falling(out: int, inp: int, generator: torch.Generator) -> Tensor:
    """A weight whose singular values fall by 100, as trained ones do."""
    k = min(out, inp)
    U, V = (torch.linalg.qr(torch.randn(n, k, generator=generator))[0] for n in (out, inp))
    return (U * torch.logspace(1, -1, k)) @ V.t()


@pytest.mark.parametrize("whole", [4096, 8], ids=["gram", "krylov"])
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (70, 70)])
def test_largest_directions_are_those_of_a_dense_decomposition(shape: tuple[int, int], whole: int,
                                                               generator: torch.Generator) -> None:
    W = falling(*shape, generator)
    (factors,) = factors_of(adapter(4, shape=shape), SITES[0])
    for matrix in (Matrix(W), Matrix(W, factors)):
        found = largest_singular(matrix, 6, generator, whole=whole, tolerance=1e-5)
        U, S, Vt = torch.linalg.svd(matrix.dense())
        assert found.S_K.tolist() == pytest.approx(S[:6].tolist(), rel=1e-4)
        assert (U[:, :6].t() @ found.U_OK).abs().diagonal().tolist() == pytest.approx([1] * 6, abs=1e-3)
        assert (Vt[:6] @ found.V_IK).abs().diagonal().tolist() == pytest.approx([1] * 6, abs=1e-3)


def test_amplification_is_that_of_dense_matrices(generator: torch.Generator) -> None:
    value, r = adapter(4), 4
    (factors,) = factors_of(value, SITES[0])
    W = falling(*factors.shape, generator)
    found = amplification(factors, decompose(factors), W, largest_singular(Matrix(W), 8, generator), generator)
    assert found is not None
    D, wide = dense(value, SITES[0]), W.double()
    U, _, Vt = torch.linalg.svd(D, full_matrices=False)
    through = float((U[:, :r].t() @ wide @ Vt[:r].t()).norm())
    assert found.through_change == pytest.approx(through, rel=1e-4)
    assert found.through_top == pytest.approx(float(torch.linalg.svdvals(wide)[:r].norm()), rel=1e-4)
    assert found.factor == pytest.approx(float(D.norm()) / through, rel=1e-4)
    assert found.relative == pytest.approx(float(D.norm() / wide.norm()), rel=1e-4)
    V_W = torch.linalg.svd(wide)[2][:8].t()
    assert found.top_overlap == pytest.approx(float((Vt[:r] @ V_W).norm()) ** 2 / r, abs=1e-4)
    assert found.through_random < found.through_top


def test_a_change_along_the_weights_own_directions_amplifies_them(generator: torch.Generator) -> None:
    W = falling(24, 40, generator)
    U, S, Vt = torch.linalg.svd(W)
    value = adapter(2)
    site = value.sites[SITES[0]]
    site.tensors["lora_A"].copy_(Vt[:2])
    site.tensors["lora_B"].copy_(U[:, :2] * S[:2] / value.scaling(SITES[0]))
    (factors,) = factors_of(value, SITES[0])
    found = amplification(factors, decompose(factors), W, largest_singular(Matrix(W), 4, generator), generator)
    assert found is not None
    assert found.factor == pytest.approx(1, rel=1e-4)
    assert found.top_overlap == pytest.approx(1, abs=1e-4)
    assert intruders(factors, W, generator, top=4).count == 0


@pytest.mark.parametrize("whole", [4096, 8], ids=["whole", "lanczos"])
@pytest.mark.parametrize("shape", [(120, 200), (200, 120)])
def test_a_planted_intruder_is_found_and_nothing_else(shape: tuple[int, int], whole: int,
                                                      generator: torch.Generator) -> None:
    W = falling(*shape, generator)
    value = adapter(1, shape=shape)
    site = value.sites[SITES[0]]
    for name, tensor in site.tensors.items():
        drawn = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(drawn / drawn.norm() * (5 if name == "lora_B" else 1))
    (factors,) = factors_of(value, SITES[0])
    X = torch.linalg.svd(W.double(), full_matrices=False)[0]
    tuned = torch.linalg.svd(W.double() + dense(value, SITES[0]))[0][:, :6]
    cosines = (X.t() @ tuned).abs().amax(0)
    found = intruders(factors, W, generator, top=6, whole=whole)
    assert found.count == int((cosines < 0.5).sum()) == 1
    # Lanczos bounds a cosine from above; where it is large the bound is the cosine.
    for ours, exact in zip(found.cosines, cosines.tolist(), strict=True):
        assert ours >= exact - 1e-3
        assert ours == pytest.approx(exact, abs=0.02 if exact > 0.5 or whole > 8 else 0.3)


def test_a_direction_outside_the_weights_range_is_like_none_of_its_own(generator: torch.Generator) -> None:
    W = falling(50, 20, generator)
    outside = torch.linalg.svd(W, full_matrices=True)[0][:, 30:31]
    assert float(largest_cosines(W, outside + 1e-6 * torch.randn(50, 1, generator=generator))[0]) < 0.5


# ------------------------------------------------------------------------------------------------------ a whole model


def trained(model: Any, rank: int, seed: int = 0) -> deltaw.Adapter:
    """An adapter of a model with a change in it."""
    board = deltaw.attach(model, deltaw.LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]), name="a")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in board.parameters("a").values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    value = board.adapter("a")
    deltaw.detach(model)
    return value


def test_the_bases_weights_are_read_from_disk_and_checked(tmp_path: Path, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    value = trained(model, 2)
    weights = open_weights(tmp_path / "base", value)
    for site in value.sites:
        (W,) = weights.matrices(site)
        assert torch.equal(W, model.get_submodule(site).weight.float())
    tiny_llama(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError):
        open_weights(tmp_path / "other", value)


def test_inputs_first_weights_are_turned(tmp_path: Path, tiny_gpt2: Callable[..., Any]) -> None:
    model = tiny_gpt2()
    model.save_pretrained(tmp_path)
    board = deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["c_proj"]), name="a")
    value = board.adapter("a")
    weights = open_weights(tmp_path, value)
    deltaw.detach(model)
    for site in value.sites:
        assert torch.equal(weights.matrices(site)[0], model.get_submodule(site).weight.float().t())


def test_a_study_of_three_adapters_says_what_it_found(tmp_path: Path, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    adapters = {"small": trained(model, 2), "large": trained(model, 4, seed=1), "again": trained(model, 4, seed=1)}
    found = analyse(adapters, {name: open_weights(tmp_path, value) for name, value in adapters.items()})
    assert [(p.first, p.second) for p in found.pairs] == [("small", "large"), ("small", "again"), ("large", "again")]
    assert found.pairs[2].cosine == pytest.approx(1)
    assert found.drawn == ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj")
    assert {m.side for m in found.maps if m.second != "W"} == {"A", "B", "input", "output", "random"}
    assert all(len(study.against_base) == len(study.intruders) == len(study.sites) == 4 for study in found.adapters)
    said = [f.text for f in findings(found) if f.section == "map" and f.about[:2] == ("large", "again")]
    assert said
    assert all("all 4 stand out" in text or "lies in the span" in text for text in said)
    same = next(m for m in found.maps if (m.first, m.second, m.side) == ("large", "again", "input"))
    assert same.phi[-1][-1] == pytest.approx(1)


def test_a_site_that_no_adapter_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"q_porj.*Did you mean"):
        analyse({"a": adapter(2)}, sites=["model.layers.0.self_attn.q_porj"])


def test_an_adapter_that_changes_nothing_is_said_to() -> None:
    value = adapter(2)
    for delta in value.sites.values():
        delta.tensors["lora_B"].zero_()
    (said,) = findings(analyse({"fresh": value}))
    assert "changes nothing" in said.text


def test_adapters_without_a_site_in_common() -> None:
    found = analyse({"a": adapter(2, sites=SITES[:2]), "b": adapter(2, sites=SITES[2:4])})
    assert found.pairs[0].sites == ()
    assert any("share no site" in f.text for f in findings(found))


def test_shared_directions_are_counted_against_chance() -> None:
    first, second = adapter(4, seed=1, shape=(200, 300)), adapter(8, seed=2, shape=(200, 300))
    site = second.sites[SITES[2]]
    site.tensors["lora_A"][0] = first.sites[SITES[2]].tensors["lora_A"][0]
    (factors,) = factors_of(first, SITES[2])
    first.sites[SITES[2]].tensors["lora_A"][1:] -= (first.sites[SITES[2]].A[1:] @ factors.A_RI[0:1].t()) * (
        factors.A_RI[0:1] / factors.A_RI[0].square().sum())
    first.sites[SITES[2]].tensors["lora_A"][0] *= 20
    found = analyse({"a": first, "b": second}, sites=[SITES[2]])
    (text,) = [f.text for f in findings(found) if f.section == "map" and f.about[3] == "input"]
    assert "That one of 4 stands out" in text
