"""How long `deltaw plan` takes on a 70B shape, imports included, and how much memory.

    python benchmarks/plan_speed.py [--quick] [--model llama3-70b]

Each run is a fresh process; the first, which compiles bytecode as an installation does, is not counted. Beside it
stands what importing torch and transformers' Llama takes alone, which a plan cannot do without.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from pairs import Case, report

IMPORTS = "import torch; from transformers import LlamaForCausalLM"


def main() -> int:
    """Plan for a GPU that is not here, so that nothing depends on this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one counted run")
    parser.add_argument("--model", default="llama3-70b", help="a published shape's name")
    args = parser.parse_args()
    plan = ["-m", "deltaw.cli.main", "plan", "--model", args.model, "--device", "h100", "--json"]
    found = {}
    with tempfile.TemporaryDirectory() as bytecode:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        times: dict[str, list[float]] = {"plan": [], "imports": []}
        for turn in range(2 if args.quick else 6):
            for name, words in (("plan", plan), ("imports", ["-c", IMPORTS])):
                begin = time.perf_counter()
                done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True,
                                      check=True)
                seconds = time.perf_counter() - begin
                if turn:
                    times[name].append(seconds)
                    print(f"  {name}: {seconds:.2f} s", flush=True)
                if name == "plan":
                    found = json.loads(done.stdout)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    ours, imports = (statistics.median(values) for values in times.values())
    equal = found["parameters"] > 60e9
    return report("plan_speed", [
        Case(f"deltaw plan --model {args.model}", "s", ours, 1.0, "(limit 5 s)", 5.0, limit=5.0, equal=equal),
        Case("beside the imports alone", "s", ours, imports, "imports", 2.0, equal=equal),
        Case("its peak memory", "GB", peak / 1e9, 1.0, "(limit 1 GB)", 1.0, limit=1.0, equal=equal)]) and 0


if __name__ == "__main__":
    raise SystemExit(main())
