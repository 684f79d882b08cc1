"""A tiny base on disk whose every word is a token, adapters of several ranks and targets for it, and a live server."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaw
from deltaw import bases
from deltaw.serve.config import ServeConfig
from deltaw.serve.service import Service, open_service
from tests.cli.conftest import WORDS, write_base
from tests.device import DEVICE

SHAPES: dict[str, dict[str, Any]] = {
    "small": {"r": 2, "lora_alpha": 40, "target_modules": ["q_proj", "v_proj"]},
    "wide": {"r": 12, "lora_alpha": 60, "target_modules": "all-linear"},
    "scaled": {"r": 4, "lora_alpha": 24, "use_rslora": True, "target_modules": ["o_proj", "down_proj"]},
    "head": {"r": 3, "lora_alpha": 12, "target_modules": ["lm_head", "k_proj"]},
}


def write_adapter(base_folder: Path, folder: Path, seed: int, **fields: Any) -> Path:
    """An adapter of random factors."""
    base = bases.load_base(str(base_folder), dtype="fp32")
    torch.manual_seed(seed)
    config = deltaw.LoraConfig(**{"init_lora_weights": False, "task_type": "CAUSAL_LM"} | fields)
    deltaw.attach(base.model, config, name="a").adapter("a").save(folder)
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def adapter_folders(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(base_folder, root / name, seed, **fields)
            for seed, (name, fields) in enumerate(SHAPES.items())}


@pytest.fixture(scope="session")
def reference(base_folder: Path, adapter_folders: dict[str, Path]) -> Callable[..., list[int]]:
    """PEFT's greedy answer to one prompt, alone: (prompt tokens, {adapter: weight}, count) -> tokens."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    model: Any = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT warns of while loading is not what a test is about
        for name, folder in adapter_folders.items():
            if model is None:
                model = PeftModel.from_pretrained(base, folder, adapter_name=name)
            else:
                model.load_adapter(folder, adapter_name=name)
    model.eval()

    def answer(prompt: list[int], mix: Mapping[str, float], count: int) -> list[int]:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(count):
                ids.append(int(_logits(model, torch.tensor([ids]), mix)[0, -1].argmax()))
        return ids[len(prompt):]

    return answer


def _logits(model: Any, ids: torch.Tensor, mix: Mapping[str, float]) -> torch.Tensor:
    """With several adapters, PEFT's layers add each one's change, at scales that are changed for this once."""
    if not mix:
        with model.disable_adapter():
            return model(input_ids=ids).logits
    model.base_model.set_adapter(list(mix))
    layers = [m for m in model.modules() if hasattr(m, "scaling") and isinstance(m.scaling, dict)]
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        for name, weight in mix.items():
            if name in layer.scaling:
                layer.scaling[name] *= weight
    try:
        return model(input_ids=ids).logits
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def config(base_folder: Path, **fields: Any) -> ServeConfig:
    return ServeConfig(**{"model": str(base_folder), "served_name": "tiny", "dtype": "fp32", "device": str(DEVICE),
                          "context": 64, "places": 6, "max_tokens": 48} | fields)


@pytest.fixture
def service(base_folder: Path, adapter_folders: dict[str, Path]) -> Iterator[Service]:
    with open_service(config(base_folder), adapter_folders) as running:
        yield running


@contextmanager
def live(service: Service) -> Iterator[str]:
    """A server over a service, in a thread; its address."""
    with live_server(service) as (url, _):
        yield url


@contextmanager
def live_server(service: Service) -> Iterator[tuple[str, Any]]:
    """As `live`, with the server itself."""
    import uvicorn

    from deltaw.serve.http.app import Draining, create_app
    from deltaw.serve.http.server import Server, listen

    opened, draining = listen("127.0.0.1", 0), Draining()
    server = Server(uvicorn.Config(create_app(service, draining), log_level="warning", lifespan="off",
                                   timeout_graceful_shutdown=1), service, draining)
    opened.listen(64)  # as `serve` does: who comes before the thread is ready waits and is not refused
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{opened.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(10)
        opened.close()


@pytest.fixture(scope="module")
def server(base_folder: Path, adapter_folders: dict[str, Path]) -> Iterator[str]:
    """A live server of all adapters, for tests that change nothing."""
    with open_service(config(base_folder), adapter_folders) as running, live(running) as url:
        yield url


def tokens_of(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]
