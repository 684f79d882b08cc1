"""Who may do what, limits, disconnects and adapters at run time, over real sockets."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from deltaw.serve.service import Service, open_service
from tests.serve.conftest import config, live, live_server, write_adapter

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
LONG = CHAT | {"max_tokens": 48, "ignore_eos": True}


@pytest.fixture
def client(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=30) as client:
        yield client


def wait_until_idle(service: Service) -> None:
    end = time.monotonic() + 10
    while not service.engine.scheduler.idle:
        assert time.monotonic() < end, "the place of a client that left is still taken"
        time.sleep(0.01)


def slow(service: Service, seconds: float = 0.05) -> None:
    """Make every step take so long."""
    step = service.engine.step
    service.engine.step = lambda: (time.sleep(seconds), step())[1]  # type: ignore[method-assign,assignment,func-returns-value]


def test_state(client: httpx.Client) -> None:
    client.post("/v1/chat/completions", json=CHAT)
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    assert set(client.get("/version").json()) == {"version"}
    assert "deltaw" in client.get("/").text
    assert client.get("/v1/adapters/wide").json()["alpha"] == 60
    assert client.get("/v1/adapters/wid").status_code == 404
    assert [a["name"] for a in client.get("/lora-adapters").json()] == ["small", "wide", "scaled", "head"]
    from prometheus_client.parser import text_string_to_metric_families

    figures = {s.name: s.value for family in text_string_to_metric_families(client.get("/metrics").text)
               for s in family.samples}
    assert figures["deltaw_generated_tokens_total"] >= 1
    assert figures["deltaw_adapters_registered"] == 4


@pytest.mark.parametrize(("path", "body", "status"), [
    ("/v1/chat/completions", b"{", 400), ("/v1/chat/completions", b"[]", 400), ("/v1/nothing", b"{}", 404),
    ("/v1/chat/completions", b'{"model": "tiny", "messages": [{"role": "king", "content": "x"}]}', 400),
    ("/v1/completions", b'{"model": "tiny", "prompt": [99999]}', 400),
    ("/v1/completions", b'{"model": "tiny", "prompt": ""}', 400),
    ("/v1/completions", b'{"model": "tiny", "prompt": "x", "temperature": NaN}', 400),
    ("/v1/load_lora_adapter", b'{"lora_name": "x", "lora_path": "y"}', 403),
    ("/v1/unload_lora_adapter", b'{"lora_name": "small"}', 403),
])
def test_errors_have_openais_form(path: str, body: bytes, status: int, client: httpx.Client) -> None:
    reply = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == status
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_its_own_document_holds_against_random_requests(base_folder: Path, adapter_folders: dict[str, Path],
                                                        root: Path) -> None:
    """schemathesis: whatever is asked, the status, the type and the form of the answer are those of the document."""
    runtime = config(base_folder, allow_runtime_loading=True, adapter_root=str(root))
    with open_service(runtime, adapter_folders) as service, live(service) as url:
        check_document(url)


def check_document(server: str) -> None:
    import hypothesis
    import schemathesis
    from schemathesis.specs.openapi import checks

    schema = schemathesis.openapi.from_url(f"{server}/openapi.json")
    every = [schemathesis.checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
             checks.response_schema_conformance]
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 9
    for operation in operations:
        strategy = operation.as_strategy()

        @hypothesis.given(strategy)
        @hypothesis.settings(max_examples=8, deadline=None, suppress_health_check=list(hypothesis.HealthCheck),
                             database=None, derandomize=True)
        def one(case: Any) -> None:
            case.call_and_validate(checks=every, timeout=30)

        one()


def schema_of(document: dict[str, Any], name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}", "components": document["components"]}


@pytest.mark.parametrize(("path", "body", "whole", "event"), [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "logprobs": True,
                              "top_logprobs": 2}, "ChatReply", "ChatChunk"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "n": 2}, "ChatReply", "ChatChunk"),
    ("/v1/completions", {"prompt": "hello", "logprobs": 1, "echo": True}, "CompletionReply", "CompletionChunk"),
    ("/v1/completions", {"prompt": ["hello", "sky"]}, "CompletionReply", "CompletionChunk")])
def test_answers_and_events_have_the_form_that_the_document_tells(client: httpx.Client, path: str, event: str,
                                                                  body: dict[str, Any], whole: str) -> None:
    from jsonschema_rs import Draft202012Validator  # schemathesis brings it

    document = client.get("/openapi.json").json()
    asked = {"model": "wide", "max_tokens": 5, "seed": 1} | body  # unseeded, an answer may end at once
    answered = document["paths"][path]["post"]["responses"]["200"]
    assert answered["content"]["application/json"]["schema"]["$ref"].endswith(f"/{whole}")
    assert event in answered["description"]
    Draft202012Validator(schema_of(document, whole)).validate(client.post(path, json=asked).json())
    check = Draft202012Validator(schema_of(document, event))
    reply = client.post(path, json=asked | {"stream": True, "stream_options": {"include_usage": True}})
    events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert len(events) > 5
    assert events[-1] == "[DONE]"
    for told in events[:-1]:
        check.validate(json.loads(told))
    assert not check.is_valid(json.loads(events[0]) | {"more": 1})


def test_every_answer_in_json_has_a_form_in_the_document(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for told in methods.values():
            contents = [answer.get("content", {}).get("application/json") for answer in told["responses"].values()]
            assert all(content["schema"] for content in contents if content is not None), path
            assert "422" not in told["responses"]


def test_a_key_is_asked_of_everything_that_tells_or_does_something(base_folder: Path) -> None:
    with open_service(config(base_folder, api_key="secret"), {}) as service, live(service) as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            for path in ("/v1/models", "/metrics", "/docs", "/openapi.json"):
                assert httpx.get(url + path, headers=headers).status_code == 401
            assert httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers=headers).status_code == 401
        good = {"Authorization": "Bearer secret"}
        assert httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers=good, timeout=30).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200


def test_the_interface_is_told_without_a_network(client: httpx.Client) -> None:
    page, document = client.get("/docs").text, client.get("/openapi.json").json()
    assert "https://" not in page
    assert "<script" not in page
    for path in document["paths"]:
        assert path in page
    for field in ("max_model_len", "list of ChatChoice"):
        assert field in page
    for field in ("messages", "repetition_penalty", "lora", "lora_path", "list of LoraScale"):
        assert field in page


def test_a_body_that_is_too_long(base_folder: Path) -> None:
    with open_service(config(base_folder, max_request_bytes=2000), {}) as service, live(service) as url:
        long = json.dumps(CHAT | {"user": "x" * 3000}).encode()
        kind = {"Content-Type": "application/json"}
        assert httpx.post(f"{url}/v1/chat/completions", content=long, headers=kind).status_code == 413
        chunked = (long[i:i + 500] for i in range(0, len(long), 500))  # with no length told beforehand
        assert httpx.post(f"{url}/v1/chat/completions", content=chunked, headers=kind).status_code == 413
        assert httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=30).status_code == 200


def test_more_answers_than_can_ever_wait_are_refused_for_good(base_folder: Path) -> None:
    with open_service(config(base_folder, places=2, max_waiting=2), {}) as service, live(service) as url, \
            httpx.Client(base_url=url, timeout=30) as client:
        asked = {"model": "tiny", "prompt": ["hello", "world"], "max_tokens": 2}
        assert client.post("/v1/completions", json=asked | {"n": 2}).status_code == 200
        reply = client.post("/v1/completions", json=asked | {"n": 3})
        assert reply.status_code == 400
        assert "asks for 6 answers; at most 4" in reply.json()["error"]["message"]


def test_a_full_queue_and_a_time_limit(base_folder: Path) -> None:
    with open_service(config(base_folder, places=1, max_waiting=2, timeout=2.0), {}) as service, \
            live(service) as url, httpx.Client(base_url=url, timeout=30) as client:
        slow(service)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(httpx.post, f"{url}/v1/chat/completions", json=LONG | {"n": 3}, timeout=60)
            while service.engine.scheduler.waiting < 2:
                assert not first.done()
                time.sleep(0.01)
            reply = client.post("/v1/chat/completions", json=LONG)
            assert reply.status_code == 429
            assert "retry-after" in reply.headers
            assert first.result().status_code == 504
        assert client.post("/v1/chat/completions", json=LONG).status_code == 504
        wait_until_idle(service)


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT),
                                             ("/v1/completions", {"model": "tiny", "prompt": "hello"})])
def test_others_are_answered_while_a_prompt_is_made_tokens(path: str, body: dict[str, Any],
                                                           base_folder: Path) -> None:
    with open_service(config(base_folder), {}) as service, live(service) as url, \
            ThreadPoolExecutor(1) as pool, httpx.Client(base_url=url, timeout=30) as client:
        begun, go, tokens = threading.Event(), threading.Event(), service._tokens

        def slowly(text: str, **options: bool) -> list[int]:
            begun.set()
            assert go.wait(60), "nobody was answered in the meantime"
            return tokens(text, **options)

        service._tokens = slowly  # type: ignore[method-assign]
        reply = pool.submit(httpx.post, url + path, json=body, timeout=90)
        assert begun.wait(30)
        assert client.get("/health").status_code == 200
        assert not reply.done()
        go.set()
        assert reply.result().status_code == 200


def test_a_text_that_can_be_no_prompt_is_refused_by_its_length(base_folder: Path) -> None:
    with open_service(config(base_folder, max_prompt_tokens=4), {}) as service, live(service) as url, \
            httpx.Client(base_url=url, timeout=30) as client:
        for widest, said in ((None, "14 tokens"), (5, "69 characters, which are more than 13 tokens")):
            service.widest = widest
            reply = client.post("/v1/completions", json={"model": "tiny", "prompt": " ".join(["blue"] * 14)})
            assert reply.status_code == 400
            assert reply.json()["error"]["code"] == "context_length_exceeded"
            assert said in reply.json()["error"]["message"]
        assert client.post("/v1/completions", json={"model": "tiny", "prompt": "hello world"}).status_code == 200


def test_a_server_that_drains_ends_what_runs_and_takes_nothing_new(base_folder: Path) -> None:
    with open_service(config(base_folder), {}) as service, live_server(service) as (url, server), \
            httpx.Client(base_url=url, timeout=60) as client:
        slow(service, 0.02)
        with client.stream("POST", "/v1/chat/completions", json=LONG | {"stream": True}) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.draining.begun = True
            for path, asked in (("/v1/chat/completions", CHAT), ("/v1/load_lora_adapter", {})):
                refused = client.post(path, json=asked)
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "stopping"
                assert "retry-after" in refused.headers
            assert client.get("/ready").status_code == 503
            assert client.get("/health").status_code == 200
            asyncio.run(server._drain())
            assert [line for line in lines if line][-1] == "data: [DONE]"


def test_a_drain_that_runs_out_ends_answers_too(base_folder: Path) -> None:
    with open_service(config(base_folder, drain=0.2, timeout=90), {}) as service, \
            live_server(service) as (url, server), httpx.Client(base_url=url, timeout=60) as client:
        step, go = service.engine.step, threading.Event()
        with client.stream("POST", "/v1/chat/completions", json=LONG | {"stream": True}) as reply:
            lines = reply.iter_lines()
            service.engine.step = lambda: (go.wait(60), step())[1]  # type: ignore[method-assign,assignment,func-returns-value]
            next(lines)
            server.draining.begun = True
            asyncio.run(server._drain())  # returns although a step never ends
            assert server.should_exit
            with suppress(httpx.HTTPError):  # cut off
                assert "data: [DONE]" not in list(lines)
        go.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the thread's, made to fail
def test_without_an_engine_every_request_is_refused_at_once(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = config(base_folder, allow_runtime_loading=True, adapter_root=str(base_folder.parent))
    with open_service(runtime, {}) as service, live(service) as url, httpx.Client(base_url=url, timeout=30) as client:
        def fails(*_: object) -> None:
            raise KeyError("a bug that ends the thread")

        monkeypatch.setattr(service.engine.scheduler, "plan", fails)
        monkeypatch.setattr(service.engine.scheduler, "remove", fails)
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 500
        service.engine._thread.join(30)
        for path, asked in (("/v1/chat/completions", CHAT), ("/v1/chat/completions", CHAT | {"stream": True}),
                            ("/v1/unload_lora_adapter", {"lora_name": "x"})):
            assert client.post(path, json=asked).status_code == 503
        assert client.get("/health").status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(stream: bool, base_folder: Path) -> None:
    with open_service(config(base_folder, places=1), {}) as service, live(service) as url:
        slow(service)
        if stream:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG | {"stream": True}) as reply:
                assert "content" in next(reply.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/chat/completions", json=LONG, timeout=0.4)
        wait_until_idle(service)
        assert service.engine.counters.finished == {"cancelled": 1}


@pytest.mark.parametrize("damage", ["config", "tensors", "folder"])
def test_an_adapter_that_is_damaged_after_the_start_is_refused(damage: str, base_folder: Path, tmp_path: Path) -> None:
    folder = write_adapter(base_folder, tmp_path / "adapter", 9, r=2, target_modules="all-linear")
    with open_service(config(base_folder), {"a": folder}) as service, live(service) as url, \
            httpx.Client(base_url=url, timeout=30) as client:
        asked = CHAT | {"model": "a"}
        assert client.post("/v1/chat/completions", json=asked).status_code == 200
        if damage == "config":
            (folder / "adapter_config.json").write_text("{")
        elif damage == "tensors":
            (folder / "adapter_model.safetensors").unlink()
        else:
            shutil.rmtree(folder)
        for stream in (False, True):
            reply = client.post("/v1/chat/completions", json=asked | {"stream": stream})
            assert reply.status_code == 400
            assert reply.json()["error"]["code"] == "adapter_refused"
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


# ------------------------------------------------------------------------------------------------ adapters at run time


@pytest.fixture
def root(base_folder: Path, tmp_path: Path) -> Path:
    """A root with one good adapter, a broken one, one of another base, and links that lead out."""
    root = tmp_path / "root"
    write_adapter(base_folder, root / "good", 9, r=2, lora_alpha=30, target_modules="all-linear")
    shutil.copytree(root / "good", tmp_path / "outside")
    shutil.copytree(root / "good", root / "broken")
    (root / "broken" / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    (root / "link").symlink_to(tmp_path / "outside")
    shutil.copytree(root / "good", root / "inner")
    (root / "inner" / "adapter_model.safetensors").unlink()
    (root / "inner" / "adapter_model.safetensors").symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    return root


def test_adapters_come_and_go_and_only_from_the_root(base_folder: Path, root: Path, tmp_path: Path) -> None:
    runtime = config(base_folder, allow_runtime_loading=True, adapter_root=str(root))
    with open_service(runtime, {}) as service, live(service) as url, httpx.Client(base_url=url, timeout=30) as client:
        def load(path: str, name: str = "new") -> httpx.Response:
            return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})

        outside = str(tmp_path / "outside")
        for path in (outside, "../outside", "good/../../outside", "link", "inner", "broken", "nowhere", "/etc",
                     "someone/adapter", "https://example.org/a", "~/a", ".", "good\0", "x" * 5000):
            reply = load(path)
            assert reply.status_code == 400, path
            assert "error" in reply.json()
        assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["tiny"]
        assert load("good").status_code == 200
        again = load("good")
        assert again.status_code == 400
        assert again.json()["error"]["param"] == "lora_name"
        assert load("good", "tiny").status_code == 400
        assert client.post("/v1/chat/completions", json=CHAT | {"model": "new"}).status_code == 200
        assert load(str(root / "good"), "absolute").status_code == 200
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 200
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 404
        assert client.post("/v1/chat/completions", json=CHAT | {"model": "new"}).status_code == 404


def test_a_number_never_means_another_adapter(base_folder: Path, root: Path, adapter_folders: dict[str, Path]) -> None:
    runtime = config(base_folder, allow_runtime_loading=True, adapter_root=str(root))
    with open_service(runtime, adapter_folders) as service, live(service) as url, \
            httpx.Client(base_url=url, timeout=30) as client:
        def listed() -> dict[str, int]:
            return {one["name"]: one["id"] for one in client.get("/lora-adapters").json()}

        def status(number: int) -> int:
            return client.post("/v1/chat/completions", json=CHAT | {"lora": [{"id": number}]}).status_code

        before = listed()
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "small"}).status_code == 200
        assert client.post("/v1/load_lora_adapter", json={"lora_name": "small", "lora_path": "good"}).status_code == 200
        after = listed()
        assert after == before | {"small": after["small"]}
        assert after["small"] > max(before.values())
        assert {number: status(number) for number in (before["small"], after["small"], before["wide"])} == {
            before["small"]: 404, after["small"]: 200, before["wide"]: 200}


@pytest.mark.parametrize("swapped", ["folder", "tensors"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_what_becomes_a_link_after_it_was_loaded_is_not_followed(swapped: str, in_memory: bool, base_folder: Path,
                                                                 root: Path, tmp_path: Path) -> None:
    runtime = config(base_folder, allow_runtime_loading=True, adapter_root=str(root))
    with open_service(runtime, {}) as service, live(service) as url, httpx.Client(base_url=url, timeout=30) as client:
        assert client.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "good"}).status_code == 200
        if not in_memory:
            service.engine.call(lambda: setattr(service.engine.pool.entry("a"), "loaded", None)).result(10)
        if swapped == "folder":
            shutil.rmtree(root / "good")
            (root / "good").symlink_to(tmp_path / "outside")
        else:
            (root / "good" / "adapter_model.safetensors").unlink()
            (root / "good" / "adapter_model.safetensors").symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
        reply = client.post("/v1/chat/completions", json=CHAT | {"model": "a"})
        assert reply.status_code == 400
        assert "--adapter-root" in reply.json()["error"]["message"]
        assert client.get("/v1/adapters/a").status_code == 400


def test_loading_in_place_puts_another_adapter_under_the_name_or_nothing(base_folder: Path, root: Path) -> None:
    write_adapter(base_folder, root / "other", 10, r=7, lora_alpha=90, target_modules="all-linear")
    runtime = config(base_folder, allow_runtime_loading=True, adapter_root=str(root))
    with open_service(runtime, {}) as service, live(service) as url, httpx.Client(base_url=url, timeout=30) as client:
        def load(path: str, **fields: object) -> int:
            body = {"lora_name": "a", "lora_path": path} | fields
            return client.post("/v1/load_lora_adapter", json=body).status_code

        def rank() -> int:
            return int(client.get("/v1/models/a").json()["rank"])

        assert (load("good", load_inplace=True), rank()) == (200, 2)
        assert (load("broken", load_inplace=True), rank()) == (400, 2)
        assert (load("other", load_inplace=True), rank()) == (200, 7)
        assert client.post("/v1/chat/completions", json=CHAT | {"model": "a"}).status_code == 200
        assert len(service.engine.pool._by_number) == 1
