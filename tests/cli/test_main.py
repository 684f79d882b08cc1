"""Exit codes, one clear line for each fault, and what is kept quiet."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import deltaw.cli.merge as merge_verb
from deltaw.cli.main import VERBS
from deltaw.errors import DataError, Fault

Run = Callable[..., tuple[int, str, str]]
TRAIN = ["train", "--model", "m", "--data", "d", "--out", "o"]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """A function that makes `deltaw merge` raise an exception."""
    def fail(error: BaseException) -> None:
        def run(options: object) -> None:
            raise error

        monkeypatch.setattr(merge_verb, "run", run)

    return fail


@pytest.mark.parametrize(("error", "code", "said"), [
    (DataError(Fault("a.jsonl:3", "is empty", "a JSON object")), 1, "a.jsonl:3: is empty; expected a JSON object"),
    (DataError("one", "two"), 1, "2 faults:\n  one\n  two"),
    (ValueError("odd\nvalue"), 1, "ValueError: odd (unforeseen; --debug shows where)"),
    (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1, "No space left on device: 'a/b'"),
    (KeyboardInterrupt(), 130, "stopped"),
])
def test_a_failure_is_a_line_and_a_code(error: BaseException, code: int, said: str,
                                        failing: Callable[[BaseException], None], deltaw: Run) -> None:
    failing(error)
    assert deltaw("merge") == (code, "", f"deltaw merge: {said}\n")


def test_debug_shows_the_traceback(failing: Callable[[BaseException], None], deltaw: Run) -> None:
    failing(DataError("bad row"))
    with pytest.raises(DataError, match="bad row"):
        deltaw("merge", "--debug")


def test_only_deltaws_own_warnings_are_shown_once_and_on_a_line(monkeypatch: pytest.MonkeyPatch, deltaw: Run) -> None:
    def run(options: object) -> None:
        for _ in range(2):
            warnings.warn_explicit("the disk is\nfull", UserWarning, merge_verb.__file__, 1)
        warnings.warn_explicit("not for you", UserWarning, "/site-packages/other/library.py", 1)

    monkeypatch.setattr(merge_verb, "run", run)
    assert deltaw("merge") == (0, "", "warning: the disk is full\n")


def test_warnings_are_as_before_afterwards(deltaw: Run) -> None:
    before = warnings.showwarning, list(warnings.filters)
    deltaw("merge")
    assert (warnings.showwarning, list(warnings.filters)) == before


@pytest.mark.parametrize(("arguments", "said"), [
    (["trian"], f"deltaw: 'trian' is no verb; expected one of {', '.join(VERBS)}. Did you mean train?"),
    (["train", "--lerning-rate", "1"], "deltaw train: --lerning-rate: unknown option. Did you mean --learning-rate?"),
    (["train", "--r=x"], "deltaw train: --r: got 'x'; expected a whole number"),
    (["train", "--epochs", "many"], "deltaw train: --epochs: got 'many'; expected a number"),
    (["train", "--schedule", "cosin"], "--schedule: got 'cosin'; expected linear or cosine or constant. Did you mean "
     "cosine?"),
    (["train", "--betas", "0.9"], "--betas: got '0.9'; expected 2 values with a comma between them"),
    (["train", "--columns", "prompt"], "--columns: got 'prompt'; expected key=value"),
    (["train", "--columns", "{x"], "expected JSON"),
    (["train", "--model", "m", "--data", "d", "--out", "o", "--init-lora-weights", "gausian"],
     "--init-lora-weights: got 'gausian'; expected True, False, \"gaussian\""),
    (["train", "--max-length", "long"], "--max-length: got 'long'; expected a whole number or none"),
    (["train", "stray"], "'stray': unexpected argument"),
    (["train", "--model"], "--model: expected one argument"),
    (["train"], "deltaw train: --model: is missing; expected a value"),
    ([*TRAIN, "--r", "0"], "deltaw train: --r: got 0; expected a whole number"),
    ([*TRAIN, "--metrics", "acuracy"], "Did you mean accuracy?"),
    ([*TRAIN, "--target-modules", "re:("], "--target-modules: got '('; expected a regular expression"),
    (["generate", "--temperature", "-1", "hello"], "--temperature: got -1.0; expected 0 <= temperature < 100"),
    (["generate", "--model", "m", "--compare", "hello"], "--compare: there is nothing to compare"),
    (["generate", "--model", "m", " "], "PROMPT: is empty"),
    (["eval", "--model", "m"], "--data: is missing"), (["eval", "--data", "d"], "--model: is missing"),
    (["eval", "--data", "d", "--model", "m", "--metrics", "f2"], "--metrics: got 'f2'; expected of exact_match, "
     "accuracy, f1"),
    (["eval", "--data", "d", "--model", "m", "--batch-size", "0"], "--batch-size: got 0; expected a whole number >= 1"),
    (["chat"], "--model: is missing"),
    (["chat", "--adapter", "a=x", "--adapter", "a=y"], "the name 'a' stands twice"),
    (["chat", "--adapter", "=x"], "--adapter: got '=x'"),
    (["merge"], "deltaw merge: --out: is missing; expected a folder"),
])
def test_a_wrong_command_line_ends_with_2(arguments: list[str], said: str, deltaw: Run) -> None:
    code, out, err = deltaw(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    if arguments[0] != "trian":
        assert err.endswith(f"`deltaw {arguments[0]} --help` lists the options.\n")


def test_all_faults_of_a_command_line_are_told_at_once(deltaw: Run) -> None:
    _, _, err = deltaw("train", "--lerning-rate", "1", "--r", "x", "--schedule", "cosin", "--bad")
    assert [word in err for word in ("--lerning-rate", "--r:", "--schedule", "--bad")] == [True] * 4


def test_the_script_that_is_installed_is_this_function(repo: Path) -> None:
    import tomllib

    scripts = tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts == {"deltaw": "deltaw.cli.main:main"}
