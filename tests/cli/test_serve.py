"""`deltaw serve` as a process: ready, answers, `deltaw chat --url`, SIGTERM; and what it refuses."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deltaw.errors import BaseModelError
from deltaw.serve import vllm
from deltaw.serve.config import ServeConfig

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
    assert started.stderr is not None
    assert f"serving tiny and 2 adapters at {url}" in started.stderr.read()


def test_each_option_is_told_to_vllm_or_known_to_be_ignored(tmp_path: Path) -> None:
    """Where a field changes neither vLLM's command nor its environment, it is one of those that are told as ignored."""
    plain: dict[str, Any] = {"model": "m", "adapter_root": str(tmp_path)}
    changed: dict[str, Any] = {"model": "n", "dtype": "fp32", "served_name": "s", "host": "::1", "port": 1,
                               "api_key": "k", "context": 5, "places": 3, "allow_runtime_loading": True}

    def told(**values: Any) -> Any:
        config = ServeConfig(**plain | values)
        return (vllm.command(config, {"a": tmp_path}, max_rank=8, python="python"), vllm.environment(config))

    assert {name for name, value in changed.items() if told() == told(**{name: value})} == set()
    refused = {"engine", "quantize"}
    assert {field.name for field in dataclasses.fields(ServeConfig)} - changed.keys() - refused == vllm.IGNORED


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (["--adapters", "nowhere"], 2, "--adapters: 'nowhere' does not exist"), ([], 2, "--model: is missing"),
    (["--model", "x", "--allow-runtime-loading"], 2, "--adapter-root"),
    (["--adapters", "poet="], 2, "--adapters: got 'poet='; expected NAME=FOLDER"),
    (["--adapters", "=nowhere"], 2, "--adapters: got '=nowhere'; expected NAME=FOLDER"),
    (["--model", "x", "--adapter-root", "nowhere", "--port", "0"], 1, "--adapter-root: 'nowhere' is no folder"),
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
                          "--adapters", adapters["yes"].parent, "--auto-merge", 5, "--drain", 9)
    assert code == 0
    assert "vLLM goes without --auto-merge, --drain, which" in err
    path, words, environment = started
    assert path == sys.executable
    assert words[1:9] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "some/base", "--host", "127.0.0.1",
                          "--port", "9001"]
    modules = [json.loads(word) for word in words[words.index("--lora-modules") + 1:]]
    assert modules == [{"name": name, "path": str(adapters[name])} for name in ("no", "yes")]
    assert environment["VLLM_API_KEY"] == "secret"
    assert "secret" not in " ".join(words) + err


def test_the_guides_manifest_starts_what_the_command_prints(repo: Path, tmp_path: Path) -> None:
    import yaml

    text = (repo / "docs" / "serve.md").read_text(encoding="utf-8").split("  ```yaml\n")[1].split("  ```\n")[0]
    parts = {part["kind"]: part for part in yaml.safe_load_all(textwrap.dedent(text))}
    pod = parts["Deployment"]["spec"]["template"]
    assert pod["metadata"]["labels"] == parts["Service"]["spec"]["selector"]
    assert list(parts["Secret"]["stringData"]) == ["VLLM_API_KEY"]
    container = pod["spec"]["containers"][0]
    assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in pod["spec"]["volumes"]}
    printed = vllm.command(ServeConfig(model="OWNER/BASE"), {"sql": tmp_path, "poet": tmp_path}, max_rank=16,
                           python="python")[3:]
    image = {"--host", "--port", "--dtype"}  # as the image has them
    wanted = {f"{word}={value}" for word, value in itertools.pairwise(printed)
              if word.startswith("--") and not value.startswith(("--", "{")) and word not in image}
    assert {word for word in container["args"] if "=" in word} == wanted
    assert "--enable-lora" in container["args"]
    modules = [json.loads(word) for word in container["args"] if not word.startswith("--")]
    assert modules == [{"name": name, "path": f"/adapters/{name}"} for name in ("sql", "poet")]


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
