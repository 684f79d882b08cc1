"""Spectra, similarity, pairs and budgets against dense float64 algebra."""

from __future__ import annotations

import math

import pytest
import torch

from deltaw.analyse import (
    by_kind,
    by_layer,
    compare_sites,
    decompose,
    grassmann_distance,
    random_similarity,
    site_spectrum,
    subspace_similarity,
)
from deltaw.analyse.factors import all_factors, factors_of, kind_and_layer
from deltaw.analyse.subspace import expected_at_random, random_frame
from deltaw.core import Adapter, Geometry, LoraConfig, SiteDelta
from tests.analyse.changes import OUT, SITES, adapter, dense, dense_phi

EXACT = 1e-4


@pytest.mark.parametrize("rank", [1, 5, OUT, OUT + 6])
def test_the_spectrum_is_that_of_the_dense_change(rank: int) -> None:
    value = adapter(rank)
    (factors,) = factors_of(value, SITES[0])
    found = site_spectrum(factors, decompose(factors).S_K)
    S = torch.linalg.svdvals(dense(value, SITES[0]))[:rank]
    assert found.singular_values == pytest.approx(S.tolist(), rel=EXACT)
    assert found.frobenius == pytest.approx(float(S.norm()), rel=EXACT)
    assert found.spectral == pytest.approx(float(S[0]), rel=EXACT)
    assert found.stable_rank == pytest.approx(float((S**2).sum() / S[0] ** 2), rel=EXACT)
    p = S / S.sum()
    assert found.effective_rank == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=EXACT)


def test_directions_rebuild_the_change_and_are_orthonormal() -> None:
    value = adapter(5)
    (factors,) = factors_of(value, SITES[1])
    found = decompose(factors)
    torch.testing.assert_close(found.U_OK * found.S_K @ found.V_IK.t(), dense(value, SITES[1]))
    for frame in (found.U_OK, found.V_IK, found.A_IK, found.B_OK):
        torch.testing.assert_close(frame.t() @ frame, torch.eye(5, dtype=torch.float64))


def test_phi_is_equation_4_for_every_i_and_j() -> None:
    small, large = adapter(3, seed=1), adapter(7, seed=2)
    one, other = (decompose(factors_of(value, SITES[2])[0]) for value in (small, large))
    for side in ("A", "B", "input", "output"):
        references = []
        for value in (small, large):
            delta = value.sites[SITES[2]]
            matrix = {"A": delta.A.double(), "B": delta.B.double()}.get(side, dense(value, SITES[2]))
            U, _, Vt = torch.linalg.svd(matrix, full_matrices=False)
            references.append(U if side in ("B", "output") else Vt.t())
        phi = subspace_similarity(one.side(side), other.side(side))
        assert phi.shape == (3, 7)
        for i in range(1, 4):
            for j in range(1, 8):
                assert float(phi[i - 1, j - 1]) == pytest.approx(dense_phi(*references, i, j), abs=EXACT)


def test_phi_is_one_minus_the_projection_metric_over_p() -> None:
    """The paper's appendix G has (1/p)(1 - d²), which its own definitions do not give."""
    generator = torch.Generator().manual_seed(3)
    U, V = random_frame(20, 3, generator), random_frame(20, 6, generator)
    sigma = torch.linalg.svdvals(U.t() @ V)
    d_squared, p = 3 - float((sigma**2).sum()), 3
    phi = float(subspace_similarity(U, V)[-1, -1])
    assert phi == pytest.approx(1 - d_squared / p)
    assert phi != pytest.approx((1 - d_squared) / p, abs=0.1)


def test_nested_spans_are_one_and_orthogonal_ones_zero() -> None:
    eye = torch.eye(10, dtype=torch.float64)
    assert float(subspace_similarity(eye[:, :2], eye[:, :5])[-1, -1]) == pytest.approx(1)
    assert float(subspace_similarity(eye[:, :2], eye[:, 5:])[-1, -1]) == pytest.approx(0)
    assert grassmann_distance(eye[:, :2], eye[:, :5]) == pytest.approx(0)
    assert grassmann_distance(eye[:, :2], eye[:, 5:]) == pytest.approx(math.pi / 2 * math.sqrt(2))


def test_random_spans_agree_as_much_as_expected() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([random_similarity(64, 4, 8, generator)[-1, -1] for _ in range(200)])
    assert float(drawn.mean()) == pytest.approx(expected_at_random(4, 8, 64), abs=0.01)


def test_a_pair_is_compared_as_its_dense_changes_are() -> None:
    first, second = adapter(4, seed=1), adapter(6, seed=2)
    pairs = list(zip(all_factors(first), all_factors(second), strict=True))
    for one, other in pairs:
        found = compare_sites(one, other, decompose(one), decompose(other))
        D, E = dense(first, one.site), dense(second, one.site)
        assert found.cosine == pytest.approx(float((D * E).sum() / (D.norm() * E.norm())), abs=EXACT)
        assert found.distance == pytest.approx(float((D - E).norm()), rel=EXACT)
        V, W = torch.linalg.svd(D)[2][:4].t(), torch.linalg.svd(E)[2][:6].t()
        angles = torch.linalg.svdvals(V.t() @ W).clamp(max=1).arccos()
        assert found.grassmann == pytest.approx(float(angles.norm()) / (math.pi / 2 * 2), abs=EXACT)
        assert found.whole_input == pytest.approx(dense_phi(V, W, 4, 6), abs=EXACT)


def test_the_same_change_in_other_factors_is_the_same() -> None:
    value = adapter(4)
    mix = torch.randn(4, 4, dtype=torch.float64)
    sites = {site: SiteDelta(delta.geometry, {"lora_A": mix @ delta.A.double(),
                                              "lora_B": delta.B.double() @ mix.inverse()})
             for site, delta in value.sites.items()}
    other = Adapter(value.config, sites)
    one, two = factors_of(value, SITES[0])[0], factors_of(other, SITES[0])[0]
    found = compare_sites(one, two, decompose(one), decompose(two))
    assert found.cosine == pytest.approx(1, abs=EXACT)
    assert found.grassmann == pytest.approx(0, abs=EXACT)


def test_an_untrained_change_has_no_directions() -> None:
    value = adapter(3)
    for delta in value.sites.values():
        delta.tensors["lora_B"].zero_()
    factors = factors_of(value, SITES[0])[0]
    found = site_spectrum(factors, decompose(factors).S_K)
    assert (found.frobenius, found.stable_rank, found.effective_rank, found.singular_values) == (0, 0, 0, ())
    assert compare_sites(factors, factors, decompose(factors), decompose(factors)).cosine is None


def test_budgets_add_up() -> None:
    value = adapter(3)
    spectra = [site_spectrum(f, decompose(f).S_K) for f in all_factors(value)]
    for shares in (by_layer(spectra), by_kind(spectra)):
        assert sum(s.change_share for s in shares) == pytest.approx(1)
        assert sum(s.parameter_share for s in shares) == pytest.approx(1)
    assert [s.name for s in by_layer(spectra)] == ["0", "1", "2"]
    whole = math.sqrt(sum(float(dense(value, site).norm()) ** 2 for site in SITES if site.endswith("q_proj")))
    assert by_kind(spectra)[0].frobenius == pytest.approx(whole, rel=EXACT)


def test_every_form_of_weight_is_its_matrix() -> None:
    """Experts, slices, convolutions, embeddings and inputs-first weights, each against the layout's own ΔW."""
    geometries = {
        "experts": Geometry(kind="parameter", shape=(3, 6, 4)), "first": Geometry(kind="parameter", shape=(3, 4, 6),
                                                                                  transposed=True),
        "sliced": Geometry(kind="linear", shape=(9, 5), slices=((0, 3), (6, 9))),
        "conv": Geometry(kind="conv", shape=(6, 2, 3, 3)), "embedding": Geometry(kind="embedding", shape=(11, 4)),
        "turned": Geometry(kind="linear", shape=(5, 7), transposed=True),
    }
    sites = {}
    for name, geometry in geometries.items():
        a, b = geometry.factor_shapes(2)
        sites[name] = SiteDelta(geometry, {"lora_A": torch.randn(a), "lora_B": torch.randn(b)})
    sites["bias"] = SiteDelta(Geometry(kind="bias", shape=(4,)), {"bias": torch.randn(4)})
    value = Adapter(LoraConfig(r=2), sites)
    assert factors_of(value, "bias") == ()
    for name in geometries:
        square = sum(float(decompose(f).S_K.square().sum()) for f in factors_of(value, name))
        assert math.sqrt(square) == pytest.approx(float(value.delta(name).norm()), rel=EXACT), name
    assert [f.site for f in factors_of(value, "experts")] == ["experts[0]", "experts[1]", "experts[2]"]


def test_layers_and_kinds_are_read_from_whole_parts_of_a_name() -> None:
    assert kind_and_layer("transformer.h.7.attn.c_attn") == ("c_attn", 7)
    assert kind_and_layer("lm_head") == ("lm_head", None)
    assert kind_and_layer("block3.conv") == ("conv", None)
