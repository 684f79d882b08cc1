"""The rivals of `serve.py`: transformers' `generate`, PEFT's mixed batch, and vLLM in a process of its own."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pairs import finish
from shapes import model_of

PROMPT = 32
_seeds = itertools.count(1_000_000)


def base_model(weights: str) -> torch.nn.Module:
    model = model_of("smollm2", torch.float32).eval()
    return model if weights == "fp32" else model.bfloat16() if weights == "bf16" else model.bfloat16().float()


def prompt(seed: int) -> list[int]:
    return random.Random(seed).choices(range(1000, 40000), k=PROMPT)


@dataclass(frozen=True)
class Parting:
    """Where two answers part: at which token, and transformers' logits of ours and theirs."""

    row: int
    place: int
    ours: float
    theirs: float

    @property
    def is_tie(self) -> bool:
        """Whether the order of a sum can decide which of the two is larger."""
        return abs(self.ours - self.theirs) < 1e-3

    def __str__(self) -> str:
        return (f"answer {self.row} parts at token {self.place}, where the logits are {self.ours:.6f} and "
                f"{self.theirs:.6f}: {'a tie' if self.is_tie else 'NO TIE'}")


class Rivals:
    """transformers' `generate` and PEFT's mixed batch: rows of one length, so that nothing is padded."""

    def __init__(self, paths: Mapping[str, Path], weights: str, dtype: torch.dtype = torch.float32,
                 device: str = "cpu") -> None:
        from peft import PeftModel

        self.device = device
        self.base: Any = base_model(weights).to(device, dtype)
        self.names = list(paths)[:16]
        inner: Any = base_model(weights).to(device, dtype)
        own = {"autocast_adapter_dtype": dtype == torch.float32}  # in bf16 adapters are too, and nothing is converted
        self.mixed: Any = None
        for name in self.names:
            if self.mixed is None:
                self.mixed = PeftModel.from_pretrained(inner, paths[name], adapter_name=name, **own)
            else:
                self.mixed.load_adapter(paths[name], adapter_name=name, **own)
        self.mixed.eval()

    @torch.inference_mode()
    def generate(self, adapters: int, rows: int, tokens: int, *,
                 cache: str | None = None) -> tuple[float, list[list[int]]]:
        """Tokens a second of transformers (0 adapters) or of so many adapters in PEFT's mixed batch; and the tokens.

        With the cache "static" on a GPU transformers compiles its steps at the first call.
        """
        model = self.mixed if adapters else self.base
        options = {"adapter_names": [self.names[i % adapters] for i in range(rows)]} if adapters else {}
        options |= {} if cache is None else {"cache_implementation": cache}
        ids = torch.tensor([prompt(seed) for seed in range(rows)], device=self.device)
        finish(self.device)
        begin = time.perf_counter()
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                             min_new_tokens=tokens, pad_token_id=0, eos_token_id=None, **options)
        finish(self.device)
        return rows * tokens / (time.perf_counter() - begin), out[:, PROMPT:].tolist()

    @torch.inference_mode()
    def parting(self, adapted: bool, row: int, one: list[int], other: list[int]) -> Parting:
        """Where two answers to a prompt part, and the model's logits of the two tokens there."""
        place = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
        ids = torch.tensor([prompt(row) + one[:place]], device=self.device)
        logits_V = (self.mixed(ids, adapter_names=[self.names[row]]) if adapted else self.base(ids)).logits[0, -1]
        return Parting(row, place, float(logits_V[one[place]]), float(logits_V[other[place]]))


class Vllm:
    """vLLM in a process of its own, asked line by line."""

    def __init__(self, python: str, dtype: str, folder: Path, names: list[str], places: int) -> None:
        self.dtype = dtype
        model: Any = base_model("bf16")
        model.save_pretrained(folder / "base")
        script = Path(__file__).parent / "serve_vllm.py"
        self.process = subprocess.Popen(
            [python, str(script), str(folder / "base"), str(folder), ",".join(names), str(places), dtype],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder)
        self._answer()

    def run(self, adapters: int, rows: int, tokens: int, seed: int | None = None) -> tuple[float, list[list[int]]]:
        """Tokens a second of so many requests at once, on the base or on so many adapters in turn, and the tokens."""
        assert self.process.stdin is not None
        asked = {"adapters": adapters, "rows": rows, "tokens": tokens, "seed": next(_seeds) if seed is None else seed}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        found = self._answer()
        return found["speed"], found["tokens"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # what vLLM itself prints is passed over
                found: dict[str, Any] = json.loads(line)
                return found
        raise SystemExit("vLLM ended")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
