"""`Tuning`: what a training run varies. The loop, the doctor and the checkpoints know a run through this alone.

LoRA is one tuning; full fine-tuning or a prompt would be others. A tuning names its tensors "<site>.<tensor>", so that
a check can say which place of the network a tensor belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from deltaw.baselines import Row
from deltaw.bases import Fingerprint
from deltaw.inject import factors_as_drawn
from deltaw.store.locate import CONFIG_FILE, RECORD_FILE, TENSORS_FILE
from deltaw.switch import Switchboard


class Tuning(Protocol):
    """Trained tensors inside a model that otherwise stays as it is."""

    @property
    def model(self) -> nn.Module:
        """The whole network, trained tensors included."""

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """All trained tensors by name, and nothing else."""

    def note(self, **facts: Any) -> None:
        """Record facts that are saved with the tensors."""

    def save(self, path: Path) -> None:
        """Write the trained tensors to a folder, for use without this run."""


class Attached(Tuning, Protocol):
    """A tuning of a whole run, which looks at the base beside it and chooses how to compute: LoRA, or a baseline."""

    @property
    def board(self) -> Switchboard | None:
        """The switchboard of the low-rank changes among what is trained."""

    @property
    def packs(self) -> bool:
        """Whether it goes with rows that hold several examples."""

    @property
    def compiles(self) -> bool:
        """Whether it goes with compiled layers."""

    @property
    def file_names(self) -> Sequence[str]:
        """The files that `save` writes."""

    def off(self) -> AbstractContextManager[None]:
        """The base alone for the length of the block."""

    def forget_base(self) -> None:
        """Drop what only `off` needs; it is not called any more."""

    def fingerprint(self) -> Fingerprint:
        """What identifies the base's weights."""

    def rows(self) -> Sequence[Row]:
        """What is changed, line by line."""


class LoraTuning:
    """One adapter of a switchboard."""

    packs = compiles = True
    file_names = (CONFIG_FILE, TENSORS_FILE, RECORD_FILE)

    def __init__(self, board: Switchboard, name: str = "default", *, freeze_a: bool = False) -> None:
        """With `freeze_a` every A stays as it was drawn and only the rest is trained (`inject.factors_as_drawn`)."""
        self.board, self.name = board, name
        self._frozen = factors_as_drawn(board.table(name)) if freeze_a else set()
        for name_, parameter in board.parameters(name).items():
            if name_ in self._frozen:
                parameter.requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The model that the adapter is attached to."""
        return self.board.model

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The adapter's trained tensors, "<site>.lora_A" and so on."""
        return {name: p for name, p in self.board.parameters(self.name).items() if name not in self._frozen}

    def note(self, **facts: Any) -> None:
        """Record facts in the adapter's `deltaw.json`."""
        self.board.note(self.name, **facts)

    def save(self, path: Path) -> None:
        """Write the adapter's folder."""
        self.board.adapter(self.name).save(path)

    def off(self) -> AbstractContextManager[None]:
        """The base alone for the length of the block."""
        return self.board.off()

    def forget_base(self) -> None:
        """Nothing: the base's weights are in use."""

    def fingerprint(self) -> Fingerprint:
        """What identifies the base's weights."""
        return self.board.fingerprint()

    def rows(self) -> list[Row]:
        """One line for each site."""
        return [Row(t.site.name, t.site.kind, tuple(t.site.geometry.shape), t.rank, t.parameters)
                for t in self.board.table(self.name)]


class PartTuning:
    """Some parameters of any module, by name; the others are the base. For heads, probes and comparisons."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._model, self._parameters, self.facts = model, dict(parameters), dict[str, Any]()

    @property
    def model(self) -> nn.Module:
        """The whole network."""
        return self._model

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The chosen parameters."""
        return self._parameters

    def note(self, **facts: Any) -> None:
        """Keep facts for `save`."""
        self.facts.update(facts)

    def save(self, path: Path) -> None:
        """Write the chosen parameters to `path`/model.safetensors."""
        from safetensors.torch import save_file

        path.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().contiguous() for name, p in self._parameters.items()}, path / "model.safetensors")


def base_parameters(tuning: Tuning) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter that is neither the tuning's nor another adapter's, which has a run of its own."""
    apart = {id(parameter) for parameter in tuning.parameters().values()}
    if isinstance(tuning, LoraTuning):
        board = tuning.board
        apart |= {id(p) for name in board.names if name != tuning.name for p in board.parameters(name).values()}
    for name, parameter in tuning.model.named_parameters():
        if id(parameter) not in apart:
            yield name, parameter


def frozen_tensors(tuning: Tuning) -> Iterator[tuple[str, Tensor]]:
    """The base: every stored buffer, and every parameter that no adapter brings."""
    yield from base_parameters(tuning)
    for prefix, module in tuning.model.named_modules():
        # A buffer that is not stored (a table of rotary angles, say) is working memory and may change.
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer
