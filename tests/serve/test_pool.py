"""The pool by itself: who is in memory, who leaves, and that a number always means the same files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from deltaw.errors import AdapterFileError, ConfigError, StateError
from deltaw.serve.pool import Pool, adapters_in

KB = 1000


@dataclass
class Read:
    """What is in memory: the folder's bytes."""

    content: bytes

    @property
    def nbytes(self) -> int:
        return len(self.content)


def write(folder: Path, size: int, fill: bytes = b"x") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q"]}))
    new = folder / "new"  # as an atomic write does: a new file takes the old one's name
    new.write_bytes(fill * size)
    new.rename(folder / "adapter_model.safetensors")
    return folder


def read(folder: Path) -> Read:
    return Read((folder / "adapter_model.safetensors").read_bytes())


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Pool[Read]]:
    """A pool of adapters of so many kilobytes, by name."""
    def make(budget: int = 100, **kilobytes: int) -> Pool[Read]:
        pool = Pool(read, budget=budget * KB)
        for name, size in kilobytes.items():
            pool.register(name, write(tmp_path / name, size * KB))
        return pool

    return make


def in_memory(pool: Pool[Read]) -> list[str]:
    return [entry.name for entry in pool.entries if entry.loaded is not None]


def test_nothing_is_read_before_it_is_asked_for(made: Callable[..., Pool[Read]]) -> None:
    pool = made(a=1, b=1)
    assert (pool.names, pool.in_memory, pool.nbytes, pool.loads) == (("a", "b"), 0, 0, 0)
    number = pool.resolve("b")
    assert pool.get(number).nbytes == KB
    assert pool.get(number) is pool.get(number)
    assert (in_memory(pool), pool.nbytes, pool.loads) == (["b"], KB, 1)


def test_those_used_longest_ago_leave_first(made: Callable[..., Pool[Read]]) -> None:
    pool = made(budget=30, a=10, b=10, c=10, d=10, e=20)
    for name in "abca":
        pool.get(pool.resolve(name))
    pool.get(pool.resolve("d"))
    assert in_memory(pool) == ["a", "c", "d"]
    pool.get(pool.resolve("e"))
    assert (in_memory(pool), pool.nbytes, pool.evictions) == (["d", "e"], 30 * KB, 3)


def test_those_that_run_stay_whatever_the_budget(made: Callable[..., Pool[Read]]) -> None:
    pool = made(budget=25, a=10, b=10, c=20)
    a, b, c = (pool.resolve(name) for name in "abc")
    pool.get(a)
    pool.get(b)
    pool.get(c, running={a})
    assert in_memory(pool) == ["a", "c"]


def test_one_larger_than_the_budget_runs_alone(made: Callable[..., Pool[Read]]) -> None:
    pool = made(budget=10, a=4, big=50)
    small, big = ((pool.resolve(name), 1.0) for name in ("a", "big"))
    assert pool.fits((big,), [])
    assert not pool.fits((big,), [(small,)])
    assert not pool.fits((small,), [(big,)])
    assert pool.fits((big,), [(big,)])
    assert pool.fits((small,), [()])
    pool.get(small[0])
    assert pool.get(big[0]).nbytes == 50 * KB
    assert in_memory(pool) == ["big"]


def test_an_adapter_stays_until_its_last_request_has_ended(made: Callable[..., Pool[Read]]) -> None:
    gone: list[int] = []
    pool = made(a=1)
    pool._on_gone = gone.append
    number = pool.resolve("a")
    blend = ((number, 1.0),)
    for _ in range(2):
        pool.pin(blend)
    pool.unregister("a")
    assert (pool.names, gone) == ((), [])
    assert pool.get(number).nbytes == KB
    pool.unpin(blend)
    assert gone == []
    pool.unpin(blend)
    assert (gone, pool._by_number, pool.nbytes) == ([number], {}, 0)
    with pytest.raises(StateError):
        pool.resolve("a")


def test_new_content_has_a_new_number_and_numbers_are_never_used_again(made: Callable[..., Pool[Read]],
                                                                       tmp_path: Path) -> None:
    pool = made(a=1)
    first = pool.resolve("a")
    write(tmp_path / "a", KB, b"y")
    second = pool.resolve("a")
    pool.unregister("a")
    pool.register("a", tmp_path / "a")
    assert first < second < pool.resolve("a")
    assert pool.get(pool.resolve("a")).content[:1] == b"y"


def test_a_number_never_gets_the_files_of_another_content(made: Callable[..., Pool[Read]], tmp_path: Path) -> None:
    """What a request computed under the old files is in the cache; the new ones would go on from it."""
    pool = made(a=1)
    number = pool.resolve("a")
    pool.pin(((number, 1.0),))
    write(tmp_path / "a", KB, b"y")
    with pytest.raises(AdapterFileError, match="replaced while a request waited"):
        pool.get(number)
    assert pool.get(pool.resolve("a")).content[:1] == b"y"


def test_nor_files_that_were_replaced_while_they_were_read(made: Callable[..., Pool[Read]], tmp_path: Path) -> None:
    pool = made(a=1)
    number = pool.resolve("a")

    def meanwhile(folder: Path) -> Read:
        found = read(folder)
        write(folder, KB, b"y")
        return found

    pool._load = meanwhile
    with pytest.raises(AdapterFileError, match="replaced"):
        pool.get(number)
    assert pool.in_memory == 0


@pytest.mark.parametrize("name", ["", "x" * 201, "line\nbreak", "base"])
def test_names_that_cannot_be_used(name: str, tmp_path: Path) -> None:
    pool = Pool(read, budget=1, reserved=["base"])
    with pytest.raises(ConfigError):
        pool.register(name, write(tmp_path / "a", 1))


def test_a_folder_that_is_no_adapter_is_not_registered(tmp_path: Path) -> None:
    pool = Pool(read, budget=1)
    folder = write(tmp_path / "a", 1)
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(AdapterFileError):
        pool.register("a", folder)
    shutil.rmtree(folder)
    with pytest.raises(AdapterFileError):
        pool.register("a", folder)
    assert pool.names == ()


def test_a_folder_of_adapters_by_name(tmp_path: Path) -> None:
    write(tmp_path / "all" / "one", 1)
    write(tmp_path / "all" / "two", 1)
    (write(tmp_path / "all" / "odd", 1) / "adapter_config.json").write_text("[]")
    (tmp_path / "all" / "notes").mkdir()
    found, skipped = adapters_in(tmp_path / "all")
    assert (list(found), len(skipped)) == (["one", "two"], 1)
    assert "odd" in skipped[0]
    assert list(adapters_in(tmp_path / "all" / "one")[0]) == ["one"]
