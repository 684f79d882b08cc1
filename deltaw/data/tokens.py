"""Long columns of numbers that grow in memory and move to a temporary file when they get large."""

from __future__ import annotations

import tempfile
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deltaw.errors import DataError, Fault


class Column:
    """Numbers of one dtype, appended in pieces and then read as one array.

    Up to `limit` bytes are held in memory. Beyond it they are written to a temporary file that has no name and
    vanishes with the process, and the array that `finish` gives is mapped from there.
    """

    def __init__(self, dtype: type[np.generic], limit: int) -> None:
        self._dtype, self._limit = np.dtype(dtype), limit
        self._pending = bytearray()
        self._file: IO[bytes] | None = None

    def append(self, values: ArrayLike) -> None:
        """Add these numbers at the end."""
        self._pending += np.asarray(values, dtype=self._dtype).tobytes()
        if len(self._pending) > self._limit:
            self._flush()

    def finish(self) -> NDArray[Any]:
        """All numbers as one array, in memory or mapped from the file."""
        if self._file is None:
            return np.frombuffer(self._pending, dtype=self._dtype)
        self._flush()
        mapped = np.memmap(self._file, dtype=self._dtype, mode="r")
        self.close()
        return mapped

    def close(self) -> None:
        """Let go of the temporary file; an array that is mapped from it keeps its content."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _flush(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="deltaw-")  # noqa: SIM115 - closed by close()
            self._file.write(self._pending)
            self._file.flush()
        except OSError as error:
            raise DataError(Fault(f"temporary file in {tempfile.gettempdir()}", f"cannot be written: {error.strerror}",
                                  "room for 5 bytes a token", "Set TMPDIR to a folder with room")) from error
        self._pending = bytearray()
