"""Answers of mixed batches against PEFT's own, one prompt and one adapter at a time, token for token in fp32."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaw.serve.request import EngineStopped, Event, SamplingParams
from deltaw.serve.service import Service, open_service
from tests.device import ON_CPU
from tests.serve.conftest import config, tokens_of, write_adapter

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
PROMPTS = ["is the sky blue ?", "hello", "the sea is green ? no the grass is green", "world world",
           "maybe the world is the sea is the sky is the grass is the world is the sea is blue"]


class Listener:
    """Collects the events of one answer."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.finish:
            self.ended.set()

    @property
    def tokens(self) -> list[int]:
        assert self.ended.wait(60)
        return [token for event in self.events for token in event.tokens]

    @property
    def finish(self) -> str | None:
        assert self.ended.wait(60)
        return self.events[-1].finish


def ask(service: Service, prompt: str, mix: Mapping[str, float], params: SamplingParams = GREEDY) -> Listener:
    listener = Listener()
    service.submit(tokens_of(prompt), mix, params, [listener]).result(60)
    return listener


CASES: list[tuple[str, dict[str, float]]] = [
    (prompt, mix) for prompt in PROMPTS for mix in (
        {}, {"small": 1.0}, {"wide": 1.0}, {"scaled": 1.0}, {"head": 1.0}, {"small": 0.7, "wide": -0.3},
        {"wide": 0.5, "head": 1.5, "scaled": 1.0})]


@pytest.mark.parametrize(("kernel", "runner"), [
    (True, "NativeRunner" if ON_CPU else "RowRunner"), (False, "RowRunner")])
def test_every_row_of_a_mixed_batch_is_pefts_answer(kernel: bool, runner: str, base_folder: Path,
                                                    adapter_folders: dict[str, Path],
                                                    reference: Callable[..., list[int]]) -> None:
    with open_service(config(base_folder, kernel=kernel), adapter_folders) as service:
        assert type(service.engine._runner).__name__ == runner
        check_mixed_batch(service, reference)


def check_mixed_batch(service: Service, reference: Callable[..., list[int]]) -> None:
    slow_start = service.engine.call(lambda: time.sleep(0.5))  # so that many prompts are computed in one step
    listeners = [Listener() for _ in CASES]
    for listener, (prompt, mix) in zip(listeners, CASES, strict=True):
        service.submit(tokens_of(prompt), mix, GREEDY, [listener])
    got = [listener.tokens for listener in listeners]
    assert slow_start.done()
    expected = [reference(tokens_of(prompt), mix, 12) for prompt, mix in CASES]
    assert got == expected
    assert len({tuple(answer) for answer in expected}) > len(CASES) // 2, "adapters that change nothing test nothing"


@pytest.mark.parametrize("fields", [{"places": 1}, {"places": 6, "prefill_tokens": 3}, {"places": 12},
                                    {"places": 6, "auto_merge": 1e-9}, {"places": 4, "kernel": False},
                                    {"places": 6, "auto_merge": 1e-9, "kernel": False}])
def test_however_it_is_scheduled(fields: dict[str, Any], base_folder: Path, adapter_folders: dict[str, Path],
                                 reference: Callable[..., list[int]]) -> None:
    cases = CASES[::3]
    with open_service(config(base_folder, **fields), adapter_folders) as service:
        alone = ask(service, *CASES[2]).tokens
        assert alone == reference(tokens_of(CASES[2][0]), CASES[2][1], 12)
        listeners = [ask(service, *case) for case in cases]
        assert [x.tokens for x in listeners] == [reference(tokens_of(prompt), mix, 12) for prompt, mix in cases]


def test_a_beginning_is_computed_once_for_each_adapter(service: Service, reference: Callable[..., list[int]]) -> None:
    prompt = PROMPTS[-1]
    first = ask(service, prompt, {"wide": 1.0})
    assert first.tokens == reference(tokens_of(prompt), {"wide": 1.0}, 12)
    again, other = ask(service, prompt + " ?", {"wide": 1.0}), ask(service, prompt, {"small": 1.0})
    assert again.tokens == reference(tokens_of(prompt + " ?"), {"wide": 1.0}, 12)
    assert other.tokens == reference(tokens_of(prompt), {"small": 1.0}, 12)
    assert again.events[0].reused == len(tokens_of(prompt))
    assert other.events[0].reused == 0


def test_few_adapters_in_memory_and_the_same_answers(base_folder: Path, adapter_folders: dict[str, Path],
                                                     reference: Callable[..., list[int]]) -> None:
    with open_service(config(base_folder, places=2), adapter_folders) as service:
        service.engine.pool.budget = 30_000  # of 4 KB to 45 KB each
        got = [ask(service, *case).tokens for case in CASES[:14]]
        assert service.engine.pool.evictions > 3
        assert got == [reference(tokens_of(prompt), mix, 12) for prompt, mix in CASES[:14]]


def test_a_name_that_is_used_again_means_the_new_adapter(base_folder: Path, tmp_path: Path) -> None:
    def answer(service: Service) -> list[int]:
        return ask(service, PROMPTS[-1], {"a": 1.0}).tokens

    fields: dict[str, Any] = {"r": 4, "lora_alpha": 60, "target_modules": "all-linear"}
    old, new = (write_adapter(base_folder, tmp_path / str(seed), seed, **fields) for seed in (1, 2))
    with open_service(config(base_folder), {"a": new}) as service:
        expected = answer(service)
    with open_service(config(base_folder), {"a": old}) as service:
        before = answer(service)
        service.unload_adapter("a")
        service.engine.call(lambda: service.engine.pool.register("a", new)).result(10)
        assert answer(service) == expected != before
        write_adapter(base_folder, new, 1, **fields)  # the folder itself is replaced
        assert answer(service) == before


def test_a_merged_adapter_is_undone_to_the_bit(base_folder: Path, adapter_folders: dict[str, Path],
                                               reference: Callable[..., list[int]]) -> None:
    with open_service(config(base_folder, auto_merge=1e-9), adapter_folders) as service:
        before = {name: (p.data_ptr(), p.clone()) for name, p in service.base.model.named_parameters()}
        assert ask(service, PROMPTS[0], {"wide": 1.0}).tokens == reference(tokens_of(PROMPTS[0]), {"wide": 1.0}, 12)
        assert service.engine._merge is not None
        assert service.engine._merge.merges == 1
        assert ask(service, PROMPTS[0], {}).tokens == reference(tokens_of(PROMPTS[0]), {}, 12)
        for name, p in service.base.model.named_parameters():
            assert p.data_ptr() == before[name][0]
            assert torch.equal(p, before[name][1])


@pytest.mark.parametrize("kernel", [True, False])
def test_merging_while_others_come_and_go_changes_no_answer(kernel: bool, base_folder: Path,
                                                            adapter_folders: dict[str, Path],
                                                            reference: Callable[..., list[int]]) -> None:
    """One is alone and merged; the others find it in the weights, and it goes on beside them; twice."""
    long = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    with open_service(config(base_folder, auto_merge=1e-9, kernel=kernel), adapter_folders) as service:
        step, merge = service.engine.step, service.engine._merge
        service.engine.step = lambda: (time.sleep(0.01), step())[1]  # type: ignore[method-assign,assignment,func-returns-value]
        assert merge is not None
        expected = [reference(tokens_of(prompt), mix, 12) for prompt, mix in CASES[:4]]
        whole = reference(tokens_of(PROMPTS[0]), {"wide": 1.0}, 40)
        for times in (1, 2):
            alone = ask(service, PROMPTS[0], {"wide": 1.0}, long)
            until = time.monotonic() + 30
            while merge.merges < times:
                assert time.monotonic() < until
                time.sleep(0.001)
            assert [x.tokens for x in [ask(service, *case) for case in CASES[:4]]] == expected
            assert alone.tokens == whole


def test_a_seed_means_the_same_beside_any_neighbours(service: Service) -> None:
    params = SamplingParams(max_tokens=10, temperature=1.3, top_p=0.9, top_k=15, seed=7, ignore_eos=True)
    alone = ask(service, PROMPTS[0], {"small": 1.0}, params).tokens
    others = [ask(service, prompt, mix, SamplingParams(max_tokens=20, seed=i)) for i, (prompt, mix)
              in enumerate(CASES[:5])]
    assert ask(service, PROMPTS[0], {"small": 1.0}, params).tokens == alone
    assert all(other.finish for other in others)
    assert ask(service, PROMPTS[0], {"small": 1.0}, SamplingParams(max_tokens=10, temperature=1.3, seed=8,
                                                                   ignore_eos=True)).tokens != alone


def test_cancelled_requests_free_their_places(service: Service) -> None:
    long = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)
    listeners = [Listener() for _ in range(20)]
    sequences = [service.submit(tokens_of("hello"), {"small": 1.0}, long, [one]).result(10)[0] for one in listeners]
    service.cancel(sequences)
    assert {one.finish for one in listeners} <= {"cancelled", "length"}
    service.engine.call(lambda: None).result(10)
    assert service.engine.scheduler.idle
    assert len(service.engine.scheduler.places.free) == 6
    assert all(not entry.pins for entry in service.engine.pool._by_number.values())


@pytest.fixture
def broken(base_folder: Path, tmp_path: Path) -> Path:
    """An adapter whose tensors are none."""
    folder = write_adapter(base_folder, tmp_path / "broken", 5, r=2, target_modules=["q_proj"])
    (folder / "adapter_model.safetensors").write_bytes(b"nothing of the kind")
    return folder


@pytest.mark.parametrize("auto_merge", [0.0, 1e-9])
def test_an_adapter_that_cannot_be_read_ends_its_requests_alone(auto_merge: float, base_folder: Path, broken: Path,
                                                                adapter_folders: dict[str, Path]) -> None:
    """With merging too, which reads an adapter the second time that it is asked for alone."""
    with open_service(config(base_folder, auto_merge=auto_merge), {**adapter_folders, "broken": broken}) as service:
        for _ in range(3):
            bad = ask(service, "hello", {"broken": 1.0})
            assert bad.finish == "error"
            assert bad.events[-1].refused
        bad, good = ask(service, "hello", {"broken": 1.0}), ask(service, "hello", {"small": 1.0})
        assert (bad.finish, good.finish) == ("error", "length")
        assert service.engine.alive


def test_a_fault_that_nobody_foresaw_ends_what_is_open_and_no_more(service: Service,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    plan = service.engine.scheduler.plan

    def fails_once(*_: Any) -> Any:
        monkeypatch.setattr(service.engine.scheduler, "plan", plan)
        raise KeyError("a bug")

    monkeypatch.setattr(service.engine.scheduler, "plan", fails_once)
    assert ask(service, "hello", {"small": 1.0}).finish == "error"
    assert ask(service, "hello", {"small": 1.0}).finish == "length"


def test_a_listener_that_fails_ends_its_own_answer_alone(service: Service) -> None:
    def deaf(event: Event) -> None:
        raise RuntimeError("the loop is closed")

    service.submit(tokens_of("hello"), {}, GREEDY, [deaf]).result(10)
    assert ask(service, "hello", {"small": 1.0}).finish == "length"
    assert service.engine.call(lambda: service.engine.scheduler.idle).result(10)
    assert service.engine.counters.finished == {"cancelled": 1, "length": 1}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the thread's, made to fail
def test_an_engine_whose_thread_has_ended_refuses_at_once(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise KeyError("a bug that ends the thread")

    monkeypatch.setattr(service.engine.scheduler, "plan", fails)
    monkeypatch.setattr(service.engine.scheduler, "remove", fails)
    assert ask(service, "hello", {}).finish == "error"
    service.engine._thread.join(10)
    assert not service.ready
    with pytest.raises(EngineStopped):
        service.submit(tokens_of("hello"), {}, GREEDY, [Listener()]).result(10)


def test_a_result_that_is_cancelled_is_not_made(service: Service) -> None:
    begun, go = threading.Event(), threading.Event()
    service.engine.call(lambda: (begun.set(), go.wait(30)))
    assert begun.wait(30)
    listener = Listener()
    assert service.submit(tokens_of("hello"), {}, GREEDY, [listener]).cancel()
    go.set()
    assert ask(service, "hello", {"small": 1.0}).finish == "length"
    assert not listener.events


class Held:
    """Reading that waits until it may go on, and counts."""

    def __init__(self, service: Service) -> None:
        self.begun, self.go, self.paths = threading.Semaphore(0), threading.Event(), list[Path]()
        self._load = service.engine.pool._load
        service.engine.pool._load = self.load

    def load(self, path: Path) -> Any:
        self.paths.append(path)
        self.begun.release()
        assert self.go.wait(60)
        return self._load(path)


@pytest.fixture
def held(service: Service) -> Held:
    return Held(service)


def test_others_go_on_while_an_adapter_is_read(service: Service, held: Held,
                                               reference: Callable[..., list[int]]) -> None:
    waiting = [ask(service, PROMPTS[0], {"wide": 1.0}) for _ in range(9)]  # more than there are places
    assert held.begun.acquire(timeout=30)
    assert ask(service, PROMPTS[1], {}).tokens == reference(tokens_of(PROMPTS[1]), {}, 12)
    assert not any(one.events for one in waiting)
    held.go.set()
    expected = reference(tokens_of(PROMPTS[0]), {"wide": 1.0}, 12)
    assert [one.tokens for one in waiting] == [expected] * 9
    assert len(held.paths) == 1


def test_one_that_is_cancelled_while_its_adapter_is_read_leaves_nothing(service: Service, held: Held) -> None:
    listener = Listener()
    sequences = service.submit(tokens_of("hello"), {"wide": 1.0}, GREEDY, [listener]).result(30)
    assert held.begun.acquire(timeout=30)
    service.cancel(sequences)
    assert listener.finish == "cancelled"
    assert service.engine.call(lambda: service.engine.scheduler.idle).result(10)
    held.go.set()
    assert ask(service, "hello", {"wide": 1.0}).finish == "length"
    assert len(held.paths) == 1
    service.engine.call(lambda: None).result(10)
    assert not any(entry.pins for entry in service.engine.pool._by_number.values())


def test_a_time_limit_ends_one_whose_adapter_is_being_read(service: Service, held: Held) -> None:
    listener = Listener()
    service.engine.submit(tokens_of("hello"), {"wide": 1.0}, GREEDY, [listener], deadline=time.monotonic() + 0.2)
    assert listener.finish == "timeout"
    held.go.set()


def test_a_name_that_is_used_again_while_it_is_read_means_the_new_adapter(service: Service, held: Held,
                                                                          adapter_folders: dict[str, Path],
                                                                          reference: Callable[..., list[int]]) -> None:
    """The first request ends with the old one, and the second has the new one, which is another number."""
    old = ask(service, PROMPTS[0], {"wide": 1.0})
    assert held.begun.acquire(timeout=30)

    def swap() -> None:
        service.engine.pool.unregister("wide")
        service.engine.pool.register("wide", adapter_folders["scaled"])

    service.engine.call(swap).result(10)
    new = ask(service, PROMPTS[0], {"wide": 1.0})
    held.go.set()
    assert old.tokens == reference(tokens_of(PROMPTS[0]), {"wide": 1.0}, 12)
    assert new.tokens == reference(tokens_of(PROMPTS[0]), {"scaled": 1.0}, 12)
    assert old.tokens != new.tokens


def test_files_that_are_replaced_while_they_are_read_answer_nobody(base_folder: Path, tmp_path: Path,
                                                                   adapter_folders: dict[str, Path]) -> None:
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 60, "target_modules": "all-linear"}
    folder = write_adapter(base_folder, tmp_path / "a", 1, **fields)
    with open_service(config(base_folder), {"a": folder}) as service:
        held = Held(service)
        waits = [ask(service, PROMPTS[0], {"a": 1.0}) for _ in range(2)]
        assert held.begun.acquire(timeout=30)
        write_adapter(base_folder, folder, 2, **fields)
        after = ask(service, PROMPTS[0], {"a": 1.0})
        held.go.set()
        assert [one.finish for one in waits] == ["error", "error"]
        assert all(one.events[-1].refused and "replaced" in one.events[-1].error for one in waits)
        assert after.finish == "length"
    with open_service(config(base_folder), {"a": folder}) as service:
        assert ask(service, PROMPTS[0], {"a": 1.0}).tokens == after.tokens


def test_next_in_line_are_read_as_far_as_memory_goes(base_folder: Path, adapter_folders: dict[str, Path]) -> None:
    with open_service(config(base_folder, places=1), adapter_folders) as service:
        sizes = {name: service.engine.pool.entry(name).file_bytes for name in adapter_folders}
        service.engine.pool.budget = sizes["small"] + max(sizes["scaled"], sizes["head"])
        slow = service.engine.call(lambda: time.sleep(0.3))  # so that all wait before the first step
        long = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
        answers = [ask_later(service, name, long) for name in ("small", "scaled", "head")]
        assert slow.result(10) is None
        peak = 0
        while not all(one.ended.is_set() for one in answers):
            peak = max(peak, service.engine.call(lambda: service.engine.pool.nbytes).result(30))
        assert [one.finish for one in answers] == ["length"] * 3
        assert service.engine.pool.loads == 3, "none was read for nothing"
        assert sizes["small"] < peak <= service.engine.pool.budget


def ask_later(service: Service, name: str, params: SamplingParams) -> Listener:
    listener = Listener()
    service.submit(tokens_of("hello"), {name: 1.0}, params, [listener])
    return listener


def test_stopping_while_an_adapter_is_read_ends_its_requests(base_folder: Path,
                                                             adapter_folders: dict[str, Path]) -> None:
    with open_service(config(base_folder), adapter_folders) as service:
        held = Held(service)
        first, second = ask(service, "hello", {"wide": 1.0}), ask(service, "hello", {"small": 1.0})
        assert held.begun.acquire(timeout=30)
        threading.Timer(0.2, held.go.set).start()
    assert (first.finish, second.finish) == ("cancelled", "cancelled")
    assert len(held.paths) == 1
    with pytest.raises(EngineStopped):
        service.engine.ahead.read(service.engine.pool.entry("wide"))
