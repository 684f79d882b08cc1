"""`deltaw analyse` on trained adapters: what it prints, the page, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deltaw.cli.analyse import short_names
from tests.cli.conftest import write_rows

Run = Callable[..., tuple[int, str, str]]


def test_two_adapters_their_base_and_what_they_forgot(adapters: dict[str, Path], base: Path, tmp_path: Path,
                                                       deltaw: Run) -> None:
    text = write_rows(tmp_path / "text.jsonl", [{"text": "the sky is blue the sea is green hello world"}] * 3)
    code, out, err = deltaw("analyse", adapters["yes"], adapters["no"], "--model", base, "--data", text,
                            "--out", tmp_path / "page.html", "--threads", 1, "--dtype", "fp32", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [study["name"] for study in found["adapters"]] == ["yes", "no"]
    assert found["pairs"][0]["cosine"] < 0.99
    assert all(row["factor"] > 0 for row in found["adapters"][0]["against_base"])
    assert [row["adapter"] for row in found["forgetting"]] == ["yes", "no"]
    assert all(row["after"] != row["before"] for row in found["forgetting"])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for heading in ("At a glance", "Where the change is", "have in common", "ΔW against W", "Intruder", "Forgetting"):
        assert heading in page, heading


def plain_loss(base: Path, tensors: Path | None, text: str) -> float:
    """The mean loss of a token in plain transformers, with these weights in the place of the base's."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if tensors is not None:
        model.load_state_dict(load_file(tensors))
    ids = AutoTokenizer.from_pretrained(base)(text + " <|im_end|>", return_tensors="pt").input_ids
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def test_what_full_fine_tuning_forgot_stands_beside_lora(adapters: dict[str, Path], base: Path, rows: Path,
                                                         tmp_path: Path, deltaw: Run) -> None:
    for method in ("full", "preembed"):
        code, _, err = deltaw("train", "--model", base, "--data", rows, "--out", tmp_path / method, "--method", method,
                              "--max-steps", 4, "--learning-rate", 0.01, "--eval-rows", 4, "--device", "cpu",
                              "--samples", 0, "--no-report")
        assert code == 0, err
    (tmp_path / "general.txt").write_text("the sky is blue\nthe sea is green\n\nhello world\n")
    command = ["analyse", tmp_path / "full", adapters["no"], tmp_path / "preembed", "--data", tmp_path / "general.txt",
               "--dtype", "fp32"]
    code, out, err = deltaw(*command, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [study["name"].split("/")[-1] for study in found["adapters"]] == ["no"]
    probed = {row["adapter"].split("/")[-1]: row for row in found["forgetting"]}
    assert list(probed) == ["full", "no", "preembed"]
    assert len({row["before"] for row in probed.values()}) == 1
    assert all(row["after"] != row["before"] for row in probed.values())
    texts = {"the sky is blue\nthe sea is green": 9, "hello world": 3}  # tokens with the one that ends a text
    for field, tensors in (("before", None), ("after", tmp_path / "full" / "tuning.safetensors")):
        sums = [plain_loss(base, tensors, text) * (tokens - 1) for text, tokens in texts.items()]
        assert probed["full"][field] == pytest.approx(sum(sums) / (sum(texts.values()) - len(texts)), abs=1e-5)


def test_another_method_alone_has_a_page_of_what_it_forgot(base: Path, rows: Path, tmp_path: Path, deltaw: Run) -> None:
    code, _, err = deltaw("train", "--model", base, "--data", rows, "--out", tmp_path / "run", "--method", "head",
                          "--max-steps", 2, "--eval-rows", 4, "--device", "cpu", "--samples", 0, "--no-report")
    assert code == 0, err
    (tmp_path / "general.txt").write_text("hello world\n")
    code, out, err = deltaw("analyse", tmp_path / "run", "--data", tmp_path / "general.txt", "--out",
                            tmp_path / "page.html")
    assert code == 0, err
    assert "With run the loss on general.txt goes from" in out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "What run change" in page
    assert "Loss on general.txt" in page
    code, _, err = deltaw("analyse", tmp_path / "run")
    assert code == 1
    assert "was trained with method head" in err
    assert "--data TEXT" in err


def test_one_adapter_without_a_base(adapters: dict[str, Path], deltaw: Run) -> None:
    code, out, _ = deltaw("analyse", adapters["yes"])
    assert code == 0
    assert "effective rank" in out
    assert "changes its base most at" in out


def test_what_is_wrong_is_said_at_once(tmp_path: Path, base: Path, adapters: dict[str, Path], deltaw: Run) -> None:
    code, _, err = deltaw("analyse", tmp_path / "one", tmp_path / "two")
    assert code == 1
    assert "one" in err
    assert "two" in err
    assert deltaw("analyse")[0] == 2
    code, _, err = deltaw("analyse", adapters["yes"], "--epsilon", "2", "--top", "0")
    assert code == 2
    assert "epsilon" in err
    assert "top" in err
    code, _, err = deltaw("analyse", adapters["yes"], "--sites", "q_porj")
    assert code in (1, 2)
    assert "q_porj" in err


def test_adapters_of_another_base_are_refused(adapters: dict[str, Path], tmp_path: Path, deltaw: Run) -> None:
    from tests.cli.conftest import write_base

    other = write_base(tmp_path / "other", seed=9)
    code, _, err = deltaw("analyse", adapters["yes"], adapters["no"], "--model", other)
    assert code == 1
    assert "yes:" in err
    assert "no:" in err


def test_texts_with_several_references_are_measured_by_prompt(base: Path, tmp_path: Path, deltaw: Run) -> None:
    rows = [{"prompt": f"is the {thing} blue ?", "completion": answer} for thing in ("sky", "sea")
            for answer in ("yes", "no", "maybe hello world")]
    data = write_rows(tmp_path / "refs.jsonl", rows)
    code, out, err = deltaw("eval", "--model", base, "--data", data, "--metrics", "rouge,cider,perplexity", "--json",
                            "--num-beams", 2, "--length-penalty", 0.9, "--no-repeat-ngram-size", 4, "--dtype", "fp32",
                            "--max-new-tokens", 4)
    assert code == 0, err
    figures = json.loads(out)["base_figures"]
    assert {"rouge1", "rouge2", "rougeL", "cider", "perplexity"} <= set(figures)
    code, _, err = deltaw("eval", "--model", base, "--data", data, "--length-penalty", 0.9)
    assert code == 2
    assert "length-penalty" in err or "length_penalty" in err


def test_adapters_are_named_by_what_tells_their_paths_apart() -> None:
    runs = ["runs/r=8/all/seed-0/adapter", "runs/r=64/all/seed-0/adapter", "runs/r=64/all/seed-1/adapter"]
    assert short_names(runs) == ["r=8/seed-0", "r=64/seed-0", "r=64/seed-1"]
    assert short_names(["a/b"]) == ["b"]
    assert short_names(["a", "y/a"]) == ["a", "y/a"]
