"""transformers' `Trainer` and Accelerate on attached models: they save, resume and reload the adapter, unchanged."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deltaw
from deltaw import store
from deltaw.errors import ConfigError, StateError

pytestmark = pytest.mark.slow

CONFIG = deltaw.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM")
PEFT_FILES = {"adapter_config.json", "adapter_model.safetensors", "deltaw.json"}


@pytest.fixture
def tiny_llama(tiny_llama: Callable[..., Any]) -> Callable[..., Any]:
    """As for all tests, with weights so large that what is trained inside reaches the output."""
    return lambda seed=0, **fields: tiny_llama(seed, **{"initializer_range": 0.2} | fields)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What other libraries warn of while they train is not what these tests are about."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        yield


def counting(rows: int = 32, length: int = 12) -> list[dict[str, Tensor]]:
    """Sequences that count up from different starts: easy to learn, impossible to know."""
    ids = (torch.arange(length) + torch.arange(rows).unsqueeze(1)) % 60 + 3
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in ids]


def labelled(rows: int = 48, length: int = 8) -> list[dict[str, Tensor]]:
    """Sequences whose label is told by their first token."""
    torch.manual_seed(5)
    ids, labels = torch.randint(10, 60, (rows, length)), torch.arange(rows) % 3
    ids[:, 0] = labels + 3
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label}
            for row, label in zip(ids, labels, strict=True)]


def trainer(model: Any, folder: Path, rows: list[dict[str, Tensor]], **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    extra = {key: options.pop(key) for key in ("eval_dataset", "compute_metrics") if key in options}
    settings = {"per_device_train_batch_size": 8, "max_steps": 6, "learning_rate": 0.02, "logging_steps": 1,
                "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 3}
    return Trainer(model=model, args=TrainingArguments(output_dir=str(folder), **settings | options),
                   train_dataset=rows, **extra)


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def bits(model: Any) -> dict[str, Tensor]:
    """Copies of the base's tensors in the model."""
    return {k: v.clone() for k, v in model.state_dict().items() if "deltaw" not in k}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def values(board: deltaw.Switchboard, name: str = "default") -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in board.parameters(name).items()}


# ------------------------------------------------------------------------------------------------- training and saving


def test_a_language_model_trains_and_saves_its_adapter(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model, rows = tiny_llama(), counting()
    before = bits(model)
    board = deltaw.attach(model, CONFIG, seed=1)
    start = values(board)
    run = trainer(model, tmp_path / "out", rows, max_steps=30)
    run.train()
    assert losses(run)[-1] < 0.5 * losses(run)[0]
    assert same(bits(model), before)
    moved = {k for k, t in values(board).items() if not torch.equal(t, start[k])}
    assert moved == set(start)
    run.save_model()
    assert {p.name for p in (tmp_path / "out").iterdir()} == PEFT_FILES | {"training_args.bin"}
    assert_loads_equal(model, tiny_llama, tmp_path / "out", rows[0]["input_ids"].unsqueeze(0))


def test_a_classifier_trains_with_its_head(tiny_bert_classifier: Callable[..., Any], tmp_path: Path) -> None:
    model, rows = tiny_bert_classifier(), labelled()
    before = bits(model)
    board = deltaw.attach(model, deltaw.LoraConfig(r=4, task_type="SEQ_CLS"), seed=1)
    start = values(board)
    run = trainer(model, tmp_path / "out", rows, max_steps=40, learning_rate=0.01)
    run.train()
    assert losses(run)[-1] < 0.5 * losses(run)[0]
    assert same(bits(model), before)
    assert all(not torch.equal(t, start[k]) for k, t in values(board).items())
    assert any(k.startswith("classifier.") for k in start)
    run.save_model()
    assert_loads_equal(model, tiny_bert_classifier, tmp_path / "out", rows[0]["input_ids"].unsqueeze(0))


def assert_loads_equal(model: Any, build: Callable[..., Any], folder: Path, ids: Tensor) -> None:
    """The folder gives the trained model's logits on a new base: through deltaw, and through PEFT."""
    from peft import PeftModel

    with torch.no_grad():
        wanted = model.eval()(input_ids=ids).logits
        ours, untouched = build(), build()
        deltaw.attach(ours, store.load(folder))
        assert torch.equal(ours.eval()(input_ids=ids).logits, wanted)
        assert not torch.allclose(untouched(input_ids=ids).logits, wanted, atol=1e-2)
        theirs = PeftModel.from_pretrained(build(), folder).eval()
        torch.testing.assert_close(theirs(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_can_be_loaded_like_any_adapter(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model, rows = tiny_llama(), counting()
    deltaw.attach(model, CONFIG, seed=1)
    trainer(model, tmp_path, rows, save_strategy="steps", save_steps=6).train()
    folder = tmp_path / "checkpoint-6"
    assert {p.name for p in folder.iterdir()} >= PEFT_FILES | {"model.safetensors", "optimizer.pt"}
    assert not (folder / "config.json").exists()
    assert_loads_equal(model, tiny_llama, folder, rows[0]["input_ids"].unsqueeze(0))


# ------------------------------------------------------------------------------------------------- resuming, best model


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}])
def test_a_resumed_run_equals_an_uninterrupted_one(tiny_llama: Callable[..., Any], tmp_path: Path,
                                                   options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    rows, config = counting(), deltaw.LoraConfig(r=4, lora_dropout=0.1)
    model = tiny_llama()
    board = deltaw.attach(model, config, seed=1)
    trainer(model, tmp_path, rows, save_strategy="steps", save_steps=3, **options).train()
    whole = values(board)

    model = tiny_llama()
    board = deltaw.attach(model, config, seed=2)  # other factors at first: they must come from the checkpoint
    before = bits(model)
    run = trainer(model, tmp_path, rows, save_strategy="no", **options)
    caplog.clear()
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert run.state.global_step == 6
    assert same(values(board), whole)
    assert same(bits(model), before)
    assert "missing keys" not in caplog.text


def test_the_best_model_is_loaded_at_the_end(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    scores = iter([0.1, 0.9, 0.2])
    model = tiny_llama()
    board = deltaw.attach(model, CONFIG, seed=1)
    run = trainer(model, tmp_path, counting(), eval_dataset=counting(4), eval_strategy="steps", eval_steps=2,
                  compute_metrics=lambda _: {"score": next(scores)}, save_strategy="steps", save_steps=2,
                  load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best, last = (store.load(tmp_path / f"checkpoint-{step}") for step in (4, 6))
    now = board.adapter("default")
    assert all(torch.equal(now.sites[s].B, best.sites[s].B) for s in now.sites)
    assert all(not torch.equal(now.sites[s].B, last.sites[s].B) for s in now.sites)


@pytest.mark.parametrize("change", ["name", "rank", "targets"])
def test_resuming_with_other_adapters_is_refused(tiny_llama: Callable[..., Any], tmp_path: Path, change: str) -> None:
    model = tiny_llama()
    deltaw.attach(model, CONFIG, name="a")
    trainer(model, tmp_path, counting(), max_steps=2, save_strategy="steps", save_steps=1).train()
    model = tiny_llama()
    other = {"name": CONFIG, "rank": deltaw.LoraConfig(r=2), "targets": deltaw.LoraConfig(target_modules=["q_proj"])}
    deltaw.attach(model, other[change], name="b" if change == "name" else "a")
    before = values(deltaw.board(model), deltaw.board(model).names[0])
    with pytest.raises(RuntimeError, match=r"size mismatch|other adapters"):
        trainer(model, tmp_path, counting(), max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    if change != "rank":  # torch copies what fits before it tells of the rest
        assert same(values(deltaw.board(model), deltaw.board(model).names[0]), before)


# --------------------------------------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
def test_all_adapters_get_the_same_gradients_under_checkpointing(tiny_llama: Callable[..., Any], tmp_path: Path,
                                                                 reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny_llama()
        board = deltaw.attach(model, deltaw.LoraConfig(r=4, init_lora_weights=False), seed=1)
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        run = trainer(model, tmp_path, counting(), max_steps=1, learning_rate=0.0, max_grad_norm=0.0,
                      **options if checkpointing else {})
        run.train()
        model.train()
        model.zero_grad()
        batch = {k: torch.stack([row[k] for row in counting(4)]) for k in ("input_ids", "labels")}
        model(**batch).loss.backward()
        found.append({k: p.grad for k, p in board.parameters("default").items()})
    plain, checkpointed = found
    assert all(g is not None and bool(g.abs().sum() > 0) for g in checkpointed.values())
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient, rtol=1e-4, atol=1e-7)


def test_frozen_pixels_do_not_cut_gradients_off(tmp_path: Path) -> None:
    """A model whose input is no token ids: reentrant checkpoints need an input that has a gradient."""
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                                intermediate_size=48, image_size=8, patch_size=4, num_labels=3))
    board = deltaw.attach(model, deltaw.LoraConfig(r=2, task_type="SEQ_CLS", init_lora_weights=False), seed=1)
    rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": torch.tensor(i % 3)} for i in range(8)]
    start = values(board)
    trainer(model, tmp_path, rows, max_steps=2, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True}).train()
    assert [k for k, t in values(board).items() if torch.equal(t, start[k])] == []


# --------------------------------------------------------------------------------------- save_pretrained by itself


def test_further_adapters_go_to_subfolders_by_name(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama()
    names = ("one", "a/../b", "..", "ünï.code")
    board = deltaw.attach(model, deltaw.LoraConfig(r=2, init_lora_weights=False), name=names[0])
    for name in names[1:]:
        board.add(name, deltaw.LoraConfig(r=2, init_lora_weights=False))
    board.use(names[2])
    model.save_pretrained(tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    assert same_factors(store.load(tmp_path / "out"), board.adapter(names[2]))
    found = [store.load(p) for p in (tmp_path / "out").iterdir() if p.is_dir()]
    assert len(found) == 3
    for name in (names[0], names[1], names[3]):
        assert sum(same_factors(adapter, board.adapter(name)) for adapter in found) == 1


def same_factors(one: deltaw.Adapter, other: deltaw.Adapter) -> bool:
    return one.sites.keys() == other.sites.keys() and all(
        torch.equal(site.A, other.sites[name].A) and torch.equal(site.B, other.sites[name].B)
        for name, site in one.sites.items())


def test_a_given_state_is_what_is_written(tiny_bert_classifier: Callable[..., Any], tmp_path: Path) -> None:
    """Sharded training gathers the tensors first and passes them; the model's own are then not to be read."""
    model = tiny_bert_classifier()
    board = deltaw.attach(model, deltaw.LoraConfig(r=2, task_type="SEQ_CLS", bias="all", init_lora_weights=False))
    gathered = {k: t.detach() + 1 for k, t in model.state_dict().items()}
    model.save_pretrained(tmp_path / "checkpoint-1", state_dict=gathered)
    loaded = store.load(tmp_path / "checkpoint-1")
    for site, delta in board.adapter("default").sites.items():
        for key, tensor in delta.tensors.items():
            assert torch.equal(loaded.sites[site].tensors[key], tensor + 1), (site, key)


def test_the_base_is_named_in_the_folder(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    tiny_llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    deltaw.attach(model, deltaw.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(3, 9).unsqueeze(0)
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-5)


def test_detached_models_save_themselves_again(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    ids = torch.arange(3, 9).unsqueeze(0)
    deltaw.attach(model, deltaw.LoraConfig(r=2, init_lora_weights=False))
    wanted = model(ids).logits
    deltaw.detach(model, merge="default")
    assert not {"save_pretrained", "_hf_peft_config_loaded"} & set(model.__dict__)
    assert not model._forward_pre_hooks
    assert not model._load_state_dict_pre_hooks
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, wanted, rtol=1e-5, atol=1e-5)


def test_options_without_meaning_are_refused(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama()
    board = deltaw.attach(model, CONFIG)
    with pytest.raises(ConfigError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "x", push_to_hub=True)
    with pytest.raises(ConfigError, match="Did you mean max_shard_size"):
        model.save_pretrained(tmp_path / "x", max_shard_sise="1GB")
    model.save_pretrained(tmp_path / "x", is_main_process=False, max_shard_size="1GB")
    board.use(None)
    board.remove("default")
    with pytest.raises(StateError, match="no adapter"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_pushing_uploads_the_adapter(tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import hub

    sent: set[str] = set()

    class Card:
        def save(self, path: str) -> None:
            Path(path).write_text("card", encoding="utf-8")

    class Hub:
        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

    monkeypatch.setattr(hub, "hf_api", Hub)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: Card())
    model = tiny_llama()
    deltaw.attach(model, CONFIG)
    monkeypatch.setattr(type(model), "_upload_modified_files",
                        lambda self, folder, *_, **__: sent.update(p.name for p in Path(folder).iterdir()))
    model.push_to_hub("someone/adapter")
    assert sent == PEFT_FILES | {"README.md"}


def test_the_states_of_base_and_whole_model_still_load(tiny_llama: Callable[..., Any]) -> None:
    model, other = tiny_llama(), tiny_llama(seed=7)
    deltaw.attach(model, CONFIG)
    whole = copy.deepcopy(model.state_dict())
    result = model.load_state_dict(other.state_dict(), strict=False)
    assert result.missing_keys
    assert all("deltaw" in key for key in result.missing_keys)
    model.load_state_dict(whole)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({}, strict=True)


# ------------------------------------------------------------------------------------------------ quantized, Accelerate


def test_a_quantized_base_is_taken_and_trained(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map="cpu", dtype=torch.float32,
                                                 quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    board = deltaw.attach(model, CONFIG, seed=1)
    start = values(board)
    run = trainer(model, tmp_path / "out", counting(), max_steps=10)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    assert all(not torch.equal(t, start[k]) for k, t in values(board).items())
    run.save_model()
    assert store.load(tmp_path / "out").sites.keys() == board.adapter("default").sites.keys()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_prepares_trains_and_unwraps(tiny_llama: Callable[..., Any], tmp_path: Path, precision: str) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state()
    PartialState._reset_state()
    model = tiny_llama()
    before = bits(model)
    board = deltaw.attach(model, CONFIG, seed=1)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    optimizer = torch.optim.AdamW(board.parameters("default").values(), lr=0.02)
    loader = torch.utils.data.DataLoader(counting(), batch_size=8)  # type: ignore[arg-type]
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    seen = []
    for _ in range(4):
        for batch in loader:
            loss = prepared(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
    assert seen[-1] < 0.7 * seen[0]
    assert same(bits(model), before)
    inner = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    inner.save_pretrained(tmp_path / "out", state_dict=accelerator.get_state_dict(prepared))
    assert_loads_equal(inner, tiny_llama, tmp_path / "out", counting(1)[0]["input_ids"].unsqueeze(0))
    AcceleratorState._reset_state()
    PartialState._reset_state()
