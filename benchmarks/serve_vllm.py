"""vLLM's side of `benchmarks/serve.py`, which starts it with the Python of an environment where vLLM is installed.

    python benchmarks/serve_vllm.py MODEL_FOLDER ADAPTERS_FOLDER NAMES PLACES DTYPE

Reads lines from stdin, {"adapters": 16, "rows": 16, "tokens": 64, "seed": 0}, and answers each with a line: tokens a
second of so many greedy requests that come at once, on the base (0 adapters) or on the adapters in turn, and what was
written. It imports nothing of deltaw.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def main(model: str, adapters: str, names: list[str], places: int, dtype: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(model=model, dtype=dtype, skip_tokenizer_init=True, enable_lora=bool(names),
                 max_loras=min(16, max(1, len(names))), max_cpu_loras=max(1, len(names)), max_lora_rank=8,
                 max_model_len=512, max_num_seqs=places, gpu_memory_utilization=0.2, enable_prefix_caching=False)
    known = [LoRARequest(name, i + 1, str(Path(adapters) / name)) for i, name in enumerate(names)]

    def run(adapters: int, rows: int, tokens: int, seed: int) -> tuple[float, list[list[int]]]:
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": random.Random(seed + i).choices(range(1000, 40000), k=32)} for i in range(rows)]
        chosen = [known[i % adapters] for i in range(rows)] if adapters else None
        begin = time.perf_counter()
        out = engine.generate(prompts, params, use_tqdm=False, lora_request=chosen)
        seconds = time.perf_counter() - begin
        written = [list(one.outputs[0].token_ids) for one in out]
        assert all(len(row) == tokens for row in written)
        return rows * tokens / seconds, written

    for adapters_ in (0, min(16, len(known))):
        run(adapters_, 16, 8, 0)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        speed, written = run(**asked)
        print(json.dumps({"speed": speed, "tokens": written}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3].split(",") if sys.argv[3] else [], int(sys.argv[4]), sys.argv[5])
