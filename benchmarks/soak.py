"""Soak: a live server under random clients that cancel, load, unload and send nonsense, for a while.

    python benchmarks/soak.py --seconds 600      with the tiny model of the tests; `--quick` for 20 seconds

Every answer is checked against the greedy answer of the same prompt and adapter alone, made beforehand by transformers
and PEFT. At the end nothing may be left: no place taken, no adapter pinned, no memory grown. Only loopback is used.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from deltaw.serve.service import Service, open_service
from tests.cli.conftest import WORDS, write_base
from tests.serve.conftest import SHAPES, config, live, write_adapter

Mix = tuple[tuple[str, float], ...]
Expected = dict[tuple[Mix, str], str]
BLENDS: tuple[Mix, ...] = ((("small", 0.7), ("wide", -0.3)), (("wide", 0.5), ("head", 1.5), ("scaled", 1.0)))
PROMPTS = ["is the sky blue ?", "hello", "the sea is green", "world is the sky is the sea is the grass is the world"]
TOKENS = 16
DAMAGED = "damaged"
GROWTH_MIB = 60
REPORT_S = 60
NONSENSE: list[dict[str, Any]] = [
    {"model": "nobody", "prompt": "x"}, {"model": "tiny"}, {"model": "tiny", "prompt": "x", "max_tokens": 10**9},
    {"model": "tiny", "prompt": [10**6]}, {"model": "tiny", "prompt": "x", "temprature": 1}]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), 20 if options.quick else options.seconds, options.clients, options.seed)
    print(json.dumps({"benchmark": "soak", **found}))
    return 0 if found["ok"] else 1


def soak(folder: Path, seconds: float, clients: int, seed: int) -> dict[str, Any]:
    """Counts of what happened, what was wrong, and what was left."""
    base = write_base(folder / "base")
    root = folder / "adapters"
    paths = {name: write_adapter(base, root / name, i, **fields) for i, (name, fields) in enumerate(SHAPES.items())}
    damaged = shutil.copytree(paths["wide"], root / DAMAGED) / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    settings = config(base, places=5, allow_runtime_loading=True, adapter_root=str(root), adapter_memory=1,
                      auto_merge=1e-9)  # whoever is alone for two steps is merged
    expected = {(mix, prompt): answer for mix in ((), *(((name, 1.0),) for name in paths), *BLENDS)
                for prompt, answer in alone(base, {paths[name]: weight for name, weight in mix}).items()}
    with open_service(settings, {}) as service:
        for name, path in paths.items():
            service.engine.pool.register(name, path)
        service.engine.pool.budget = 40_000  # not enough for all, so that they come and go
        with live(service) as url:
            return run(service, url, expected, seconds, clients, seed)


def alone(base: Path, adapters: dict[Path, float]) -> dict[str, str]:
    """The greedy answers of transformers and PEFT to each prompt, with these adapters at these weights."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for i, adapter in enumerate(adapters):
        if i:
            model.load_adapter(adapter, adapter_name=adapter.name)
        else:
            model = PeftModel.from_pretrained(model, adapter, adapter_name=adapter.name)
    if adapters:
        model.base_model.set_adapter([adapter.name for adapter in adapters])
        for layer in [m for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]:
            for adapter, weight in adapters.items():
                if adapter.name in layer.scaling:
                    layer.scaling[adapter.name] *= weight
    return {prompt: greedy(model.eval(), prompt) for prompt in PROMPTS}


def greedy(model: Any, prompt: str) -> str:
    ids = [WORDS.index(word) for word in prompt.split()]
    start = len(ids)
    with torch.no_grad():
        for _ in range(TOKENS):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    special = ("<unk>", "<|im_start|>", "<|im_end|>", "<pad>")
    return " ".join(WORDS[token] for token in ids[start:] if WORDS[token] not in special)


def run(service: Service, url: str, expected: Expected, seconds: float, clients: int,
        seed: int) -> dict[str, Any]:
    done: Counter[str] = Counter()
    wrong: list[str] = []
    end = time.monotonic() + seconds
    threads = [threading.Thread(target=client, args=(url, expected, end, random.Random(seed + i), done, wrong))
               for i in range(clients)]
    warm = threading.Timer(min(seconds / 3, 60), lambda: done.update(rss_warm=resident()))
    warm.start()
    for thread in threads:
        thread.start()
    while (left_s := end - time.monotonic()) > 0:
        time.sleep(min(left_s, REPORT_S))
        told = ", ".join(f"{kind} {count}" for kind, count in sorted(done.items()) if kind != "rss_warm")
        print(f"  {max(0, end - time.monotonic()):.0f} s left: {told}, wrong {len(wrong)}", file=sys.stderr, flush=True)
    for thread in threads:
        thread.join()
    warm.join()
    time.sleep(1)
    growth = (resident() - done.pop("rss_warm")) / 2**20
    left = {"running": len(service.engine.scheduler.running), "waiting": service.engine.scheduler.waiting,
            "places_taken": len(service.engine.scheduler.places.all) - len(service.engine.scheduler.places.free),
            "pinned": sum(entry.pins for entry in service.engine.pool._by_number.values()),
            "being_read": len(service.engine.ahead._asked)}
    ok = not wrong and not any(left.values()) and growth < GROWTH_MIB and done["right"] > 0
    return {"ok": ok, "seconds": seconds, "done": dict(done), "wrong": dict(Counter(wrong).most_common(5)),
            "left": left, "merges": service.engine._merge.merges if service.engine._merge else 0,
            "growth_mib": round(growth, 1), "loads": service.engine.pool.loads,
            "evictions": service.engine.pool.evictions}


def client(url: str, expected: Expected, end: float, rng: random.Random, done: Counter[str],
           wrong: list[str]) -> None:
    """One client: mostly questions, sometimes something else."""
    kinds = [ask] * 4 + [stream] * 2 + [leave, nonsense, reload, spoil, rest]
    with httpx.Client(base_url=url, timeout=900) as http:
        while time.monotonic() < end:
            try:
                done[rng.choice(kinds)(http, expected, rng)] += 1
            except AssertionError as error:
                wrong.append(str(error))
            except Exception as error:
                wrong.append(repr(error))


def question(mix: Mix, prompt: str) -> dict[str, Any]:
    """A request for the greedy answer: the base, an adapter by its name, or a blend."""
    named = mix[0][0] if len(mix) == 1 and mix[0][1] == 1 else "tiny"
    blend = {} if named != "tiny" or not mix else {"lora": [{"id": name, "scale": weight} for name, weight in mix]}
    return {"model": named, "prompt": prompt, "temperature": 0, "ignore_eos": True, "max_tokens": TOKENS} | blend


def check(got: str, mix: Mix, prompt: str, answer: str) -> None:
    assert got.split() == answer.split(), f"{mix}, {prompt!r}: {got!r} instead of {answer!r}"


def ask(http: httpx.Client, expected: Expected, rng: random.Random) -> str:
    (mix, prompt), answer = rng.choice(list(expected.items()))
    reply = http.post("/v1/completions", json=question(mix, prompt))
    if reply.status_code == 404:  # unloaded just now
        return "unloaded"
    assert reply.status_code == 200, reply.text
    check(reply.json()["choices"][0]["text"], mix, prompt, answer)
    return "right blend" if len(mix) > 1 else "right"


def stream(http: httpx.Client, expected: Expected, rng: random.Random) -> str:
    (mix, prompt), answer = rng.choice(list(expected.items()))
    with http.stream("POST", "/v1/completions", json=question(mix, prompt) | {"stream": True}) as reply:
        if reply.status_code == 404:
            return "unloaded"
        assert reply.status_code == 200, reply.read()
        events = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert events[-1] == "[DONE]", events[-1]
    check("".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]), mix, prompt, answer)
    return "right stream"


def rest(http: httpx.Client, expected: object, rng: random.Random) -> str:
    """Ask for nothing for a while, so that others are alone at times."""
    time.sleep(rng.random() / 5)
    return "rested"


def leave(http: httpx.Client, expected: Expected, rng: random.Random) -> str:
    """Read a few events of a stream, then go."""
    mix, prompt = rng.choice(list(expected))
    name = question(mix, prompt)["model"]
    with http.stream("POST", "/v1/completions", json={"model": name, "prompt": prompt, "stream": True,
                                                      "max_tokens": 40, "n": 2}) as reply:
        lines = reply.iter_lines()
        for _ in range(rng.randrange(4)):
            next(lines, None)
    return "left"


def nonsense(http: httpx.Client, expected: object, rng: random.Random) -> str:
    status = http.post("/v1/completions", json=rng.choice(NONSENSE)).status_code
    assert status in (400, 404), status
    return "refused"


def reload(http: httpx.Client, expected: object, rng: random.Random) -> str:
    name = rng.choice(list(SHAPES))
    status = http.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code
    assert status in (200, 404), status
    reply = http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": name,
                                                     "load_inplace": rng.random() < 0.5})
    assert reply.status_code == 200 or reply.json()["error"]["code"] == "already_loaded", reply.text
    return "reloaded"


def spoil(http: httpx.Client, expected: object, rng: random.Random) -> str:
    """Load what is no adapter, is damaged, or lies outside."""
    path = rng.choice([DAMAGED, "nowhere", "../base", "/etc"])
    reply = http.post("/v1/load_lora_adapter", json={"lora_name": f"bad{rng.random()}", "lora_path": path})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "adapter_refused"), reply.text
    return "spoilt"


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


if __name__ == "__main__":
    sys.exit(main())
