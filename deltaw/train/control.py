"""A folder that a running set watches: files in it add, cancel, pause and resume jobs.

    control/more.yaml      a jobs file; its tasks join the set (move it in whole: `mv`, not an editor)
    control/NAME.cancel    end the job NAME; `.pause` and `.resume` likewise. The file may be empty: `touch` makes one

What was obeyed moves to `control/done/`, what was refused to `control/refused/` with the reason beside it in a `.txt`.
A folder needs no port and no protocol, works over ssh, and leaves a trace of what was asked.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from deltaw.errors import DataError, DeltawError, Fault, StateError, near
from deltaw.train.announce import say
from deltaw.train.job_checks import check_jobs, of_job
from deltaw.train.jobs_file import read_jobs

if TYPE_CHECKING:
    from deltaw.train.many import TrainMany

VERBS = ("cancel", "pause", "resume")


class Control:
    """The control folder of one set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "control"
        self.folder.mkdir(parents=True, exist_ok=True)

    def obey(self, many: TrainMany) -> None:
        """Do what the files ask, the oldest first; one that asks for what cannot be is refused, and nothing stops."""
        asked = [path for path in self.folder.iterdir() if path.is_file() and not path.name.startswith(".")]
        for path in sorted(asked, key=lambda p: (p.stat().st_mtime_ns, p.name)):
            try:
                self._action(path, many)()
            except Exception as error:  # whatever a file makes go wrong, the jobs at work go on
                reason = str(error) if isinstance(error, DeltawError) else f"{type(error).__name__}: {error}"
                self._put_away(path, "refused", reason)
                say(f"control/{path.name} refused: {reason}", many.quiet)
            else:
                self._put_away(path, "done")
                say(f"control/{path.name} done", many.quiet)

    def _action(self, path: Path, many: TrainMany) -> Callable[[], None]:
        suffix = path.suffix.removeprefix(".")
        if suffix in ("yaml", "yml", "json"):
            return lambda: _add(path, many)
        actions: dict[str, Callable[[str], None]] = {"cancel": many.cancel, "pause": many.pause, "resume": many.resume}
        if suffix not in actions:
            raise StateError(Fault(f"control/{path.name}", f"has the ending '.{suffix}'",
                                   "a .yaml jobs file, or NAME." + ", NAME.".join(VERBS), near(suffix, VERBS)))
        return lambda: actions[suffix](path.stem)

    def _put_away(self, path: Path, where: str, reason: str = "") -> None:
        target = self.folder / where
        target.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # somebody took it back
            path.replace(target / path.name)
        if reason:
            (target / f"{path.name}.txt").write_text(reason + "\n", encoding="utf-8")


def _add(path: Path, many: TrainMany) -> None:
    """Let the tasks of a jobs file join: values and data of all are looked at before the first of them does."""
    if not hasattr(many, "loader"):
        raise StateError(Fault(f"control/{path.name}", "all jobs of the set have ended", "a set at work",
                               "Start a new set with these tasks"))
    jobs = read_jobs(path, base=many.first).jobs
    check_jobs([*many.given, *jobs], resume=many.config.resume, at_work=[job.name for job in many.given])
    faults: list[Fault | str] = []
    for job in jobs:
        try:
            many.loader.examples(job.config)  # kept for `add`
        except DeltawError as error:
            faults += of_job(job, error)
    if faults:
        raise DataError(*faults)
    for number, job in enumerate(jobs):
        try:
            many.add(job)
        except DeltawError as error:
            before = [f"joined before it: {', '.join(one.name for one in jobs[:number])}"] if number else []
            raise StateError(*of_job(job, error), *before) from error
