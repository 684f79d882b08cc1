"""What a server is asked to be: one frozen value, checked as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal

from deltaw.core.formats import tables_alone
from deltaw.errors import ConfigError, Fault

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Which base, which limits, and who may do what."""

    model: str
    """The base: a Hub id, a local folder, a GGUF file or package:NAME."""
    device: str = "auto"
    """Where to compute: cpu, cuda, mps, or auto (a GPU where there is one)."""
    dtype: str = "auto"
    """Number format of the base: bf16, fp32, fp16, or auto (bf16 where the processor is fast at it)."""
    quantize: Literal["none", "nf4", "fp4", "int8"] = "none"
    """Store the base's linear layers in 4 or 8 bits while it is loaded: nf4, fp4 or int8."""
    double_quant: bool = True
    """With nf4 and fp4, pack the scales of the blocks too."""
    quantize_tables: Literal["none", "int8"] = "none"
    """With quantize, store the embedding and the output layer too: int8, one scale for each row."""
    any_base: bool = False
    """Serve adapters although they were made for another base of the same shapes."""
    served_name: str | None = None
    """What requests call the base; by default what --model says."""
    engine: Literal["deltaw", "vllm"] = "deltaw"
    """vllm starts vLLM, which has to be installed, with the same adapters, names and address."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is every network this machine is in."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    api_key: str | None = None
    """Key that every request must bring as a bearer token; DELTAW_API_KEY gives it without showing it."""
    allow_runtime_loading: bool = False
    """Let clients load and unload adapters while the server runs; needs --adapter-root."""
    adapter_root: str | None = None
    """The only folder that clients may load adapters from."""
    context: int = 2048
    """Longest sequence of prompt and answer, in tokens; at most what the base takes."""
    places: int = 16
    """How many answers are written at the same time."""
    prefill_tokens: int = 512
    """Tokens of prompts computed in one step; fewer let those who write wait less."""
    adapter_memory: int = 1024
    """MiB for adapters in memory; those used longest ago leave first."""
    auto_merge: float = 0.0
    """Put an adapter into the weights once it has been alone for so many seconds; 0 never does."""
    max_tokens: int = 1024
    """Longest answer that a request may ask for, in tokens."""
    max_prompt_tokens: int | None = None
    """Longest prompt, in tokens; by default what --context leaves."""
    max_request_bytes: int = 4 * MIB
    """Longest body of a request, in bytes."""
    max_waiting: int = 256
    """Requests that may wait for a place; the next are told to come back."""
    timeout: float = 600.0
    """Seconds after which an answer ends, written or not."""
    drain: float = 30.0
    """Seconds that answers under way have to end in when the server is asked to stop."""
    threads: int | None = None
    """Threads to compute with; by default one for each core."""
    kernel: bool = True
    """On a CPU, compute models of Llama's structure with a kernel that the C compiler makes at the first start."""

    def __post_init__(self) -> None:
        ranges = [("port", 0 <= self.port < 65536, "0 to 65535"), ("context", self.context >= 2, "at least 2"),
                  ("places", 1 <= self.places <= 4096, "1 to 4096"), ("drain", self.drain >= 0, "at least 0"),
                  ("timeout", self.timeout > 0, "above 0"), ("auto_merge", self.auto_merge >= 0, "at least 0")]
        ranges += [(name, getattr(self, name) >= 1, "at least 1") for name in
                   ("prefill_tokens", "adapter_memory", "max_tokens", "max_request_bytes", "max_waiting")]
        ranges += [(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
                   for name in ("threads", "max_prompt_tokens")]
        faults = [Fault(f"ServeConfig.{name}", f"got {getattr(self, name)}", expected)
                  for name, right, expected in ranges if not right]
        if self.allow_runtime_loading and self.adapter_root is None:
            faults.append(Fault("ServeConfig.allow_runtime_loading", "is on without a folder to load from",
                                "--adapter-root too"))
        if self.quantize != "none" and self.engine == "vllm":
            faults.append(Fault("ServeConfig.quantize", f"is {self.quantize}, which --engine vllm cannot be told",
                                "--engine deltaw, or a base that is stored quantized"))
        alone = tables_alone("ServeConfig.quantize_tables", self.quantize, self.quantize_tables)
        faults += [alone] if alone is not None else []
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            faults.append(Fault("ServeConfig.api_key", "cannot be sent in a header", "printable ASCII characters"))
        if faults:
            raise ConfigError(*faults)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
