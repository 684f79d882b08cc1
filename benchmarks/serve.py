"""Throughput and latency of serving many adapters, beside transformers' and PEFT's padded batches.

    python benchmarks/serve.py            SmolLM2-135M's shapes, 16 clients, 64 new tokens, greedy, r=8 on all linear
    python benchmarks/serve.py --full     closed loop with 1, 4, 16 and 64 clients and 1, 16 and 256 adapters, open loop

Rounds alternate, base and adapters and rivals, and medians are compared. fp32 where the processor has no fast bf16
(there a bf16 product is emulated, and tells nothing). Ours runs in process, as the server runs it, without HTTP.
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


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args()
    rounds = 1 if options.quick else 3
    tokens = 24 if options.quick else options.tokens
    with tempfile.TemporaryDirectory() as folder:
        paths = write_adapters(Path(folder), options.rank, 16, REGISTERED)
        service = open_bench(paths, places=64 if options.full else 16)
        rivals = Rivals(paths, tokens)
        cases = main_cases(service, rivals, tokens, rounds, list(paths))
        if options.full:
            more(service, tokens, list(paths))
        service.close()
    return min(1, report("serve", cases))


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


def open_bench(paths: Mapping[str, Path], *, places: int) -> Service:
    base = bases.Base(model=smollm2_shaped(torch.float32), tokenizer=Words(), source="smollm2", kind="folder",  # type: ignore[arg-type]
                      folder=None, dtype=torch.float32, dtype_reason="measured")
    service = build(ServeConfig(model="smollm2", context=512, places=places, adapter_memory=512), base)
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

    def __init__(self, paths: Mapping[str, Path], tokens: int) -> None:
        from peft import PeftModel

        self.base: Any = smollm2_shaped(torch.float32)
        self.names = list(paths)[:16]
        inner: Any = smollm2_shaped(torch.float32)
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


def main_cases(service: Service, rivals: Rivals, tokens: int, rounds: int, names: list[str]) -> list[Case]:
    sixteen = [{name: 1.0} for name in names[:16]]
    speeds: dict[str, list[float]] = {}

    def note(label: str, speed: float) -> None:
        speeds.setdefault(label, []).append(speed)
        print(f"  {label}: {speed:.1f}", flush=True)

    together(service, [{}] * 16, 4), together(service, sixteen, 4)
    equal = check(service, rivals, names)
    draw = zipf(names)
    for _ in range(rounds):
        note("base", together(service, [{}] * 16, tokens))
        note("16 adapters", together(service, sixteen, tokens))
        note("1000 zipf", closed(service, 16, 32, draw, tokens))
        note("one base", together(service, [{}], tokens))
        note("transformers", rivals.generate(rivals.base, 16, tokens)[0])
        note("transformers one", rivals.generate(rivals.base, 1, tokens)[0])
        note("peft", rivals.generate(rivals.mixed, 16, min(tokens, 16), adapter_names=rivals.names)[0])
        merged = to_be_merged(service, names[0])
        note("merged", together(service, [{names[0]: 1.0}], tokens))
        service.engine.call(merged).result()
        note("first loaded", 1e3 * first_token(service, names[0]))
        note("first unloaded", 1e3 * first_token(service, unloaded(service, names)))
    m = {label: statistics.median(values) for label, values in speeds.items()}
    return [
        Case("16 adapters / base", "tok/s", m["16 adapters"], m["base"], "ours, base", 0.85, "higher", equal=equal),
        Case("1,000 registered, Zipf / 16 adapters", "tok/s", m["1000 zipf"], m["16 adapters"], "ours, 16", 0.8,
             "higher"),
        Case("base, 16 rows", "tok/s", m["base"], m["transformers"], "transformers", 1.0, "higher", equal=equal),
        Case("16 adapters", "tok/s", m["16 adapters"], m["peft"], "peft mixed", 5.0, "higher", equal=equal),
        Case("one stream", "tok/s", m["one base"], m["transformers one"], "transformers", 2.0, "higher", equal=equal),
        Case("one stream, merged / base", "tok/s", m["merged"], m["one base"], "ours, base", 0.98, "higher"),
        Case("first token, not loaded - loaded", "ms", m["first unloaded"] - m["first loaded"], 1.0, "(limit 50 ms)",
             50, "lower", limit=50),
        Case("bytes of an idle adapter", "bytes", service.idle_bytes, 1.0, "(limit 10,000)", 10_000, "lower",  # type: ignore[attr-defined]
             limit=10_000),
    ]


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


def to_be_merged(service: Service, name: str) -> Callable[[], None]:
    """Merge an adapter by hand; what undoes it."""
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
    return end


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
