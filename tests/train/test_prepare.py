"""How steps are computed is chosen by looking, said in a line, kept for a resumed run, and changes nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaw
from deltaw.bases import load_base
from deltaw.core.layers import AdaptedLinear
from deltaw.data import cache
from deltaw.train import compile as compiling
from deltaw.train import objective, prepare
from deltaw.train.memory import recompute_activations
from deltaw.train.prepare import Choices


@pytest.fixture
def config(base_folder: Path, color_rows: Path, tmp_path: Path) -> Callable[..., deltaw.TrainConfig]:
    def make(**options: Any) -> deltaw.TrainConfig:
        given = {"model": str(base_folder), "data": str(color_rows), "out": str(tmp_path / "out"), "dtype": "fp32",
                 "max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "eval_every": 0, "samples": 0,
                 "eval_rows": 4, **options}
        return deltaw.TrainConfig(**given)

    return make


def choices(folder: Path) -> Mapping[str, Any]:
    found = json.loads((folder / "train_choices.json").read_text())
    assert isinstance(found, dict)
    return found


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["event"] == "step"]


def test_packing_is_taken_and_said(config: Callable[..., deltaw.TrainConfig], tmp_path: Path,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    result = deltaw.train(config())
    assert choices(tmp_path / "out")["packed"]
    assert "packing: examples lie end to end" in capsys.readouterr().err
    assert "packing: examples lie end to end" in result.checks["computed"]
    deltaw.train(config(out=str(tmp_path / "padded"), packing="off"), quiet=True)
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "padded"), rel=1e-5)


def test_packing_that_changes_the_loss_is_refused(config: Callable[..., deltaw.TrainConfig], tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def nothing(model: Any) -> Iterator[None]:
        yield  # the model's attention stays as it is, and would let examples see one another

    monkeypatch.setattr(prepare, "packed_attention", nothing)
    result = deltaw.train(config(), quiet=True)
    assert "packing: off, this model's loss is then" in result.checks["computed"]
    assert not choices(tmp_path / "out")["packed"]


def test_a_model_whose_attention_cannot_be_chosen(config: Callable[..., deltaw.TrainConfig],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "takes_packed", lambda model: False)
    result = deltaw.train(config(gradient_checkpointing="attention"), quiet=True)
    assert "packing: off, LlamaForCausalLM does not let its attention be chosen" in result.checks["computed"]
    assert "gradient checkpointing: whole layers" in result.checks["computed"]


def test_a_short_run_is_not_compiled(config: Callable[..., deltaw.TrainConfig]) -> None:
    found = deltaw.train(config(), quiet=True).checks["computed"]
    assert "compile: off, " in found


def test_a_missing_or_failing_compiler_ends_nothing(config: Callable[..., deltaw.TrainConfig], tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "why_not", lambda device: "no C++ compiler was found")
    result = deltaw.train(config(compile="on"), quiet=True)
    assert "compile: off, no C++ compiler was found" in result.checks["computed"]
    monkeypatch.undo()

    @contextmanager
    def failing(model: Any) -> Iterator[int]:
        raise RuntimeError("no")
        yield 0

    monkeypatch.setattr(prepare, "compiled_layers", failing)
    result = deltaw.train(config(out=str(tmp_path / "two"), compile="on"), quiet=True)
    assert "compile: off, it failed: RuntimeError" in result.checks["computed"]


def test_compiling_goes_with_whole_layers_only(config: Callable[..., deltaw.TrainConfig]) -> None:
    found = deltaw.train(config(compile="on", gradient_checkpointing="attention"), quiet=True).checks["computed"]
    assert "compile: off, it does not go with" in found


def test_a_resumed_run_keeps_the_choices(config: Callable[..., deltaw.TrainConfig], tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    deltaw.train(config(save_every=2), quiet=True)
    (tmp_path / "out" / "train_choices.json").write_text(json.dumps(Choices(packed=False).to_dict()))
    for folder in (tmp_path / "out" / "checkpoints").glob("step-*4"):
        folder.rename(tmp_path / "gone")
    deltaw.train(config(save_every=2, resume=True), quiet=True)
    assert not choices(tmp_path / "out")["packed"]


def test_the_looks_draw_nothing_from_the_run(config: Callable[..., deltaw.TrainConfig], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"lora": deltaw.LoraConfig(r=2, lora_dropout=0.3)}
    deltaw.train(config(**options), quiet=True)
    real = prepare.Preparation.step
    monkeypatch.setattr(prepare.Preparation, "step", lambda self, c: (real(self, c), torch.rand(3))[0])
    deltaw.train(config(out=str(tmp_path / "again"), **options), quiet=True)
    assert losses(tmp_path / "again") == losses(tmp_path / "out")


def test_layers_that_cannot_be_fused_are_said_and_counted(config: Callable[..., deltaw.TrainConfig], tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    assert deltaw.train(config(), quiet=True).plain_layers == {}
    own = property(lambda layer: layer.host.in_features != 64)  # the two that lead back from the feed-forward
    monkeypatch.setattr(AdaptedLinear, "_is_plain", own)
    result = deltaw.train(config(out=str(tmp_path / "counted")))
    assert result.plain_layers == {"Linear multiplies in a way of its own": 2}
    assert json.loads((tmp_path / "counted" / "train_result.json").read_text())["plain_layers"] == result.plain_layers
    shown = capsys.readouterr().err
    assert shown.count("plain operations instead of fused ones: 2 (Linear multiplies in a way of its own)") == 1
    assert "2 layers: Linear multiplies in a way of its own" in shown
    assert losses(tmp_path / "counted") == pytest.approx(losses(tmp_path / "out"), rel=1e-5)


def test_a_loss_from_the_models_own_logits_is_said(config: Callable[..., deltaw.TrainConfig],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    assert "loss:" not in deltaw.train(config(), quiet=True).checks["computed"]
    monkeypatch.setattr(objective, "_finish", lambda *_: None)
    assert "loss: from the model's own logits" in deltaw.train(config(), quiet=True).checks["computed"]


def test_tokens_of_an_earlier_run_are_used(config: Callable[..., deltaw.TrainConfig], tmp_path: Path, own_home: Path,
                                           monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cache, "SMALLEST", 1)
    deltaw.train(config(cache_data=False))
    kept = own_home / ".cache" / "deltaw" / "tokens"
    assert not kept.exists()
    for out in ("two", "three"):
        assert "an earlier run" not in capsys.readouterr().err
        deltaw.train(config(out=str(tmp_path / out)))
    assert "the tokens are those that an earlier run made of this data" in capsys.readouterr().err
    assert len(list(kept.iterdir())) == 1
    assert losses(tmp_path / "out") == losses(tmp_path / "two") == losses(tmp_path / "three")


def test_the_feed_forwards_are_as_before_after_a_run(config: Callable[..., deltaw.TrainConfig],
                                                     monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[int] = []
    real = prepare.product_made_again
    monkeypatch.setattr(prepare, "product_made_again", lambda found: (seen.append(len(found)), real(found))[1])
    deltaw.train(config(), quiet=True)
    deltaw.train(config(out=str(tmp_path / "layer"), gradient_checkpointing="layer"), quiet=True)
    deltaw.train(config(out=str(tmp_path / "attention"), gradient_checkpointing="attention"), quiet=True)
    assert seen == [2, 2]  # a whole layer that is computed again keeps nothing anyway
    assert losses(tmp_path / "layer") == pytest.approx(losses(tmp_path / "out"), rel=1e-5)
    assert losses(tmp_path / "attention") == pytest.approx(losses(tmp_path / "out"), rel=1e-5)


def test_the_repeated_layers_of_networks(tiny_llama: Any, tiny_gpt2: Any, tiny_bert_classifier: Any) -> None:
    llama, gpt2, bert = tiny_llama(), tiny_gpt2(), tiny_bert_classifier()
    assert compiling.repeated_layers(llama) == list(llama.model.layers)
    assert compiling.repeated_layers(gpt2) == list(gpt2.transformer.h)
    assert compiling.repeated_layers(bert) == list(bert.bert.encoder.layer)
    assert compiling.repeated_layers(torch.nn.Linear(2, 2)) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("options", "backend"), [
    ({}, "inductor"), ({"gradient_checkpointing": "layer", "packing": "off"}, "aot_eager")], ids=str)
def test_compiled_layers_learn_the_same(options: dict[str, Any], backend: str, tmp_path: Path,
                                        config: Callable[..., deltaw.TrainConfig],
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(prepare, "compiled_layers", lambda model: compiling.compiled_layers(model, backend))
    plain = deltaw.train(config(compile="off", **options), quiet=True)
    compiled = deltaw.train(config(out=str(tmp_path / "compiled"), compile="on", **options), quiet=True)
    assert "compile: layer by layer" in compiled.checks["computed"]
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "out"), rel=1e-5)
    assert compiled.after["loss"] == pytest.approx(plain.after["loss"], rel=1e-4)
    again = deltaw.train(config(out=str(tmp_path / "again"), compile="on", **options), quiet=True)
    assert again.after == compiled.after


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dropout_in_packed_layers_that_are_compiled_and_computed_again(tiny_llama: Any, tokenizer: Any,
                                                                       tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_llama(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128,
               num_hidden_layers=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.randint(4, len(tokenizer), (3, 9), generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    found = []
    for again in (False, True):  # were the second forward to draw other units, the gradients would differ
        model = load_base(str(tmp_path), dtype="fp32", quantize="nf4").model.train()
        lora = deltaw.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3, init_lora_weights=False)
        board = deltaw.attach(model, lora, seed=0)
        with ExitStack() as stack:
            if again:
                recompute_activations(model)
                stack.enter_context(compiling.compiled_layers(model, "aot_eager"))
            torch.manual_seed(5)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in board.parameters("default").items()})
    for name, gradient in found[0].items():
        assert gradient.any()
        torch.testing.assert_close(found[1][name], gradient, msg=name)


@pytest.mark.slow
def test_other_lengths_are_not_other_compilations(tiny_llama: Any) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    model = tiny_llama()
    deltaw.attach(model, deltaw.LoraConfig(r=2), seed=0)
    with compiling.compiled_layers(model, "aot_eager") as count:
        assert count == len(model.model.layers)
        for length in (9, 12, 17, 30, 31):
            ids = torch.randint(3, 64, (2, length))
            model(input_ids=ids, use_cache=False).logits.sum().backward()
    assert counters["stats"]["unique_graphs"] <= 2  # the first layer's input needs no gradient
    assert not counters["graph_break"]
