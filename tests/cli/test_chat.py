"""`deltaw chat`: a script of questions and commands, with answers that show which adapter is on."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]


def talk(deltaw: Run, monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> tuple[int, list[str], str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(script))
    code, out, err = deltaw("chat", *arguments, "--max-new-tokens", 4)
    return code, [line.strip() for line in out.splitlines()], err


def test_adapters_are_switched_while_talking(deltaw: Run, base: Path, adapters: dict[str, Path],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
is the sky blue ?
/reset
/use no
is the sky blue ?
/off
/reset
is the sky blue ?
/use yes
/reset
is the sky blue ?
/quit
is the sky green ?
"""
    both = [f"--adapter={name}={path}" for name, path in adapters.items()]
    code, answers, err = talk(deltaw, monkeypatch, script, "--model", base, *both)
    assert code == 0
    assert answers[:2] == ["yes", "no"]
    assert answers[2] not in ("yes", "no")
    assert answers[3:] == ["yes"]
    assert "on: base; off: yes, no" in err
    assert "on: no; off: yes" in err


def test_adapters_are_added_listed_and_mixed(deltaw: Run, base: Path, adapters: dict[str, Path],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    script = (f"/add {adapters['no']}\n/add other={adapters['yes']}\n/use no=2 other=-0.5\n/list\n/reset\n"
              "is the sea blue ?\n")
    code, answers, err = talk(deltaw, monkeypatch, script, "--model", base)
    assert code == 0
    assert "added 'no'; /use no switches to it" in err
    assert "on: no=2 other=-0.5\n" in err
    assert answers == ["no"]


@pytest.mark.parametrize(("line", "said"), [
    ("/usse no", "/usse: is no command; expected one of /use"), ("/use", "/use: names no adapter"),
    ("/use noo", "adapter 'noo': is not attached; expected one of yes, no. Did you mean no?"),
    ("/use no=x", "/use: got 'no=x'; expected NAME or NAME=WEIGHT"), ("/add", "/add: got 0 words"),
    ("/add nowhere", "nowhere: does not exist"), ("/use 'no", "cannot be read"), ("/help", "/off"),
])
def test_a_slip_does_not_end_the_conversation(line: str, said: str, deltaw: Run, base: Path, adapters: dict[str, Path],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    both = [f"--adapter={name}={path}" for name, path in adapters.items()]
    code, answers, err = talk(deltaw, monkeypatch, f"{line}\nis the sky blue ?\n", "--model", base, *both)
    assert (code, answers) == (0, ["yes"])
    assert said in err


def test_what_was_said_is_part_of_the_prompt_until_it_no_longer_fits(deltaw: Run, base: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaw.cli.writing import Writer

    prompts: list[int] = []
    write = Writer.write
    monkeypatch.setattr(Writer, "write", lambda self, prompt, on_text: prompts.append(len(prompt)) or
                        write(self, prompt, on_text))
    code, answers, err = talk(deltaw, monkeypatch, "hello\nhello\n/reset\nhello\n", "--model", base)
    assert code == 0
    assert len(answers) == 3
    assert prompts[0] == prompts[2] < prompts[1]
    code, _, err = talk(deltaw, monkeypatch, "hello\n" * 12, "--model", base)
    assert code == 0
    assert max(prompts) + 4 <= 64
    assert "the model takes 64 tokens: the first" in err


def test_an_adapter_alone_brings_its_base_and_is_on(deltaw: Run, adapters: dict[str, Path],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    code, answers, err = talk(deltaw, monkeypatch, "is the sky blue ?", "--adapter", adapters["no"])
    assert (code, answers) == (0, ["no"])
    assert "on: no" in err


def test_a_base_without_a_chat_template(deltaw: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.cli.conftest import write_base

    code, answers, err = talk(deltaw, monkeypatch, "hello", "--model", write_base(tmp_path / "plain", template=None))
    assert (code, answers) == (1, [])
    assert "has no chat template" in err
