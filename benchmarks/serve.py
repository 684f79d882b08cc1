"""Throughput and latency of serving many adapters, beside transformers' and PEFT's padded batches.

    python benchmarks/serve.py            SmolLM2-135M's shapes, 16 clients, 64 new tokens, greedy, r=8 on all linear
    python benchmarks/serve.py --full     the same in two rounds, a closed loop with 1, 4, 16 and 64 clients on the base
                                          and on 1, 16 and 256 adapters, and an open loop; a quarter of an hour
    python benchmarks/serve.py --vllm OTHER_ENV/bin/python --vllm-dtype bfloat16      vLLM too, where it is installed
    python benchmarks/serve.py --device cuda --dtype bf16

Rounds alternate, base and adapters and rivals, and medians are compared. Weights are bfloat16 numbers, as SmolLM2's
were published. With `--dtype fp32` ours, transformers and PEFT compute with them in fp32 (where the processor has no
fast bf16, a bf16 product is emulated, and slower), and adapters are fp32; with `--dtype bf16` all sides hold and
compute everything in bfloat16, adapters too. There answers part at ties, and equality is looked at in fp32 before.
`--weights fp32` takes weights that need 32 bits; `--weights bf16` holds everything of ours alone in bfloat16. Ours runs
in process, as the server runs it, without HTTP. On a GPU transformers runs with its static cache too, compiled.
The closed loop: each client asks again as soon as it is answered. The open loop: requests come at random times
(Poisson), however many are under way. transformers and PEFT have no requests that come, but batches: in the closed loop
they get as many rows at once as there are clients, in the open loop whatever came while the batch before was computed.
PEFT has 16 adapters at most, for it keeps all in memory; transformers has the base. A first token is the median of 20
requests for an adapter that is not loaded, in turns with 20 for one that is.
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
from pairs import Case, report
from serve_rivals import Rivals, Vllm, base_model, prompt
from shapes import model_of
from where import add_options, chosen

import deltaw
from deltaw import bases
from deltaw.serve.config import ServeConfig
from deltaw.serve.request import Event, SamplingParams
from deltaw.serve.service import Service, build

REGISTERED, ZIPF = 1000, 1.1


class Words:
    """A tokenizer of numbers: what is measured is the engine."""

    chat_template, eos_token_id, all_special_ids, model_max_length = None, None, (), 10**30
    bos_token = eos_token = None

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": []}

    def get_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, tokens: Sequence[int], **_: object) -> str:
        return "".join(f" {token}" for token in tokens)


FIRST, OPEN = 20, 16
LOOP_TOKENS = 24
MAIN = ("base", "16 adapters", "1000 zipf", "one base", "one adapter", "transformers", "transformers one", "peft",
        "first token", "merged", "static", "static one")
CHECKED = 24
"""Tokens of each answer that are compared."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", choices=("published", "fp32", "bf16"))
    parser.add_argument("--kernel", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", nargs="*", default=list(MAIN), metavar="LABEL", help=f"of {', '.join(MAIN)}")
    parser.add_argument("--vllm", metavar="PYTHON")
    parser.add_argument("--vllm-dtype", default="bfloat16")
    add_options(parser, dtype="fp32")
    options = parser.parse_args()
    dtype, device = chosen(options), options.device
    weights = options.weights or ("bf16" if dtype == torch.bfloat16 else "published")
    rounds = 1 if options.quick else 2 if options.full else options.rounds
    tokens = 24 if options.quick else options.tokens
    places = 64 if options.full else 16
    with tempfile.TemporaryDirectory() as folder:
        paths = write_adapters(Path(folder), options.rank, 16, REGISTERED)
        names = list(paths)
        vllm = Vllm(options.vllm, options.vllm_dtype, Path(folder), names[:256], places) if options.vllm else None
        equal = {}
        if dtype == torch.bfloat16:
            wide = open_bench(dict(itertools.islice(paths.items(), 16)), places=places, device=device,
                              kernel=options.kernel)
            print(f"equality, in fp32: {wide.says}", flush=True)
            equal = check(wide, Rivals(paths, "published", device=device), vllm, names)
            wide.close()
        service = open_bench(paths, places=places, weights=weights, kernel=options.kernel, device=device)
        print(service.says, flush=True)
        rivals = Rivals(paths, weights, dtype, device)
        found = check(service, rivals, vllm, names)
        equal = equal or found
        cases = main_cases(service, rivals, vllm, tokens, rounds, names, options.only, equal)
        if options.full:
            cases += closed_loop(service, rivals, vllm, min(tokens, LOOP_TOKENS), names, equal)
            cases += open_loop(service, rivals, min(tokens, LOOP_TOKENS), names, equal)
        service.close()
        if vllm is not None:
            vllm.close()
    return min(1, report("serve", cases))


def write_adapters(folder: Path, rank: int, different: int, total: int) -> dict[str, Path]:
    """Adapters with random factors; beyond the first ones they share files on disk, and nothing in memory."""
    model = model_of("smollm2", torch.float32).eval()
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


def open_bench(paths: Mapping[str, Path], *, places: int, weights: str = "published", kernel: bool = True,
               device: str = "cpu") -> Service:
    model: Any = base_model(weights).to(device)
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


def main_cases(service: Service, rivals: Rivals, vllm: Vllm | None, tokens: int, rounds: int, names: list[str],
               only: Sequence[str], equal: Mapping[str, bool]) -> list[Case]:
    sixteen = [{name: 1.0} for name in names[:16]]
    draw = zipf(names)
    measures: dict[str, Callable[[], float]] = {
        "base": lambda: together(service, [{}] * 16, tokens),
        "16 adapters": lambda: together(service, sixteen, tokens),
        "1000 zipf": lambda: closed(service, 16, 32, draw, tokens),
        "one base": lambda: together(service, [{}], tokens),
        "one adapter": lambda: together(service, sixteen[:1], tokens),
        "transformers": lambda: rivals.generate(0, 16, tokens)[0],
        "transformers one": lambda: rivals.generate(0, 1, tokens)[0],
        "peft": lambda: rivals.generate(16, 16, min(tokens, 16))[0],
        "static": lambda: rivals.generate(0, 16, tokens, cache="static")[0],
        "static one": lambda: rivals.generate(0, 1, tokens, cache="static")[0],
    }
    if rivals.device == "cpu":  # where transformers does not compile, its static cache is slower than the other
        del measures["static"], measures["static one"]
    taken = {label: measures[label] for label in only if label in measures}
    if vllm is not None:
        taken |= {"vllm base": lambda: vllm.run(0, 16, tokens)[0], "vllm lora": lambda: vllm.run(16, 16, tokens)[0]}
    together(service, [{}] * 16, 4), together(service, sixteen, 4)
    for label in {"transformers", "transformers one", "peft", "static", "static one"} & taken.keys():
        taken[label]()  # the first call of each sets its libraries up
    speeds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for label, measure in taken.items():
            speeds.setdefault(label, []).append(measure())
            print(f"  {label}: {speeds[label][-1]:.1f}", flush=True)
    cases = compared({label: statistics.median(values) for label, values in speeds.items()}, service, equal)
    if "first token" in only:
        cases.append(first_tokens(service, names))
    if "merged" in only and service.base.dtype == torch.float32 and "16 bits" in service.says:
        print("  merged: left out, since merged weights need 32 bits where the base's are read in 16 (--weights bf16)")
    elif "merged" in only:
        ours, base = merged_beside_base(service, names[0], tokens, 4 * rounds)
        cases.append(Case("one stream, an adapter merged", "ms/tok", ours, base, "base", 1.02,
                          equal=equal["transformers"]))
    return cases


def compared(m: dict[str, float], service: Service, equal: Mapping[str, bool]) -> list[Case]:
    """The table's rows, of what was measured."""
    rows = [("16 adapters / base", "16 adapters", "base", 0.85, "peft"),
            ("1,000 registered, Zipf / 16 adapters", "1000 zipf", "16 adapters", 0.8, "peft"),
            ("base, 16 rows", "base", "transformers", 1.0, "transformers"),
            ("16 adapters", "16 adapters", "peft", 5.0, "peft"),
            ("base, 16 rows", "base", "static", 1.0, "transformers"),
            ("one stream", "one base", "static one", 1.0, "transformers"),
            ("one stream", "one base", "transformers one", 2.0, "transformers"),
            ("one stream, adapter / base", "one adapter", "one base", 0.95, "peft"),
            ("base, 16 rows", "base", "vllm base", 1.0, "vllm base"),
            ("16 adapters", "16 adapters", "vllm lora", 2.0, "vllm lora")]
    cases = [Case(name, "tok/s", m[ours], m[rival], rival, target, "higher", equal=equal[judge])
             for name, ours, rival, target, judge in rows if ours in m and rival in m]
    idle: float = service.idle_bytes  # type: ignore[attr-defined]
    return [*cases, Case("bytes of an idle adapter", "bytes", idle, 1.0, "(limit 10,000)", 10_000, "lower",
                         limit=10_000)]


def check(service: Service, rivals: Rivals, vllm: Vllm | None, names: list[str]) -> dict[str, bool]:
    """Whether 16 answers of the base are transformers' and vLLM's, and 16 of different adapters PEFT's and vLLM's.

    A model of random weights has near ties, and vLLM and a GPU add in another order: there an answer in fp32 may differ
    where transformers' logits of both tokens are within 1e-3. In bfloat16 vLLM has to give half of the first tokens.
    """
    mine: list[list[list[int]]] = []
    for mixes in ([{}] * 16, [{name: 1.0} for name in names[:16]]):
        clients = [Client(service, mix, CHECKED, i) for i, mix in enumerate(mixes)]
        for client in clients:
            client.wait()
        mine.append([client.written for client in clients])
    theirs = {"transformers": rivals.generate(0, 16, CHECKED)[1], "peft": rivals.generate(16, 16, CHECKED)[1]}
    if vllm is not None:
        theirs |= {"vllm base": vllm.run(0, 16, CHECKED, 0)[1], "vllm lora": vllm.run(16, 16, CHECKED, 0)[1]}
    found = {}
    for name, rows in theirs.items():
        own = mine[name in ("peft", "vllm lora")]
        whole = sum(a == b for a, b in zip(own, rows, strict=True))
        first = sum(a[0] == b[0] for a, b in zip(own, rows, strict=True))
        print(f"  as {name}: {whole} of 16 answers of {CHECKED} tokens, {first} of 16 first tokens", flush=True)
        if name.startswith("vllm") and vllm is not None and vllm.dtype != "float32":
            found[name] = first >= 8
        else:
            other_order = name.startswith("vllm") or rivals.device != "cpu"
            parted = [rivals.parting(name in ("peft", "vllm lora"), i, a, b)
                      for i, (a, b) in enumerate(zip(own, rows, strict=True)) if a != b]
            for part in parted:
                print(f"    {part}", flush=True)
            found[name] = not parted or (other_order and all(part.is_tie for part in parted))
    return found


def first_tokens(service: Service, names: list[str]) -> Case:
    """How much longer the first token of an adapter takes that is not loaded: medians, in turns."""
    waits: tuple[list[float], list[float]] = ([], [])
    first_token(service, names[0])
    for _ in range(FIRST):
        for wait, name in zip(waits, (names[0], unloaded(service, names)), strict=True):
            wait.append(1e3 * first_token(service, name))
    loaded, not_loaded = (statistics.median(wait) for wait in waits)
    print(f"  first token, ms: loaded {loaded:.1f} (least {min(waits[0]):.1f}), not loaded {not_loaded:.1f} "
          f"(least {min(waits[1]):.1f})", flush=True)
    return Case("first token, not loaded - loaded", "ms", not_loaded - loaded, 1.0, "(limit 50 ms)", 50, "lower",
                limit=50)


def first_token(service: Service, name: str) -> float:
    client = Client(service, {name: 1.0}, 1, next(_seeds))
    client.wait()
    return client.first - client.began


def unloaded(service: Service, names: list[str]) -> str:
    pool = service.engine.pool
    return next(name for name in reversed(names) if pool.entry(name).loaded is None)


def merged_beside_base(service: Service, name: str, tokens: int, turns: int) -> tuple[float, float]:
    """Milliseconds a token of one stream of an adapter that is merged by hand, and of the base: medians, in turns."""
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

    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns):
        for side in (0, 1) if turn % 2 else (1, 0):
            if side == 0:
                engine.call(begin).result()
            mix = {name: 1.0} if side == 0 else {}
            together(service, [mix], 2)
            times[side].append(1e3 / together(service, [mix], tokens))
            if side == 0:
                engine.call(end).result()
    return statistics.median(times[0]), statistics.median(times[1])


def closed_loop(service: Service, rivals: Rivals, vllm: Vllm | None, tokens: int, names: list[str],
                equal: Mapping[str, bool]) -> list[Case]:
    """Clients by adapters, drawn by Zipf's law (0 is the base), beside rivals that get as many rows at once."""
    cases = []
    for clients, adapters in itertools.product((1, 4, 16, 64), (0, 1, 16, 256)):
        case = f"closed loop, {clients} clients, {adapters or 'no'} adapters"
        choose = zipf(names[:adapters]) if adapters else dict[str, float]
        ours = closed(service, clients, 2 * clients, choose, tokens)
        theirs: dict[str, float] = {}
        if adapters <= 16:
            name = "peft" if adapters else "transformers"
            theirs[name] = rivals.generate(adapters, clients, min(tokens, 8) if adapters else tokens)[0]
        if vllm is not None:
            theirs["vllm lora" if adapters else "vllm base"] = vllm.run(adapters, clients, tokens)[0]
        print(f"  {case}: {ours:.1f} tok/s", *(f"{name} {speed:.1f}" for name, speed in theirs.items()), sep=", ",
              flush=True)
        cases += [Case(case, "tok/s", ours, speed, name, 1.0, "higher", equal=equal[name])
                  for name, speed in theirs.items()]
    return cases


def open_loop(service: Service, rivals: Rivals, tokens: int, names: list[str],
              equal: Mapping[str, bool]) -> list[Case]:
    """Requests that come at random times, however many are under way: how long first tokens and answers take."""
    cases = []
    for rate in (1.0, 4.0):
        rng, draw, clients = random.Random(0), zipf(names[:256]), []
        for _ in range(OPEN):
            time.sleep(rng.expovariate(rate))
            clients.append(Client(service, draw(), tokens, next(_seeds)))
        for client in clients:
            client.wait()
        case = f"open loop, {rate:g}/s, 256 adapters"
        firsts = sorted(1e3 * (client.first - client.began) for client in clients)
        cases += [Case(f"{case}: first token, {what}", "ms", wait, 1.0, "(for the record)", 60_000, "lower")
                  for what, wait in (("median", statistics.median(firsts)), ("95 %", firsts[int(0.95 * len(firsts))]))]
        if rate > 1:  # more than PEFT can keep up with
            continue
        answer = statistics.median(1e3 * (client.last - client.began) for client in clients)
        for adapters, name in ((0, "transformers"), (16, "peft")):
            theirs = statistics.median(1e3 * wait for wait in in_batches(rivals, adapters, rate, tokens))
            print(f"  {case}: an answer takes {answer:.0f} ms, {name}'s {theirs:.0f} ms", flush=True)
            cases.append(Case(f"{case}: answer, median", "ms", answer, theirs, name, 1.0, equal=equal[name]))
    return cases


def in_batches(rivals: Rivals, adapters: int, rate: float, tokens: int) -> list[float]:
    """Seconds from request to answer where a batch takes whatever came while the one before was computed."""
    rng = random.Random(0)
    arrivals = list(itertools.accumulate(rng.expovariate(rate) for _ in range(OPEN)))
    waits: list[float] = []
    begin = time.perf_counter()
    while len(waits) < OPEN:
        now = time.perf_counter() - begin
        time.sleep(max(0.0, arrivals[len(waits)] - now))
        now = time.perf_counter() - begin
        batch = [arrival for arrival in arrivals[len(waits):] if arrival <= now]
        rivals.generate(min(adapters, len(batch)), len(batch), tokens)
        waits += [time.perf_counter() - begin - arrival for arrival in batch]
    return waits


if __name__ == "__main__":
    sys.exit(main())
