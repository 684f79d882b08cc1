"""Figures against sums written out, generation against one token at a time, metrics against scikit-learn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaw.bases import load_base, stop_tokens
from deltaw.data import load_data
from deltaw.data.examples import Example, Prompt
from deltaw.errors import ConfigError
from deltaw.train import evaluate, generate, score_choices
from deltaw.train.evaluation import _tail, answers
from deltaw.train.metrics.choices import accuracy, macro_f1


@pytest.fixture(scope="module")
def base(base_folder: Path) -> Any:
    return load_base(str(base_folder), dtype="fp32")


@pytest.fixture(scope="module")
def data(base: Any, color_rows: Path) -> Any:
    return load_data(color_rows, tokenizer=base.tokenizer)


def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """The likeliest token, one at a time, with no cache and no padding."""
    ids = list(prompt)
    for _ in range(count):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == 2:
            break
        ids.append(token)
    return ids[len(prompt):]


def test_generation_equals_one_token_at_a_time(base: Any) -> None:
    prompts = [[5, 9, 31], [40], [7, 7, 8, 60, 61, 62, 63], [12, 50]]
    assert generate(base.model, base.tokenizer, prompts, max_new_tokens=6, batch_size=3) == \
        [greedy(base.model, prompt, 6) for prompt in prompts]


def test_generation_stops_at_a_stop_token_and_leaves_it_out(base: Any) -> None:
    prompt = [5, 9, 31]
    free = greedy(base.model, prompt, 6)
    stop = free[2]
    assert generate(base.model, base.tokenizer, [prompt], max_new_tokens=6, stop=[stop]) == [free[:free.index(stop)]]


def test_generation_is_greedy_whatever_the_base_prefers(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, plain = [5, 9, 31], base.model.generation_config
    before = greedy(base.model, prompt, 6)
    for name, value in {"repetition_penalty": 50.0, "do_sample": True, "temperature": 9.0, "num_beams": 3}.items():
        monkeypatch.setattr(plain, name, value)
    assert generate(base.model, base.tokenizer, [prompt], max_new_tokens=6) == [before]


def test_generation_ends_where_the_positions_end(base: Any) -> None:
    prompts = [[5] * 62, [5] * 64]
    written = generate(base.model, base.tokenizer, prompts, max_new_tokens=10, batch_size=1)
    assert len(written[0]) <= 2
    assert written[1] == []


def test_a_turns_end_token_that_no_setting_names_still_stops(base: Any) -> None:
    assert stop_tokens(base.model, base.tokenizer, [[40, 41, 3, 42]]) == {2, 3}
    assert stop_tokens(base.model, base.tokenizer, [[3, 40, 41]]) == {2}


def test_the_loss_is_the_mean_over_tokens_and_not_over_batches(base: Any, data: Any) -> None:
    rows = [0, 1, 2, 5, 7]
    total, count = 0.0, 0
    for row in rows:
        example = data[row]
        logits = base.model(torch.tensor([example.input_ids])).logits[0].double()
        for t, label in enumerate(example.labels[1:]):
            if label != -100:
                total, count = total - torch.log_softmax(logits[t], -1)[label].item(), count + 1
    result = evaluate(base.model, base.tokenizer, data, rows=rows, batch_size=2)
    assert (result.units, result.rows) == (count, 5)
    assert result.loss == pytest.approx(total / count, rel=1e-6)
    assert result.figures == {"loss": result.loss}


def test_choices_are_scored_by_their_summed_log_likelihood(base: Any) -> None:
    prompts, choices = [[5, 9, 31], [40]], [[50, 2], [51, 52, 53, 2], [60]]
    scores = score_choices(base.model, base.tokenizer, prompts, choices, batch_size=4)
    for p, prompt in enumerate(prompts):
        for c, choice in enumerate(choices):
            logits = base.model(torch.tensor([prompt + choice])).logits[0].double().log_softmax(-1)
            expected = sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(choice))
            assert scores[p, c].item() == pytest.approx(expected.item(), rel=1e-5)


class TurnsWithALineBreak:
    """Encoded rows whose template writes a line break (41) after the token (3) that ends a turn."""

    def prompt(self, row: int) -> Prompt:
        return Prompt([5, 9], "R", "rows.jsonl:1")

    def __getitem__(self, row: int) -> Example:
        return Example([5, 9, 50, 3, 41], [-100, -100, 50, 3, -100], "rows.jsonl:1")


def test_what_a_template_writes_after_a_turn_is_not_scored(base: Any) -> None:
    rows: Any = TurnsWithALineBreak()
    assert _tail(rows, 0) == [50, 3]


def test_metrics_of_a_language_model(base: Any, data: Any) -> None:
    seen: dict[str, Any] = {}

    def lengths(predictions: Sequence[str], references: Sequence[str]) -> float:
        seen.update(predictions=predictions, references=references)
        return 7.0

    rows = list(range(9))
    result = evaluate(base.model, base.tokenizer, data, rows=rows, metrics=("exact_match", "accuracy", "f1", lengths),
                      max_new_tokens=3)
    assert seen["references"] == ["R", "B", "G"] * 3
    written = [base.tokenizer.decode(greedy(base.model, data.prompt(row).input_ids, 3), skip_special_tokens=True)
               for row in rows]
    assert [text.strip() for text in written] == seen["predictions"]
    assert result.metrics["exact_match"] == accuracy(seen["predictions"], seen["references"])
    assert result.metrics["lengths"] == 7.0
    tails = [[*base.tokenizer(letter).input_ids, 2] for letter in "RBG"]
    chosen = ["RBG"[int(score_choices(base.model, base.tokenizer, [data.prompt(row).input_ids], tails).argmax())]
              for row in rows]
    assert result.metrics["accuracy"] == accuracy(chosen, seen["references"])
    assert result.metrics["f1"] == macro_f1(chosen, seen["references"])


def test_f1_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, f1_score

    generator = torch.Generator().manual_seed(0)
    predictions = torch.randint(0, 4, (50,), generator=generator).tolist()
    references = torch.randint(0, 3, (50,), generator=generator).tolist()
    assert macro_f1(predictions, references) == pytest.approx(
        f1_score(references, predictions, average="macro", zero_division=0))
    assert accuracy(predictions, references) == pytest.approx(accuracy_score(references, predictions))


def test_the_mode_and_the_generators_are_left_as_they_were(base: Any, data: Any) -> None:
    base.model.train()
    before = torch.get_rng_state()
    evaluate(base.model, base.tokenizer, data, rows=[0, 1], metrics=("exact_match",), max_new_tokens=2)
    answers(base.model, base.tokenizer, data, [0], max_new_tokens=2)
    assert base.model.training
    assert torch.equal(torch.get_rng_state(), before)
    base.model.eval()


def test_choosing_among_too_many_answers_is_refused(base: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a", "completion": f"x{i}"}) + "\n" for i in range(40)))
    rows = load_data(path, tokenizer=base.tokenizer)
    with pytest.raises(ConfigError, match=r"which have 40 different ones; expected 2 to 32\. Use exact_match"):
        evaluate(base.model, base.tokenizer, rows, metrics=("accuracy",))


def test_a_classifier(base_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "ab" * (i + 1), "label": "yes" if i % 3 else "no"}) + "\n"
                            for i in range(7)))
    base = load_base(str(base_folder), task="seq-cls", labels=("no", "yes"), dtype="fp32")
    data = load_data(path, tokenizer=base.tokenizer, task="seq-cls")
    result = evaluate(base.model, base.tokenizer, data, metrics=("accuracy", "f1"), batch_size=3)
    predictions, total = [], 0.0
    for i in range(7):
        logits = base.model(torch.tensor([data[i].input_ids])).logits[0].double().log_softmax(-1)
        predictions.append(int(logits.argmax()))
        total -= logits[data[i].label].item()
    references = [0, 1, 1, 0, 1, 1, 0]
    assert result.loss == pytest.approx(total / 7, rel=1e-5)
    assert result.metrics == {"accuracy": accuracy(predictions, references), "f1": macro_f1(predictions, references)}
