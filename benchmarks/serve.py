"""Throughput and latency of serving many adapters, beside transformers' and PEFT's padded batches.

    python benchmarks/serve.py            SmolLM2-135M's shapes, 16 clients, 64 new tokens, greedy, r=8 on all linear
    python benchmarks/serve.py --full     closed loop with 1, 4, 16 and 64 clients and 1, 16 and 256 adapters, open loop
    python benchmarks/serve.py --vllm OTHER_ENV/bin/python --vllm-dtype bfloat16      vLLM too, where it is installed

Rounds alternate, base and adapters and rivals, and medians are compared. Weights are bfloat16 numbers, as SmolLM2's
were published, and ours, transformers and PEFT compute with them in fp32 (where the processor has no fast bf16, a bf16
product is emulated, and slower); adapters are fp32. `--weights fp32` takes weights that need 32 bits; `--weights bf16`
holds everything of ours, adapters too, in bfloat16. Ours runs in process, as the server runs it, without HTTP.
The closed loop: each client asks again as soon as it is answered. The open loop: requests come at random times
(Poisson), however many are under way.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from pairs import Case, report, smollm2_shaped

import deltaw
from deltaw import bases
from deltaw.serve.config import ServeConfig
from deltaw.serve.request import Event, SamplingParams
from deltaw.serve.service import Service, build

PROMPT, REGISTERED, ZIPF = 32, 1000, 1.1


class Words:
    """A tokenizer of numbers: what is measured is the engine."""

    chat_template, eos_token_id, all_special_ids, model_max_length = None, None, (), 10**30

    def decode(self, tokens: Sequence[int], **_: object) -> str:
        return "".join(f" {token}" for token in tokens)


MAIN = ("base", "16 adapters", "1000 zipf", "one base", "one adapter", "transformers", "transformers one", "peft",
        "first loaded", "first unloaded")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", choices=("published", "fp32", "bf16"), default="published")
    parser.add_argument("--kernel", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", nargs="+", default=list(MAIN), metavar="LABEL", help=f"of {', '.join(MAIN)}, merged")
    parser.add_argument("--vllm", metavar="PYTHON")
    parser.add_argument("--vllm-dtype", default="bfloat16")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    tokens = 24 if options.quick else options.tokens
    with tempfile.TemporaryDirectory() as folder:
        paths = write_adapters(Path(folder), options.rank, 16, REGISTERED)
        service = open_bench(paths, places=64 if options.full else 16, weights=options.weights, kernel=options.kernel)
        print(service.says, flush=True)
        vllm = Vllm(options.vllm, options.vllm_dtype, Path(folder), list(paths)[:16], tokens) if options.vllm else None
        cases = main_cases(service, Rivals(paths, tokens, options.weights), vllm, tokens, rounds, list(paths),
                           options.only)
        if options.full:
            more(service, tokens, list(paths))
        service.close()
        if vllm is not None:
            vllm.close()
    return min(1, report("serve", cases))


def base_model(weights: str) -> torch.nn.Module:
    model = smollm2_shaped(torch.float32)
    return model if weights == "fp32" else model.bfloat16() if weights == "bf16" else model.bfloat16().float()


def write_adapters(folder: Path, rank: int, different: int, total: int) -> dict[str, Path]:
    """Adapters with random factors; beyond the first ones they share files on disk, and nothing in memory."""
    model = smollm2_shaped(torch.float32)
    config = deltaw.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
    paths: dict[str, Path] = {}
    for i in range(total):
        name = f"a{i}"
        paths[name] = folder / name
        if i < different:
            torch.manual_seed(i)
            board = deltaw.attach(model, config, name="x")
            for tensor in board.parameters("x").values():
                tensor.data.normal_(std=0.05)
            board.adapter("x").save(paths[name])
            deltaw.detach(model)
        else:
            shutil.copytree(paths[f"a{i % different}"], paths[name], copy_function=os.link)
    return paths


def open_bench(paths: Mapping[str, Path], *, places: int, weights: str = "published", kernel: bool = True) -> Service:
    model: Any = base_model(weights)
    base = bases.Base(model=model, tokenizer=Words(), source="smollm2", kind="folder",  # type: ignore[arg-type]
                      folder=None, dtype=model.dtype, dtype_reason="measured")
    service = build(ServeConfig(model="smollm2", context=512, places=places, adapter_memory=512, any_base=True,
                                kernel=kernel), base)
    tracemalloc.start()
    for name, path in paths.items():
        service.engine.pool.register(name, path)
    service.idle_bytes = tracemalloc.get_traced_memory()[0] / len(paths)  # type: ignore[attr-defined]
    tracemalloc.stop()
    service.engine.start()
    return service


def prompt(seed: int) -> list[int]:
    return random.Random(seed).choices(range(1000, 40000), k=PROMPT)


class Client(threading.Event):
    """Waits for one answer, and notes when its first token came."""

    def __init__(self, service: Service, mix: Mapping[str, float], tokens: int, seed: int) -> None:
        super().__init__()
        self.written: list[int] = []
        self.began, self.first, self.last = time.perf_counter(), 0.0, 0.0
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        service.submit(prompt(seed), mix, params, [self.take])

    def take(self, event: Event) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.written += event.tokens
        if event.finish:
            assert event.finish == "length", event
            self.set()


_seeds = itertools.count()


def together(service: Service, mixes: Sequence[Mapping[str, float]], tokens: int) -> float:
    """Tokens a second of requests that come at once, prompts included."""
    begin = time.perf_counter()
    clients = [Client(service, mix, tokens, next(_seeds)) for mix in mixes]
    for client in clients:
        client.wait()
    return len(mixes) * tokens / (time.perf_counter() - begin)


def closed(service: Service, clients: int, requests: int, choose: Callable[[], Mapping[str, float]],
           tokens: int) -> float:
    """Tokens a second of clients that ask again as soon as they are answered."""
    left = iter(range(requests))
    lock = threading.Lock()

    def ask() -> None:
        while True:
            with lock:
                if next(left, None) is None:
                    return
                mix = choose()
            Client(service, mix, tokens, next(_seeds)).wait()

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return requests * tokens / (time.perf_counter() - begin)


def zipf(names: Sequence[str], seed: int = 0) -> Callable[[], dict[str, float]]:
    """Draws of an adapter; the k-th most popular with a probability of 1 / k^1.1."""
    rng, weights = random.Random(seed), [1 / (k + 1) ** ZIPF for k in range(len(names))]
    return lambda: {rng.choices(names, weights)[0]: 1.0}


class Rivals:
    """transformers' `generate` and PEFT's mixed batch, 16 rows, padded, each with its own static settings."""

    def __init__(self, paths: Mapping[str, Path], tokens: int, weights: str) -> None:
        from peft import PeftModel

        self.base: Any = base_model(weights).float()
        self.names = list(paths)[:16]
        inner: Any = base_model(weights).float()
        self.mixed: Any = None
        for name in self.names:
            if self.mixed is None:
                self.mixed = PeftModel.from_pretrained(inner, paths[name], adapter_name=name)
            else:
                self.mixed.load_adapter(paths[name], adapter_name=name)
        self.mixed.eval()
        self.tokens = tokens

    @torch.inference_mode()
    def generate(self, model: Any, rows: int, tokens: int, **options: Any) -> tuple[float, list[list[int]]]:
        """Tokens a second, and the tokens."""
        ids = torch.tensor([prompt(seed) for seed in range(rows)])
        begin = time.perf_counter()
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                             min_new_tokens=tokens, pad_token_id=0, eos_token_id=None, **options)
        return rows * tokens / (time.perf_counter() - begin), out[:, PROMPT:].tolist()


class Vllm:
    """vLLM in a process of its own."""

    def __init__(self, python: str, dtype: str, folder: Path, names: list[str], tokens: int) -> None:
        model: Any = base_model("bf16")
        model.save_pretrained(folder / "base")
        script = Path(__file__).parent / "serve_vllm.py"
        self.process = subprocess.Popen(
            [python, str(script), str(folder / "base"), str(folder), ",".join(names), "16", str(tokens), dtype],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder)
        self._until("ready")

    def run(self, what: str) -> float:
        """Tokens a second of `base` or `lora`."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return float(self._until(""))

    def _until(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == word or (not word and line.strip().replace(".", "", 1).isdigit()):
                return line
        raise SystemExit("vLLM ended")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def main_cases(service: Service, rivals: Rivals, vllm: Vllm | None, tokens: int, rounds: int, names: list[str],
               only: Sequence[str]) -> list[Case]:
    sixteen = [{name: 1.0} for name in names[:16]]
    draw = zipf(names)
    measures: dict[str, Callable[[], float]] = {
        "base": lambda: together(service, [{}] * 16, tokens),
        "16 adapters": lambda: together(service, sixteen, tokens),
        "1000 zipf": lambda: closed(service, 16, 32, draw, tokens),
        "one base": lambda: together(service, [{}], tokens),
        "one adapter": lambda: together(service, sixteen[:1], tokens),
        "transformers": lambda: rivals.generate(rivals.base, 16, tokens)[0],
        "transformers one": lambda: rivals.generate(rivals.base, 1, tokens)[0],
        "peft": lambda: rivals.generate(rivals.mixed, 16, min(tokens, 16), adapter_names=rivals.names)[0],
        "merged": lambda: merged(service, names[0], tokens),
        "first loaded": lambda: 1e3 * first_token(service, names[0]),
        "first unloaded": lambda: 1e3 * first_token(service, unloaded(service, names)),
    }
    chosen = {label: measures[label] for label in only}
    if vllm is not None:
        chosen |= {"vllm base": lambda: vllm.run("base"), "vllm lora": lambda: vllm.run("lora")}
    together(service, [{}] * 16, 4), together(service, sixteen, 4)
    equal = check(service, rivals, names) if service.base.dtype == torch.float32 else True
    speeds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for label, measure in chosen.items():
            speeds.setdefault(label, []).append(measure())
            print(f"  {label}: {speeds[label][-1]:.1f}", flush=True)
    return compared({label: statistics.median(values) for label, values in speeds.items()}, service, equal)


def compared(m: dict[str, float], service: Service, equal: bool) -> list[Case]:
    """The table's rows, of what was measured."""
    rows = [("16 adapters / base", "16 adapters", "base", 0.85),
            ("1,000 registered, Zipf / 16 adapters", "1000 zipf", "16 adapters", 0.8),
            ("base, 16 rows", "base", "transformers", 1.0), ("16 adapters", "16 adapters", "peft", 5.0),
            ("one stream", "one base", "transformers one", 2.0),
            ("one stream, merged / base", "merged", "one base", 0.98),
            ("one stream, adapter / base", "one adapter", "one base", 0.95),
            ("base, 16 rows", "base", "vllm base", 1.0), ("16 adapters", "16 adapters", "vllm lora", 2.0)]
    cases = [Case(name, "tok/s", m[ours], m[rival], rival, target, "higher", equal=equal)
             for name, ours, rival, target in rows if ours in m and rival in m]
    if "first loaded" in m and "first unloaded" in m:
        cases.append(Case("first token, not loaded - loaded", "ms", m["first unloaded"] - m["first loaded"], 1.0,
                          "(limit 50 ms)", 50, "lower", limit=50))
    idle: float = service.idle_bytes  # type: ignore[attr-defined]
    return [*cases, Case("bytes of an idle adapter", "bytes", idle, 1.0, "(limit 10,000)", 10_000, "lower",
                         limit=10_000)]


def check(service: Service, rivals: Rivals, names: list[str]) -> bool:
    """Whether the first tokens of a mixed batch are PEFT's, and those of the base transformers'."""
    clients = [Client(service, {name: 1.0}, 8, i) for i, name in enumerate(names[:16])]
    plain = [Client(service, {}, 8, i) for i in range(16)]
    for client in (*clients, *plain):
        client.wait()
    same = [c.written for c in clients] == rivals.generate(rivals.mixed, 16, 8, adapter_names=rivals.names)[1]
    return same and [c.written for c in plain] == rivals.generate(rivals.base, 16, 8)[1]


def first_token(service: Service, name: str) -> float:
    client = Client(service, {name: 1.0}, 1, next(_seeds))
    client.wait()
    return client.first - client.began


def unloaded(service: Service, names: list[str]) -> str:
    pool = service.engine.pool
    return next(name for name in reversed(names) if pool.entry(name).loaded is None)


def merged(service: Service, name: str, tokens: int) -> float:
    """Tokens a second of one stream of an adapter that is merged by hand."""
    from deltaw.inject import find_sites
    from deltaw.serve.merging import AutoMerge

    engine: Any = service.engine
    merge = AutoMerge(service.base.model, find_sites(service.base.model), after=0.0)  # type: ignore[arg-type]

    def begin() -> None:
        blend = ((engine.pool.resolve(name), 1.0),)
        merge.merge(blend, engine.factors(blend))
        service.banks.merged = blend

    def end() -> None:
        merge.undo()
        service.banks.merged = None

    engine.call(begin).result()
    together(service, [{name: 1.0}], 2)
    speed = together(service, [{name: 1.0}], tokens)
    engine.call(end).result()
    together(service, [{}], 2)
    return speed


def more(service: Service, tokens: int, names: list[str]) -> None:
    """The whole table: clients by adapters in the closed loop, and waiting in the open loop."""
    for clients in (1, 4, 16, 64):
        for adapters in (1, 16, 256):
            speed = closed(service, clients, 2 * clients, zipf(names[:adapters]), tokens)
            print(f"closed loop, {clients:2} clients, {adapters:3} adapters: {speed:7.1f} tok/s", flush=True)
    for rate in (1.0, 4.0):
        rng, draw, clients_ = random.Random(0), zipf(names[:256]), []
        for _ in range(24):
            time.sleep(rng.expovariate(rate))
            clients_.append(Client(service, draw(), tokens, next(_seeds)))
        for client in clients_:
            client.wait()
        waits = sorted(1e3 * (c.first - c.began) for c in clients_)
        print(f"open loop, {rate:g} requests/s, 256 adapters: first token {statistics.median(waits):.0f} ms median, "
              f"{waits[int(0.95 * len(waits))]:.0f} ms at 95 %", flush=True)


if __name__ == "__main__":
    sys.exit(main())
