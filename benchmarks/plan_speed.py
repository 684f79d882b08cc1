"""How long `deltaw plan` takes on a 70B shape, imports included, and how much memory: cold and warm.

    python benchmarks/plan_speed.py [--quick] [--model llama3-70b]

Each run is a fresh process; the first, which compiles bytecode as an installation does, is not counted. Four calls:

    as shipped   the first plan in an empty home, with a plan's own batch and length: the package carries its answers
    otherwise    the first at another batch, length and rank: the package carries the form of its answers
    walked       the first with other targets: the network is laid out and followed
    kept         the same once more

The equality check is that `walked` and `kept` print the same bytes. Beside them stands what importing torch and
transformers' Llama takes alone, which a walk cannot do without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from pairs import Case, report

IMPORTS = "import torch; from transformers import LlamaForCausalLM"

OTHERWISE = ["--batch-size", "3", "--max-length", "768", "--r", "16"]
WALKED = ["--target-modules", "q_proj,v_proj"]


def main() -> int:
    """Plan for a GPU that is not here, so that nothing depends on this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one counted run")
    parser.add_argument("--model", default="llama3-70b", help="a published shape's name")
    args = parser.parse_args()
    plan = ["-m", "deltaw.cli.main", "plan", "--model", args.model, "--device", "h100", "--json"]
    calls = {"as shipped": plan, "otherwise": [*plan, *OTHERWISE], "walked": [*plan, *WALKED], "kept": [*plan, *WALKED],
             "imports": ["-c", IMPORTS]}
    times: dict[str, list[float]] = {name: [] for name in calls}
    said, peaks = dict.fromkeys(calls, ""), dict.fromkeys(calls, 0.0)
    with tempfile.TemporaryDirectory() as bytecode:
        for turn in range(2 if args.quick else 6):
            with tempfile.TemporaryDirectory() as home:
                environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode, "DELTAW_HOME": home}
                environment.pop("PYTHONDONTWRITEBYTECODE", None)
                for name, words in calls.items():
                    seconds, peaks[name], said[name] = timed(words, environment)
                    if turn:
                        times[name].append(seconds)
                        print(f"  {name}: {seconds:.2f} s", flush=True)
    shipped, otherwise, walked, kept, imports = (statistics.median(values) for values in times.values())
    equal = said["walked"] == said["kept"] and json.loads(said["as shipped"])["parameters"] > 60e9
    limited = {"limit": 5.0, "equal": equal}
    return report("plan_speed", [
        Case(f"first plan of {args.model}, as shipped", "s", shipped, 1.0, "(limit 5 s)", 5.0, **limited),
        Case("first plan at another batch, length and rank", "s", otherwise, 1.0, "(limit 5 s)", 5.0, **limited),
        Case("first plan with other targets, walked", "s", walked, 1.0, "(limit 5 s)", 5.0, **limited),
        Case("the same once more, kept", "s", kept, 1.0, "(limit 5 s)", 5.0, **limited),
        Case("walked, beside the imports alone", "s", walked, imports, "imports", 2.0, equal=equal),
        Case("its peak memory, walked", "GB", peaks["walked"] / 1e9, 1.0, "(limit 1 GB)", 1.0, limit=1.0,
             equal=equal)]) and 0


def timed(words: list[str], environment: dict[str, str]) -> tuple[float, float, str]:
    """Seconds, peak bytes and output of a fresh process."""
    with tempfile.TemporaryFile("w+") as out:
        begin = time.perf_counter()
        child = subprocess.Popen([sys.executable, *words], env=environment, stdout=out, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - begin
        if status:
            raise RuntimeError(f"{words} ended with {status}")
        child.returncode = 0
        out.seek(0)
        return seconds, used.ru_maxrss * 1024, out.read()


if __name__ == "__main__":
    raise SystemExit(main())
