"""TRL's `SFTTrainer` and `DPOTrainer` on attached models: unchanged; DPO is measured against the base itself."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import deltaw
from deltaw import store
from deltaw.errors import StateError
from deltaw.switch.pretrained import reference

pytestmark = pytest.mark.slow

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
PEFT_FILES = {"adapter_config.json", "adapter_model.safetensors", "deltaw.json"}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What other libraries warn of while they train is not what these tests are about."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        yield


@pytest.fixture
def tiny_llama(tiny_llama: Callable[..., Any]) -> Callable[..., Any]:
    """As for all tests, with weights so large that what is trained inside reaches the output."""
    return lambda seed=0, **fields: tiny_llama(seed, **{"initializer_range": 0.2} | fields)


@pytest.fixture
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>")


def counting(rows: int = 16) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"text": " ".join(f"w{(start * 5 + i) % 60}" for i in range(10))}
                              for start in range(rows)])


def preferences(rows: int = 16) -> Any:
    """After a word, the next one is preferred to the one before it."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": f"w{i + 5} w{i + 6}", "chosen": f" w{i + 7} w{i + 8}",
                               "rejected": f" w{i + 5} w{i + 4} w{i + 3}"} for i in range(rows)])


def sft(model: Any, folder: Path, tokenizer: Any, **options: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    settings = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 0.02, "logging_steps": 1,
                "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "seed": 3}
    return SFTTrainer(model=model, args=SFTConfig(output_dir=str(folder), **settings | options),
                      train_dataset=counting(), processing_class=tokenizer)


def dpo(model: Any, folder: Path, tokenizer: Any, ref_model: Any = None, **options: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    settings = {"max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 0.01, "logging_steps": 1,
                "beta": 0.5, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
                "bf16": False, "seed": 3}
    return DPOTrainer(model=model, ref_model=ref_model, args=DPOConfig(output_dir=str(folder), **settings | options),
                      train_dataset=preferences(), processing_class=tokenizer)


def history(run: Any, what: str) -> list[float]:
    return [float(entry[what]) for entry in run.state.log_history if what in entry]


def bits(model: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if "deltaw" not in k}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def values(board: deltaw.Switchboard) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in board.parameters("default").items()}


def assert_loads_equal(model: Any, build: Callable[..., Any], folder: Path) -> None:
    from peft import PeftModel

    ids = torch.arange(4, 14).unsqueeze(0)
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids).logits
        ours = build()
        deltaw.attach(ours, store.load(folder))
        assert torch.equal(ours(input_ids=ids).logits, wanted)
        theirs = PeftModel.from_pretrained(build(), folder).eval()
        torch.testing.assert_close(theirs(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- SFT


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}, {"packing": True}],
                         ids=["default", "reentrant", "packed"])
def test_sft_trains_and_saves_the_adapter(tiny_llama: Callable[..., Any], tokenizer: Any, tmp_path: Path,
                                          options: dict[str, Any]) -> None:
    model = tiny_llama()
    before = bits(model)
    board = deltaw.attach(model, deltaw.LoraConfig(r=4, task_type="CAUSAL_LM"), seed=1)
    start = values(board)
    run = sft(model, tmp_path, tokenizer, max_steps=20, **options)
    run.train()
    assert run.args.gradient_checkpointing  # TRL's own default
    assert history(run, "loss")[-1] < 0.6 * history(run, "loss")[0]
    assert same(bits(model), before)
    assert [k for k, t in values(board).items() if torch.equal(t, start[k])] == []
    run.save_model()
    assert {p.name for p in tmp_path.iterdir() if p.suffix == ".safetensors"} == {"adapter_model.safetensors"}
    assert {p.name for p in tmp_path.iterdir()} >= PEFT_FILES
    assert_loads_equal(model, tiny_llama, tmp_path)


def test_sft_counts_the_loss_that_the_attached_model_has(tiny_llama: Callable[..., Any], tokenizer: Any,
                                                         tmp_path: Path) -> None:
    """TRL's fused loss does not go through the model's own forward; the adapters must be in it all the same."""
    model = tiny_llama()
    deltaw.attach(model, deltaw.LoraConfig(r=4, init_lora_weights=False))
    run = sft(model, tmp_path, tokenizer, max_steps=1, learning_rate=0.0, per_device_train_batch_size=16)
    run.train()
    ids = torch.tensor([[*tokenizer(row)["input_ids"], 2] for row in counting()["text"]])
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids, labels=ids).loss.item()
    assert history(run, "loss")[0] == pytest.approx(wanted, abs=2e-3)


def test_sft_resumes_as_if_never_interrupted(tiny_llama: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    results = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        model = tiny_llama()
        board = deltaw.attach(model, deltaw.LoraConfig(r=4), seed=2 if resume else 1)
        sft(model, tmp_path, tokenizer, save_strategy="no" if resume else "steps",
            save_steps=3).train(resume_from_checkpoint=resume)
        results.append(values(board))
    assert same(*results)


@pytest.mark.parametrize("fields", [{"target_modules": ("q_proj", "lm_head")},
                                    {"target_modules": ("q_proj",), "modules_to_save": ("lm_head",)}])
def test_an_adapted_head_is_refused_and_not_skipped(tiny_llama: Callable[..., Any], tokenizer: Any, tmp_path: Path,
                                                    fields: dict[str, Any]) -> None:
    model = tiny_llama()
    deltaw.attach(model, deltaw.LoraConfig(r=4, **fields))
    with pytest.raises(StateError, match="would skip the adapter"):
        sft(model, tmp_path, tokenizer).train()


# ------------------------------------------------------------------------------------------------------------- DPO


def log_prob(model: Any, tokenizer: Any, prompt: str, completion: str) -> float:
    """Σ log p of a completion's tokens and the end token after a prompt, by the plain forward."""
    start = tokenizer(prompt)["input_ids"]
    ids = torch.tensor([[*tokenizer(prompt + completion)["input_ids"], 2]])
    with torch.no_grad():
        scores = F.log_softmax(model(input_ids=ids).logits[0, :-1].float(), dim=-1)
    picked = scores.gather(1, ids[0, 1:, None])[:, 0]
    return float(picked[len(start) - 1:].sum())


@pytest.mark.parametrize("way", ["shared", "copy", "from disk", "precomputed"])
def test_dpo_prefers_and_is_measured_against_the_base(tiny_llama: Callable[..., Any], tokenizer: Any, tmp_path: Path,
                                                      way: str) -> None:
    from transformers import AutoModelForCausalLM

    tiny_llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = bits(model)
    fresh = way == "precomputed"  # TRL asks the model itself, before the first step
    board = deltaw.attach(model, deltaw.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=fresh), seed=1)
    other = {"shared": reference, "copy": lambda m: deltaw.detach(copy.deepcopy(m))}
    run = dpo(model, tmp_path / "out", tokenizer, ref_model=other[way](model) if way in other else None,
              precompute_ref_log_probs=fresh)
    batch = next(iter(run.get_train_dataloader()))
    if fresh:
        found = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
    else:
        found = run.compute_ref_log_probs(run.ref_model, batch)
    texts = [tokenizer.decode(row[row != 0]) for row in batch["input_ids"]]
    base = tiny_llama()
    half = len(texts) // 2
    for side, part in ((0, texts[:half]), (1, texts[half:])):
        for got, text in zip(found[side].tolist(), part, strict=True):
            words = text.removesuffix("</s>").split()
            prompt, completion = " ".join(words[:2]), " " + " ".join(words[2:])
            assert got == pytest.approx(log_prob(base, tokenizer, prompt, completion), abs=1e-3)
            if not fresh:
                assert abs(got - log_prob(model.eval(), tokenizer, prompt, completion)) > 1e-2
    start = values(board)
    run.train()
    assert history(run, "rewards/accuracies")[-1] > 0.9
    assert history(run, "loss")[-1] < 0.7 * math.log(2)
    assert same(bits(model), before)
    assert [k for k, t in values(board).items() if torch.equal(t, start[k])] == []
    run.save_model()
    assert_loads_equal(model, tiny_llama, tmp_path / "out")


def test_the_shared_reference_costs_no_weights_and_stays_the_base(tiny_llama: Callable[..., Any]) -> None:
    model, base = tiny_llama(), tiny_llama()
    ids = torch.arange(4, 14).unsqueeze(0)
    board = deltaw.attach(model, deltaw.LoraConfig(r=4, init_lora_weights=False))
    shared = reference(model)
    theirs = {id(p) for p in model.parameters()}
    assert all(id(p) in theirs for p in shared.parameters())
    assert torch.equal(shared(ids).logits, base(ids).logits)
    assert not torch.allclose(model(ids).logits, base(ids).logits, atol=1e-2)
    assert not any(p.requires_grad for p in shared.parameters())
    assert shared.__dict__.keys().isdisjoint({"save_pretrained", "_deltaw_board"})
    with board.merged("default"), pytest.raises(StateError, match="merged"):
        reference(model)
    deltaw.detach(model)
    with pytest.raises(StateError, match="no switchboard"):
        reference(model)
    assert torch.equal(shared(ids).logits, base(ids).logits)
