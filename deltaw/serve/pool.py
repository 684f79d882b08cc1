"""The adapters that there are: registered by name and folder, in memory only while they are used.

An idle adapter is a record of some hundred bytes. It is read at the first request, kept while requests use it, and then
until the memory is needed, the one that was used longest ago first. Every registration has a number of its own, never
used again, and so has every new content of its folder: what was computed under a name before is not found under it
after. A request that began with the old content ends with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from sys import intern
from typing import Any, Generic, Protocol, TypeVar

from deltaw.errors import AdapterFileError, ConfigError, DeltawError, Fault, StateError, near
from deltaw.serve.request import Blend
from deltaw.store.locate import CONFIG_FILE, TENSORS_FILE, find_folder

MAX_CONFIG = 1_000_000


class Sized(Protocol):
    """What the pool keeps: anything that knows its size."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""


T = TypeVar("T", bound=Sized)
Check = Callable[[Path], object]
"""Raises AdapterFileError for a folder that may not be read; asked again each time before and after it is."""
Identity = tuple[int, int, int, int]


@dataclass(slots=True, eq=False)
class Entry(Generic[T]):
    """One registered adapter."""

    number: int
    name: str
    path: Path
    identity: Identity
    rank: int
    targets: tuple[str, ...]
    file_bytes: int
    created: int
    check: Check
    loaded: T | None = None
    pins: int = 0
    used: int = 0
    gone: bool = False
    """Unregistered, or replaced by new content; only requests that began before still use it."""


class Pool(Generic[T]):
    """Entries by name and by number; `load` reads and checks a folder."""

    def __init__(self, load: Callable[[Path], T], *, budget: int, on_gone: Callable[[int], None] = lambda number: None,
                 reserved: Iterable[str] = ()) -> None:
        self._load, self.budget, self._on_gone, self._reserved = load, budget, on_gone, frozenset(reserved)
        self._by_name: dict[str, Entry[T]] = {}
        self._by_number: dict[int, Entry[T]] = {}
        self._numbers = self._clock = 0
        self.loads = self.evictions = 0

    # -- which there are ---------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Registered names, in the order they came. May be asked from any thread: the copy is one step of Python's."""
        return tuple(self._by_name)

    @property
    def entries(self) -> tuple[Entry[T], ...]:
        """The entries of all names, as `names`."""
        return tuple(self._by_name.values())

    def entry(self, name: str) -> Entry[T]:
        """The entry of a name."""
        if name not in self._by_name:
            raise StateError(Fault(f"adapter '{name}'", "is not registered", "a name of /v1/models",
                                   near(name, self._by_name)))
        return self._by_name[name]

    def register(self, name: str, path: str | Path, check: Check = lambda folder: None) -> Entry[T]:
        """Note an adapter without reading its tensors; raises AdapterFileError or ConfigError for what is none."""
        return self._put(self.made(name, path, check))

    def made(self, name: str, path: str | Path, check: Check, *, replace: bool = False) -> Entry[T]:
        """An entry that is not registered: for `adopt`, once it has been read. `replace` takes over a name."""
        self._require_name(name, replace=replace)
        return self._made(name, Path(path), check)

    def adopt(self, entry: Entry[T], loaded: T, *, replace: bool = False, running: Collection[int] = ()) -> None:
        """Register an entry with what was read of it; StateError where somebody took its name meanwhile."""
        self._require_name(entry.name, replace=replace)
        self._put(entry)
        self.hold(entry, loaded, running)

    def _require_name(self, name: str, *, replace: bool = False) -> None:
        if not name or len(name) > 200 or not name.isprintable() or name in self._reserved:
            raise ConfigError(Fault(f"adapter name '{name}'", "cannot be used", "a printable name of at most 200 "
                                    "characters that is not the base's"))
        if name in self._by_name and not replace:
            raise StateError(Fault(f"adapter '{name}'", "is registered already", "a new name", "Unload it first"))

    def _put(self, entry: Entry[T]) -> Entry[T]:
        """Give an entry its name; requests that use what had it go on."""
        before = self._by_name.get(entry.name)
        self._by_name[entry.name] = self._by_number[entry.number] = entry
        if before is not None:
            self._retire(before)
        return entry

    def unregister(self, name: str) -> None:
        """Forget a name; requests that use it go on."""
        entry = self.entry(name)
        del self._by_name[name]
        self._retire(entry)

    def resolve(self, name: str) -> int:
        """The number of what is in a name's folder now."""
        entry = self.entry(name)
        if _identity(entry.path) != entry.identity:
            entry = self._put(self._made(name, entry.path, entry.check))
        return entry.number

    # -- which are in memory -----------------------------------------------------------------------------------------

    def pin(self, blend: Blend) -> None:
        """Keep a request's adapters as they are now, whatever becomes of their names."""
        for number, _ in blend:
            self._by_number[number].pins += 1

    def unpin(self, blend: Blend) -> None:
        """Undo one `pin`."""
        for number, _ in blend:
            entry = self._by_number[number]
            entry.pins -= 1
            if entry.gone:
                self._retire(entry)

    def get(self, number: int, running: Collection[int] = ()) -> T:
        """An adapter in memory, read if need be; others than those that run make room.

        Raises AdapterFileError where the folder holds something else by now than when the number was given out.
        """
        entry = self._by_number[number]
        if entry.loaded is None:
            return self.hold(entry, self.read(entry), running)
        self._touch(entry)
        return entry.loaded

    def read(self, entry: Entry[T]) -> T:
        """What is in an entry's folder, raising as `get`. From any thread: nothing is kept before `hold` is told."""
        _require_unchanged(entry)
        loaded = self._load(entry.path)
        _require_unchanged(entry)  # nor while it was read
        return loaded

    def hold(self, entry: Entry[T], loaded: T, running: Collection[int] = ()) -> T:
        """Keep what was read, unless the entry is forgotten by now; others than those that run make room."""
        if self._by_number.get(entry.number) is entry:
            entry.loaded = loaded
            self.loads += 1
            self._touch(entry)
            self._make_room({entry.number, *running})
        return loaded

    def numbered(self, number: int) -> Entry[T]:
        """The entry of a number that is pinned."""
        return self._by_number[number]

    def fits(self, blend: Blend, running: Iterable[Blend]) -> bool:
        """Whether a blend's adapters have room beside those that run; alone they always have."""
        needed = {number for other in running for number, _ in other}
        wanted = needed | {number for number, _ in blend}
        return not needed or wanted == needed or sum(map(self._size, wanted)) <= self.budget

    @property
    def nbytes(self) -> int:
        """Bytes of all loaded adapters."""
        return sum(entry.loaded.nbytes for entry in self._by_number.values() if entry.loaded is not None)

    @property
    def in_memory(self) -> int:
        """How many adapters are loaded."""
        return sum(entry.loaded is not None for entry in self._by_number.values())

    # -- inside ------------------------------------------------------------------------------------------------------

    def _made(self, name: str, path: Path, check: Check) -> Entry[T]:
        check(path)
        folder = find_folder(path, revision=None, subfolder=None)
        config = read_config(folder)
        self._numbers += 1
        targets = config.get("target_modules") or ()
        listed = (targets,) if isinstance(targets, str) else tuple(map(str, targets))
        rank = config.get("r")
        identity = _identity(folder)
        if identity is None:
            raise AdapterFileError(Fault(str(folder), "went away while it was read", "an adapter's folder"))
        return Entry(self._numbers, name, folder, identity, rank if isinstance(rank, int) else 0,
                     tuple(intern(target) for target in sorted(listed)), identity[2], identity[1] // 10**9, check)

    def _touch(self, entry: Entry[T]) -> None:
        self._clock += 1
        entry.used = self._clock

    def _size(self, number: int) -> int:
        entry = self._by_number[number]
        return entry.file_bytes if entry.loaded is None else entry.loaded.nbytes

    def _make_room(self, keep: Collection[int]) -> None:
        total = self.nbytes
        for entry in sorted(self._by_number.values(), key=lambda e: e.used):
            if total <= self.budget:
                return
            if entry.loaded is not None and entry.number not in keep:
                total -= entry.loaded.nbytes
                entry.loaded = None
                self.evictions += 1

    def _retire(self, entry: Entry[T]) -> None:
        entry.gone = True
        if not entry.pins:
            entry.loaded = None
            del self._by_number[entry.number]
            self._on_gone(entry.number)


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder; an AdapterFileError where it is none of a low-rank adapter."""
    path = folder / CONFIG_FILE
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(MAX_CONFIG + 1)[:MAX_CONFIG])
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(Fault(str(path), f"cannot be read ({type(error).__name__})", "a JSON object")) from error
    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        raise AdapterFileError(Fault(str(path), "is not the config of a low-rank adapter", 'peft_type "LORA"'))
    return config


def adapters_in(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The adapters in the subfolders of a folder (or the folder itself), by name, and what was passed over, and why."""
    if (folder / CONFIG_FILE).is_file():
        return {folder.resolve().name: folder}, []
    found: dict[str, Path] = {}
    skipped = []
    for path in sorted(folder.iterdir()):
        if (path / CONFIG_FILE).is_file():
            try:
                read_config(find_folder(path, revision=None, subfolder=None))
                found[path.name] = path
            except DeltawError as error:
                skipped.append(str(error))
    return found, skipped


def _require_unchanged(entry: Entry[Any]) -> None:
    """Raise unless an entry's folder may still be read, and holds what it held when it was noted."""
    entry.check(entry.path)
    if _identity(entry.path) != entry.identity:
        raise AdapterFileError(Fault(f"adapter '{entry.name}'", "was replaced while a request waited for it",
                                     "the same files", "Ask again, and the new ones answer"))


def _identity(folder: Path) -> Identity | None:
    """What tells the content of a folder from what takes its place."""
    try:
        tensors, config = ((folder / name).stat() for name in (TENSORS_FILE, CONFIG_FILE))
    except OSError:
        return None
    return tensors.st_ino, tensors.st_mtime_ns, tensors.st_size, config.st_mtime_ns
