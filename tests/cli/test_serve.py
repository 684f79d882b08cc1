"""`deltaw serve` as a process: ready, answers, `deltaw chat --url`, SIGTERM; and what it refuses."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deltaw.errors import BaseModelError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def process(base: Path, adapters: dict[str, Path], repo: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of "yes" and "no", and its address."""
    folder = adapters["yes"].parent
    started = subprocess.Popen(
        [sys.executable, "-m", "deltaw.cli.main", "serve", "--model", str(base), "--served-name", "tiny", "--adapters",
         str(folder), "--port", "0", "--json", "--dtype", "fp32", "--threads", "1", "--context", "64"],
        cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watch = threading.Timer(100, started.kill)
    watch.start()
    try:
        assert started.stdout is not None
        yield started, json.loads(started.stdout.readline())["url"]
    finally:
        watch.cancel()
        started.kill()
        started.communicate()


def test_a_folder_of_adapters_is_served_talked_to_and_stopped(
        process: tuple[subprocess.Popen[str], str], deltaw: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    started, url = process
    monkeypatch.setattr("sys.stdin", io.StringIO("is the sky blue ?\n/use no\n/reset\nis the sky blue ?\n/use nob\n"
                                                 "/list\n/use yes=2 no=-0.5\n/reset\nis the sky blue ?\n"))
    code, out, err = deltaw("chat", "--url", url, "--model", "yes", "--max-new-tokens", 4)
    assert (code, out.split()) == (0, ["yes", "no", "yes"])
    assert "Did you mean no" in err
    assert "* no" in err
    asked: dict[str, Any] = {"model": "no", "prompt": "hello", "max_tokens": 50, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        started.send_signal(signal.SIGTERM)  # what is under way ends, and then the process does
        rest = [line for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert started.wait(30) == 0


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (["--adapters", "nowhere"], 2, "--adapters: 'nowhere' does not exist"), ([], 2, "--model: is missing"),
    (["--model", "x", "--allow-runtime-loading"], 2, "--adapter-root"),
    (["--model", "x", "--places", "0"], 2, "--places: got 0"),
    (["--model", "x", "--engine", "vllm", "--quantize", "nf4"], 2, "--quantize: is nf4, which --engine vllm cannot be"),
    (["--model", "x", "--engine", "vllm"], 1, "vLLM is not installed"),
])
def test_what_is_wrong_is_said_before_a_weight_is_loaded(arguments: list[str], code: int, said: str, deltaw: Run,
                                                         monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    got, out, err = deltaw("serve", *(["--model", "x"] if arguments[:1] == ["--adapters"] else []), *arguments)
    assert (got, out) == (code, "")
    assert said in err


def test_vllm_gets_the_same_adapters_names_and_address(adapters: dict[str, Path], deltaw: Run, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "vllm"
    program.write_text(f"#!{sys.executable}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    started: list[Any] = []
    monkeypatch.setattr(os, "execvpe", lambda *arguments: started.extend(arguments))
    code, _, err = deltaw("serve", "--model", "some/base", "--engine", "vllm", "--port", 9001, "--api-key", "secret",
                          "--adapters", adapters["yes"].parent)
    assert code == 0
    path, words, environment = started
    assert path == sys.executable
    assert words[1:9] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "some/base", "--host", "127.0.0.1",
                          "--port", "9001"]
    modules = [json.loads(word) for word in words[words.index("--lora-modules") + 1:]]
    assert modules == [{"name": name, "path": str(adapters[name])} for name in ("no", "yes")]
    assert environment["VLLM_API_KEY"] == "secret"
    assert "secret" not in " ".join(words) + err


def test_vllm_opens_what_is_kept_of_a_gguf_file(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub ids and folders go through as they are; a GGUF file as the safetensors folder it was converted to."""
    from deltaw.serve.vllm import openable

    assert [openable(model) for model in ("owner/name", str(base))] == ["owner/name", str(base)]
    file = tmp_path / "some.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr("deltaw.bases.gguf.converted", lambda *_: None)
    monkeypatch.setattr("deltaw.bases.gguf.convert", lambda file, dtype: (base, None, None))
    assert openable(str(file)) == str(base)
    monkeypatch.setattr("deltaw.bases.gguf.convert", lambda file, dtype: (None, None, None))
    with pytest.raises(BaseModelError, match="could not be kept"):
        openable(str(file))


def test_a_url_that_nobody_answers(deltaw: Run) -> None:
    code, _, err = deltaw("chat", "--url", "http://127.0.0.1:9")
    assert code == 1
    assert "cannot be reached" in err
    code, _, err = deltaw("chat", "--url", "localhost:8000")
    assert code == 1
    assert "expected http://ADDRESS:PORT" in err
