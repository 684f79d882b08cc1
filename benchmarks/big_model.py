"""QLoRA on a 7B-shaped Llama in less than 10 GB of memory, loading included, on two cores without a GPU.

    python benchmarks/big_model.py [--quick] [--folder FOLDER] [--keep] [--tokens 128] [--steps 3]

Writes a Llama with random bf16 weights in shards, one layer at a time (13.5 GB of disk; removed at the end), then
trains in a fresh process: nf4 with double quantization, every linear layer, r=8, layers computed again in the backward
pass. The peak is what the kernel says that process ever held (VmHWM), libraries, reading and quantizing included.
`--quick` is a shape of 0.2 billion parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from pairs import Case, report

GIB = 1 << 30
SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "vocab_size": 32000},
    "small": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
              "vocab_size": 32000},
}
WORDS = [f"w{i}" for i in range(1000)]


def tensors(shape: dict[str, int], generator: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
    """The weights of a Llama, one part of the network at a time."""
    wide, inner, vocabulary = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]

    def drawn(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16).uniform_(-0.035, 0.035, generator=generator)

    def ones() -> torch.Tensor:
        return torch.ones(wide, dtype=torch.bfloat16)

    yield {"model.embed_tokens.weight": drawn(vocabulary, wide)}
    for i in range(shape["num_hidden_layers"]):
        at = f"model.layers.{i}."
        yield {f"{at}input_layernorm.weight": ones(), f"{at}post_attention_layernorm.weight": ones(),
               **{f"{at}self_attn.{n}_proj.weight": drawn(wide, wide) for n in "qkvo"},
               **{f"{at}mlp.{n}_proj.weight": drawn(inner, wide) for n in ("gate", "up")},
               f"{at}mlp.down_proj.weight": drawn(wide, inner)}
    yield {"model.norm.weight": ones(), "lm_head.weight": drawn(vocabulary, wide)}


def write_model(folder: Path, shape: dict[str, int]) -> int:
    """Write the model folder, a shard for each part; returns its bytes."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    count, places, total = shape["num_hidden_layers"] + 2, {}, 0
    for i, part in enumerate(tensors(shape, torch.Generator().manual_seed(0))):
        name = f"model-{i + 1:05}-of-{count:05}.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
        total += sum(t.nbytes for t in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = LlamaConfig(**shape, dtype="bfloat16", tie_word_embeddings=False, max_position_embeddings=2048,
                         architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *WORDS])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>", bos_token="<s>")
    made.save_pretrained(folder)
    return total


def write_examples(file: Path, tokens: int, rows: int) -> None:
    """Rows of random words, each as long as the other."""
    generator = torch.Generator().manual_seed(1)
    picks = torch.randint(0, len(WORDS), (rows, tokens - 1), generator=generator).tolist()
    file.write_text("".join(json.dumps({"text": " ".join(WORDS[i] for i in row)}) + "\n" for row in picks))


def child(folder: Path, tokens: int, steps: int) -> None:
    """Train in this process and print what it took."""
    import deltaw
    from deltaw.bases import load_base

    write_examples(folder / "rows.jsonl", tokens, steps + 1)
    began = time.perf_counter()
    load: dict[str, Any] = {}

    def timed(*args: Any, **kwargs: Any) -> Any:
        base = load_base(*args, **kwargs)
        load.update(seconds=time.perf_counter() - began, peak=high_water())
        return base

    deltaw.bases.load_base = timed
    result = deltaw.train(deltaw.TrainConfig(
        model=str(folder), data=str(folder / "rows.jsonl"), out=str(folder / "adapter"), quantize="nf4", dtype="fp32",
        lora=deltaw.LoraConfig(r=8, target_modules="all-linear"), gradient_checkpointing="layer", batch_size=1,
        max_steps=steps, max_length=tokens, eval_rows=1, eval_every=0, samples=0, packing="off", compile="off",
        train_on="all", valid=str(folder / "rows.jsonl"), doctor_steps=2, save_every=0, keep_best=None))
    print(json.dumps({"peak": high_water(), "load_peak": load["peak"], "load_seconds": load["seconds"],
                      "step_seconds": result.train_seconds / result.steps, "seconds": time.perf_counter() - began,
                      "losses": [row["loss"] for row in result.curve if row["event"] == "step"],
                      "checks": result.checks}))


def high_water() -> int:
    """The most bytes that this process has held."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> int:
    """Write, train, report, remove."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a shape of 0.2 billion parameters")
    parser.add_argument("--folder", type=Path, help="where to write the model, by default a temporary folder")
    parser.add_argument("--keep", action="store_true", help="keep the model that was written")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--child", action="store_true")
    args = parser.parse_args()
    if args.child:
        child(args.folder, args.tokens, args.steps)
        return 0
    folder = args.folder or Path(tempfile.mkdtemp(prefix="deltaw-7b-"))
    try:
        stored = write_model(folder, SHAPES["small" if args.quick else "7b"])
        print(f"wrote {stored / GIB:.1f} GiB of bf16 weights")
        command = [sys.executable, __file__, "--child", "--folder", str(folder), "--tokens", str(args.tokens),
                   "--steps", str(args.steps)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=dict(os.environ))
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"loaded and quantized in {found['load_seconds']:.0f} s, peak then {found['load_peak'] / GIB:.2f} GiB; a "
          f"step of {args.tokens} tokens {found['step_seconds']:.1f} s; all of it {found['seconds']:.0f} s; losses "
          f"{', '.join(f'{loss:.3f}' for loss in found['losses'])}")
    limit = 10e9 if not args.quick else stored
    case = Case("peak of QLoRA, loading included / the limit", "GB", found["peak"] / 1e9, limit / 1e9,
                "10 GB" if not args.quick else "the bf16 weights", 1.0 if not args.quick else 3.0)
    return report("big_model", [case]) and 0


if __name__ == "__main__":
    raise SystemExit(main())
