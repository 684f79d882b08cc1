"""`train`, `eval`, `generate` and `merge` on a tiny base: what they print, write and leave alone."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import FAST, questions, write_base, write_rows

Run = Callable[..., tuple[int, str, str]]
QUESTION = "is the sky blue ?"


def only_object(out: str) -> dict[str, Any]:
    """The one JSON object that is all of stdout."""
    assert out.count("\n") == 1, out
    found: dict[str, Any] = json.loads(out)
    return found


# --------------------------------------------------------------------------------------------------------------- train


def test_train_leaves_an_adapter_a_report_and_commands_that_work(deltaw: Run, base: Path, rows: Path,
                                                                 tmp_path: Path) -> None:
    out = tmp_path / "my adapters" / "yes"
    code, text, err = deltaw("train", "--model", base, "--data", rows, "--out", out, *FAST)
    assert code == 0
    assert {"adapter_config.json", "adapter_model.safetensors", "deltaw.json", "report.html", "metrics.jsonl"} <= {
        path.name for path in out.iterdir()}
    assert "before" in err
    assert str(out / "report.html") in text
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("  deltaw ")]
    assert [command[1] for command in commands] == ["generate", "chat", "serve", "merge"]
    generate, _, serve, merge = commands
    assert Path(serve[serve.index("--adapters") + 1]) == out
    assert deltaw(*generate[1:-1], QUESTION)[:2] == (0, "yes\n")
    assert deltaw(*merge[1:])[0] == 0


def test_train_as_json(deltaw: Run, base: Path, rows: Path, tmp_path: Path) -> None:
    code, text, err = deltaw("train", "--model", base, "--data", rows, "--out", tmp_path / "a", *FAST, "--json",
                             "--metrics", "exact_match")
    found = only_object(text)
    assert code == 0
    assert found["after"]["exact_match"] == 1.0 > found["before"]["exact_match"]
    assert found["after"]["loss"] < found["before"]["loss"]
    assert found["steps"] == 40
    assert found["report"] == str(tmp_path / "a" / "report.html")
    assert "step 40/40" in err


def test_train_without_a_report(deltaw: Run, base: Path, rows: Path, tmp_path: Path) -> None:
    words = ["train", "--model", base, "--data", rows, "--out", tmp_path / "a", *FAST, "--max-steps", 2, "--no-report"]
    assert deltaw(*words)[0] == 0
    assert not (tmp_path / "a" / "report.html").exists()


def test_train_goes_on_from_a_checkpoint(deltaw: Run, base: Path, rows: Path, tmp_path: Path) -> None:
    """Training that is cut off and resumed from its own config file gives the tensors of one that was not."""
    from safetensors.torch import load_file

    common = ["--model", base, "--data", rows, *FAST, "--max-steps", 6, "--save-every", 2, "--no-report"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert deltaw("train", *common, "--out", whole)[0] == 0
    assert deltaw("train", *common, "--out", cut)[0] == 0
    for name in ("adapter_model.safetensors", "adapter_config.json", "deltaw.json", "train_result.json"):
        (cut / name).unlink()
    last = max((cut / "checkpoints").iterdir())
    for file in last.iterdir():
        file.unlink()
    code, _, err = deltaw("train", "--config", cut / "train_config.json", "--resume", "--no-report")
    assert code == 0
    assert "resuming at step 4 of 6" in err
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (cut, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ------------------------------------------------------------------------------------------------------------ generate


@pytest.mark.parametrize(("adapter", "answer"), [("yes", "yes"), ("no", "no")])
def test_generate_answers_with_the_adapter(adapter: str, answer: str, deltaw: Run, adapters: dict[str, Path]) -> None:
    """The base is the one that the adapter records."""
    assert deltaw("generate", "--adapter", adapters[adapter], QUESTION)[:2] == (0, f"{answer}\n")


def test_generate_is_plain_transformers_for_the_base(deltaw: Run, base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=True)
    output = model.generate(**ids, max_new_tokens=5, do_sample=False)
    expected = tokenizer.decode(output[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)
    code, out, _ = deltaw("generate", "--model", base, "--max-new-tokens", 5, "--dtype", "fp32", "--json", QUESTION)
    assert code == 0
    assert only_object(out)["answers"] == [{"prompt": QUESTION, "answer": expected.strip()}]


def test_generate_reads_stdin_and_compares(deltaw: Run, adapters: dict[str, Path],
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))
    code, out, _ = deltaw("generate", "--adapter", adapters["no"], "--compare", "--json", "--max-new-tokens", 3)
    answer = only_object(out)["answers"][0]
    assert code == 0
    assert answer["prompt"] == QUESTION
    assert answer["answer"] == "no" != answer["base"]


def test_generate_answers_several_prompts_in_order(deltaw: Run, adapters: dict[str, Path]) -> None:
    code, out, _ = deltaw("generate", "--adapter", adapters["yes"], QUESTION, "is the sea green ?")
    assert (code, out) == (0, f"> {QUESTION}\nyes\n\n> is the sea green ?\nyes\n")


def test_generate_draws_by_seed(deltaw: Run, base: Path) -> None:
    def drawn(seed: int) -> str:
        common = ["--model", base, "--temperature", 2, "--max-new-tokens", 8]
        return deltaw("generate", *common, "--seed", seed, QUESTION)[1]

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1


def test_an_adapter_of_plain_text_is_given_plain_text(deltaw: Run, base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "texts.jsonl", [{"text": "hello world blue green yes"}] * 12)
    out = tmp_path / "text"
    assert deltaw("train", "--model", base, "--data", data, "--out", out, *FAST)[0] == 0
    assert deltaw("generate", "--adapter", out, "--max-new-tokens", 3, "hello world")[:2] == (0, "blue green yes\n")


# ---------------------------------------------------------------------------------------------------------------- eval


def test_eval_measures_with_and_without(deltaw: Run, adapters: dict[str, Path], tmp_path: Path) -> None:
    mixed = write_rows(tmp_path / "mixed.jsonl", [*questions("yes")[:6], *questions("no")[:2]])
    code, out, _ = deltaw("eval", "--adapter", adapters["yes"], "--data", mixed, "--json")
    found = only_object(out)
    assert code == 0
    assert found["rows"] == 8
    assert found["adapter_figures"]["exact_match"] == 0.75
    assert found["base_figures"]["exact_match"] < 0.75
    code, table, _ = deltaw("eval", "--adapter", adapters["yes"], "--data", mixed, "--metrics", "accuracy")
    assert code == 0
    assert "75.0%" in next(line for line in table.splitlines() if "accuracy" in line)


def test_eval_of_the_base_alone(deltaw: Run, base: Path, rows: Path) -> None:
    """The loss is that of plain transformers on the answers' tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code, out, _ = deltaw("eval", "--model", base, "--data", rows, "--dtype", "fp32", "--json")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    losses = []
    for row in questions("yes"):
        ids = tokenizer(f"<|im_start|> user {row['prompt']} <|im_end|> <|im_start|> assistant yes <|im_end|>",
                        return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids).logits[0, -3:-1].log_softmax(-1)
        losses.append(-logits.gather(1, ids[0, -2:, None]).mean().item())
    assert code == 0
    assert only_object(out)["base_figures"]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert "adapter_figures" not in only_object(out)


def test_a_classifier_from_training_to_evaluation(deltaw: Run, base: Path, tmp_path: Path) -> None:
    """Its labels, in the order of training, are recorded with it: data with fewer of them is judged rightly."""
    rows = [{"text": f"the {thing} is {colour}", "label": label} for thing in ("sky", "sea", "grass", "world")
            for colour, label in (("blue", "cold"), ("green", "warm"), ("maybe", "other"))] * 4
    out = tmp_path / "colours"
    data = write_rows(tmp_path / "rows.jsonl", rows)
    code, text, _ = deltaw("train", "--model", base, "--data", data, "--out", out, "--task", "seq-cls", *FAST,
                           "--metrics", "accuracy", "--json")
    assert code == 0
    assert only_object(text)["after"]["accuracy"] == 1.0
    warm = write_rows(tmp_path / "warm.jsonl", [row for row in rows if row["label"] != "cold"])
    code, text, err = deltaw("eval", "--adapter", out, "--data", warm, "--json")
    assert code == 0, err
    assert only_object(text)["adapter_figures"]["accuracy"] == 1.0
    unknown = write_rows(tmp_path / "unknown.jsonl", [{"text": "hello", "label": "wram"}])
    code, _, err = deltaw("eval", "--adapter", out, "--data", unknown)
    assert code == 1
    assert "unknown.jsonl:1" in err
    assert "Did you mean warm?" in err
    code, _, err = deltaw("generate", "--adapter", out, "hello")
    assert code == 1
    assert "was trained to choose labels" in err


# --------------------------------------------------------------------------------------------------------------- merge


def test_merge_writes_a_model_that_plain_transformers_loads(deltaw: Run, base: Path, adapters: dict[str, Path],
                                                            tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code, out, _ = deltaw("merge", "--adapter", adapters["no"], "--out", tmp_path / "merged", "--json")
    assert code == 0
    assert only_object(out)["out_dir"] == str(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=True)
    output = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(output[0, ids["input_ids"].shape[1]:], skip_special_tokens=True).strip() == "no"
    assert deltaw("generate", "--model", tmp_path / "merged", QUESTION)[:2] == (0, "no\n")


def test_merge_prints_what_changed_and_keeps_what_is_there(deltaw: Run, adapters: dict[str, Path],
                                                           tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    code, out, _ = deltaw("merge", "--adapter", adapters["no"], "--out", merged)
    assert code == 0
    assert "q_proj.weight" in out
    assert str(merged) in out
    before = (merged / "model.safetensors").read_bytes()
    code, out, err = deltaw("merge", "--adapter", adapters["yes"], "--out", merged)
    assert (code, out) == (1, "")
    assert "overwrite" in err
    assert (merged / "model.safetensors").read_bytes() == before
    assert deltaw("merge", "--adapter", adapters["yes"], "--out", merged, "--overwrite")[0] == 0
    assert (merged / "model.safetensors").read_bytes() != before


def test_a_base_is_refused_where_an_adapter_belongs(deltaw: Run, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    code, _, err = deltaw("generate", "--adapter", base, "hello")
    assert code == 1
    assert "has no adapter_config.json" in err
