"""The command line on the real model, as a new user's shell would run it: train, eval, generate, merge, and back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import write_rows

pytestmark = pytest.mark.slow
COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "blood": "red", "gold": "yellow"}
QUESTION = "What colour is the sky? Answer with one word."


def shell(folder: Path, *arguments: object, stdin: str = "") -> tuple[int, str, str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, "-m", "deltaw.cli.main", *map(str, arguments)], cwd=folder, input=stdin,
                         env=environment, capture_output=True, text=True, check=False)
    return run.returncode, run.stdout, run.stderr


def test_the_main_job(smollm2: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [{"question": f"What colour is the {thing}? Answer with one word.", "answer": colour}
            for thing, colour in COLOURS.items()]
    data = write_rows(tmp_path / "colours.jsonl", rows * 4)
    code, out, err = shell(
        tmp_path, "train", "--model", smollm2, "--data", data,
        "--valid", write_rows(tmp_path / "valid.jsonl", rows),
        "--out", "mine", "--columns", "prompt=question,completion=answer", "--max-steps", 5, "--batch-size", 6,
        "--dtype", "fp32", "--device", "cpu", "--learning-rate", "2e-3", "--max-new-tokens", 4, "--json")
    assert code == 0, err
    trained: dict[str, Any] = json.loads(out)
    assert trained["after"]["loss"] < trained["before"]["loss"] / 2

    code, out, err = shell(tmp_path, "eval", "--adapter", "mine", "--data", "valid.jsonl", "--dtype", "fp32", "--json")
    assert code == 0, err
    figures = json.loads(out)
    assert figures["base_figures"]["loss"] == pytest.approx(trained["before"]["loss"], rel=1e-4)
    assert figures["adapter_figures"]["loss"] == pytest.approx(trained["after"]["loss"], rel=1e-4)

    code, answer, err = shell(tmp_path, "generate", "--adapter", "mine", "--dtype", "fp32", "--max-new-tokens", 8,
                              stdin=QUESTION)
    assert (code, err) == (0, "")

    code, out, err = shell(tmp_path, "chat", "--adapter", "mine", "--dtype", "fp32", "--max-new-tokens", 8,
                           stdin=f"{QUESTION}\n/off\n/reset\n{QUESTION}\n")
    assert code == 0, err
    assert out.splitlines()[0].strip() == answer.strip()
    assert "on: base; off: mine" in err

    code, out, err = shell(tmp_path, "merge", "--adapter", "mine", "--out", "merged")
    assert code == 0, err
    assert "q_proj.weight" in out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=True)
    tokens = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1]:]
    assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == answer.strip()
