"""The kernel against the model's own forward, in fp64 where weights change, and the ways around it."""

from __future__ import annotations

import copy
import ctypes
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaw.core.compiled import NoKernel
from deltaw.inject import find_sites
from deltaw.serve import runner as runners
from deltaw.serve.banks import Banks, Factors
from deltaw.serve.native import build, weights
from deltaw.serve.native.runner import NativeRunner, StepC
from deltaw.serve.request import BASE, Blend, SamplingParams, Sequence
from deltaw.serve.scheduler import Chunk

SHAPE = {"vocab_size": 37, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
         "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}


def tiny(kind: str = "llama", **fields: Any) -> Any:
    import transformers as hf

    names = {"llama": ("LlamaConfig", "LlamaForCausalLM"), "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
             "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"), "mistral": ("MistralConfig", "MistralForCausalLM")}[kind]
    torch.manual_seed(5)
    model = getattr(hf, names[1])(getattr(hf, names[0])(**SHAPE | fields)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, 0.5)  # what is zero or one at first is not seen
    return model


def made(model: Any, dtype: torch.dtype = torch.float32) -> NativeRunner:
    banks = Banks(find_sites(model).modules, dtype=dtype, device=torch.device("cpu"))
    return NativeRunner(model, banks, places=24, capacity=48)


def factors(model: Any, rank: int, seed: int, dtype: torch.dtype = torch.float32) -> Factors:
    torch.manual_seed(seed)
    sites = [*(f"model.layers.{i}.{path}" for i in range(2) for path in weights.PATHS.values()), "lm_head"]
    return {site: (0.3 * torch.randn(rank, module.in_features).to(dtype),
                   0.3 * torch.randn(rank, module.out_features).to(dtype))
            for site in sites[seed % 2:] for module in [model.get_submodule(site)]}


def expected(model: Any, tokens: list[int], added: Factors | None = None) -> Tensor:
    """The last logits of the model with B·A added to its weights, in fp64."""
    changed = copy.deepcopy(model).double()
    with torch.no_grad():
        for site, (A_RI, B_RO) in (added or {}).items():
            layer = changed.get_submodule(site)
            layer.weight.data = layer.weight + B_RO.double().t() @ A_RI.double()
        return changed(input_ids=torch.tensor([tokens])).logits[0, -1]


def sequences(lengths: list[int], blends: list[Blend]) -> list[Sequence]:
    torch.manual_seed(1)
    return [Sequence(i, tuple(torch.randint(37, (length,)).tolist()), blend, SamplingParams(), print, place=23 - i)
            for i, (length, blend) in enumerate(zip(lengths, blends, strict=True))]


def close(got: Tensor, model: Any, sequence: Sequence, added: Factors | None = None) -> None:
    right = expected(model, sequence.tokens(0, sequence.length), added)
    assert float((got - right).abs().max()) < 2e-5 * float(right.abs().max())


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("kind", "fields"), [
    ("llama", {}), ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 6}), ("qwen2", {}), ("qwen3", {}),
    ("mistral", {"sliding_window": None}), ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 16}})])
@pytest.mark.parametrize("count", [1, 3, 17])
def test_prompts_and_answers_have_the_models_logits(kind: str, fields: dict[str, Any], count: int) -> None:
    model = tiny(kind, **fields)
    runner, asked = made(model), sequences([1 + 5 * i % 23 for i in range(count)], [BASE] * count)
    for start in ([0] * count, [s.length for s in asked]):
        chunks = [Chunk(s, a, s.length) for s, a in zip(asked, start, strict=True)]
        if start[0]:
            for s in asked:
                s.written.append(s.number % 37)
            chunks = [Chunk(s, s.length - 1, s.length) for s in asked]
        complete, logits = runner.run(chunks)
        assert logits.shape == (count, 37)
        for chunk, got in zip(complete, logits, strict=True):
            close(got, model, chunk.sequence)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_takes_its_own_adapter(dtype: torch.dtype) -> None:
    """Ranks of three stacks, sites that some adapters leave out, several rows of one adapter, parts of prompts."""
    model, plain = tiny("qwen3"), tiny("qwen3")
    runner = made(model, dtype)
    adapters: dict[Blend, Factors] = {((i, 1.0),): factors(model, rank, i, dtype)
                                      for i, rank in enumerate((3, 8, 20, 5, 8), 1)}
    for blend, added in adapters.items():
        runner.banks.enter(blend, added, list(adapters))
    blends = [BASE, *adapters, *adapters, ((2, 1.0),), BASE]
    asked = sequences([3 + 2 * i for i in range(len(blends))], blends)
    runner.run([Chunk(s, 0, s.length // 2) for s in asked])
    complete, logits = runner.run([Chunk(s, s.length // 2, s.length) for s in asked])
    assert len(complete) == len(asked)
    for chunk, got in zip(complete, logits, strict=True):
        close(got, plain, chunk.sequence, adapters.get(chunk.sequence.blend))


@pytest.mark.usefixtures("threads")
def test_threads_change_no_bit() -> None:
    model = tiny()
    runner = made(model)
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        asked = sequences([9, 4, 6], [BASE] * 3)
        found.append(runner.run([Chunk(s, 0, s.length) for s in asked])[1])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_weights_take_16_bits_where_that_is_exact() -> None:
    wide, published = tiny(), tiny().bfloat16().float()
    assert (made(wide).native.narrow, made(published).native.narrow) == (False, True)
    assert made(published).native.nbytes * 2 == made(wide).native.nbytes
    runner = made(published)
    asked = sequences([7, 5], [BASE] * 2)
    for chunk, got in zip(*runner.run([Chunk(s, 0, s.length) for s in asked]), strict=True):
        close(got, published, chunk.sequence)
    assert made(published.bfloat16(), torch.bfloat16).merges
    assert not runner.merges
    almost = torch.full((16, 16), 1.0)
    almost[3, 5] = 1 + 2**-8
    assert weights.packed(almost).dtype == torch.float32


def test_other_weights_in_the_layers_and_back() -> None:
    model = tiny()
    runner = made(model)
    before = {name: packed.data_ptr() for name, (_, packed) in runner.native._base.items()}
    layer = model.model.layers[1].mlp.up_proj
    own, layer.weight = layer.weight, torch.nn.Parameter(2 * layer.weight.detach())
    asked = sequences([6], [((1, 1.0),)])
    runner.banks.merged = ((1, 1.0),)
    close(runner.run([Chunk(asked[0], 0, 6)])[1][0], model, asked[0])
    layer.weight, runner.banks.merged = own, None
    close(runner.run([Chunk(asked[0], 0, 6)])[1][0], model, asked[0])
    assert not runner.native._merged
    assert {name: packed.data_ptr() for name, (_, packed) in runner.native._base.items()} == before


@pytest.mark.parametrize(("fields", "reason"), [
    ({"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5}, "multiples of 16"),
    ({"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 24}, "multiples of 16"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "positions")])
def test_what_the_kernel_does_not_do_is_told(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(NoKernel, match=reason):
        made(tiny(**fields))


def test_a_window_is_refused_only_where_it_would_be_felt() -> None:
    with pytest.raises(NoKernel, match="window"):
        weights.check(tiny("mistral", sliding_window=16), 48)
    weights.check(tiny("mistral", sliding_window=48), 48)


def test_weights_are_packed_only_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "available_memory", lambda: weights.resident_memory() + 1000)
    with pytest.raises(NoKernel, match="not enough memory"):
        made(tiny())


def chosen(model: Any) -> runners.Runner:
    banks = Banks(find_sites(model).modules, dtype=torch.float32, device=torch.device("cpu"))
    return runners.choose_runner(model, banks, places=4, capacity=48)


def test_without_a_compiler_the_models_own_layers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    build.library.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    runner = chosen(tiny())
    build.library.cache_clear()
    assert isinstance(runner, runners.RowRunner)
    assert "no C compiler" in runner.says


def test_a_compiler_that_fails_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    build.library.cache_clear()
    monkeypatch.setenv("DELTAW_HOME", str(tmp_path))
    monkeypatch.setattr("deltaw.core.compiled.FLAGS", ("--no-such-option",))
    runner = chosen(tiny())
    build.library.cache_clear()
    assert isinstance(runner, runners.RowRunner)
    assert "made none" in runner.says
    assert not list(tmp_path.rglob("*.so"))


def test_a_model_with_other_arithmetic_is_found_out() -> None:
    model = tiny()
    assert isinstance(chosen(model), NativeRunner)
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()
    runner = chosen(model)
    assert isinstance(runner, runners.RowRunner)
    assert "other logits" in runner.says


def test_structures_are_as_long_as_the_kernels() -> None:
    """A field that one side lacks moves all that follow."""
    described = {"Matrix": weights.MatrixC, "Layer": weights.LayerC, "Model": weights.ModelC, "Step": StepC}
    for name, structure in described.items():
        assert getattr(build.library(), f"size_of_{name}")() == ctypes.sizeof(structure)
