"""vLLM's side of `benchmarks/serve.py`, which starts it with the Python of an environment where vLLM is installed.

    python benchmarks/serve_vllm.py MODEL_FOLDER ADAPTERS_FOLDER NAMES ROWS TOKENS DTYPE

Reads words from stdin, `base` or `lora`, and answers each with a line: tokens a second of ROWS requests of TOKENS
greedy tokens that come at once, with the base or with a different adapter each. It imports nothing of deltaw.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def main(model: str, adapters: str, names: list[str], rows: int, tokens: int, dtype: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(model=model, dtype=dtype, skip_tokenizer_init=True, enable_lora=bool(names),
                 max_loras=max(1, len(names)), max_lora_rank=8, max_model_len=512, max_num_seqs=rows,
                 gpu_memory_utilization=0.2, enable_prefix_caching=False)
    requests = [LoRARequest(name, i + 1, str(Path(adapters) / name)) for i, name in enumerate(names)]

    def run(what: str, seed: int, tokens: int = tokens) -> float:
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": random.Random(seed + i).choices(range(1000, 40000), k=32)} for i in range(rows)]
        begin = time.perf_counter()
        out = engine.generate(prompts, params, use_tqdm=False,
                              lora_request=[requests[i % len(names)] for i in range(rows)] if what == "lora" else None)
        assert all(len(one.outputs[0].token_ids) == tokens for one in out)
        return rows * tokens / (time.perf_counter() - begin)

    run("base", 0, 8), names and run("lora", 0, 8)
    print("ready", flush=True)
    for seed, line in enumerate(sys.stdin):
        print(run(line.strip(), 100 * (seed + 1)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3].split(",") if sys.argv[3] else [], int(sys.argv[4]), int(sys.argv[5]),
         sys.argv[6])
