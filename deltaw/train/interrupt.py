"""Ctrl-C in a training run: the first finishes the step and saves, the second ends at once."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any


class TrainInterrupted(KeyboardInterrupt):
    """The run was stopped by SIGINT after its state was saved. `checkpoint` is None where checkpoints are off."""

    def __init__(self, step: int, checkpoint: Path | None) -> None:
        self.step, self.checkpoint = step, checkpoint
        saved = f"saved to {checkpoint}; go on with resume" if checkpoint else "nothing was saved (save_every is 0)"
        super().__init__(f"stopped at step {step}, {saved}")


class Interrupt:
    """Within it SIGINT sets `requested` once; after that the handler from before is back.

    Does nothing outside the main thread, where Python delivers no signals, and where SIGINT is ignored: a shell starts
    commands in the background so, and the Ctrl-C of another command is not meant for them.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None
        self._ours = (threading.current_thread() is threading.main_thread()
                      and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN)

    def __enter__(self) -> Interrupt:
        if self._ours:
            self._before = signal.signal(signal.SIGINT, self._first)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, self._before)

    def _first(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._before)
