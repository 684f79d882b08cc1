"""The doctor: checks in every training run that it learns what it should and harms nothing else.

    before          there is something to train, and nothing but the tuning is trainable
    every step      the batch has supervised tokens; loss and gradient are finite
    first steps     some tensor has a gradient at once, each has one within a window, and each that began at zero moved
    end             every tensor moved; the base has the same bits as before

A LoRA whose B is zero gives A no gradient at the first step, and an embedding sees only some tokens: so a tensor passes
with one non-zero gradient in the window. The window counts steps with a learning rate above zero. A check that fails
stops the run and names the tensors, the likely cause and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from deltaw.core.packed import reordered
from deltaw.errors import DoctorError, Fault, NonFiniteError
from deltaw.train.checksum import checksum, checksums
from deltaw.train.tuning import Tuning, base_parameters, frozen_tensors

_NO_GRADIENT = (
    "The path from the loss to them is cut or they are not used: look for detach() or no_grad() in the model, "
    "reentrant gradient checkpointing over frozen inputs, or modules that these examples never reach; the last can be "
    "left out with exclude_modules or accepted with allow_unused"
)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at and found right (or, where it is only reported, left to judge)."""

    name: str
    found: str


class Doctor:
    """Watches one run. Each method raises `DoctorError` or `NonFiniteError`, or notes what it found in `checks`."""

    def __init__(self, tuning: Tuning, *, window: int = 3, allow_unused: bool = False) -> None:
        self.tuning, self.window, self.allow_unused = tuning, window, allow_unused
        self.checks: list[Check] = []
        self.base: Mapping[str, int] | None = None
        """Checksums of the base by name; taken at the start, unless somebody who watches the same base has them."""
        self._parameters = dict(tuning.parameters())
        self._waiting = set(self._parameters)  # tensors without a gradient so far
        self._effective = 0  # steps with a learning rate above zero
        self._least_units: int | None = None

    # -- before ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Check what is trainable, and remember the bits of everything."""
        parameters = self._parameters
        faults = []
        count = sum(p.numel() for p in parameters.values())
        if not count:
            faults.append(Fault("the tuning", "has no tensors to train", "at least one", "Check target_modules"))
        frozen = [name for name, p in parameters.items() if not p.requires_grad]
        if frozen:
            faults.append(Fault("the tuning", f"does not train {_listed(frozen)}",
                                "requires_grad on all of its tensors", "Attach with trainable=True"))
        others = [name for name, p in base_parameters(self.tuning) if p.requires_grad]
        if others:
            faults.append(Fault("the base", f"is trainable at {_listed(others)}", "only the tuning's tensors trainable",
                                "Freeze them with requires_grad_(False), or name their module in modules_to_save"))
        without = reordered(self.tuning.model)
        if without:
            faults.append(Fault("the base", f"passes no gradient through {_listed(without)}, which bitsandbytes has "
                                "reordered for evaluation on this processor", "4-bit layers as they were loaded",
                                "Load the base anew and attach before its first forward in evaluation mode; a base "
                                "from deltaw.load_base is never reordered"))
        if faults:
            raise DoctorError(*faults)
        if self.base is None:
            self.base = checksums(frozen_tensors(self.tuning))
        self._began = {name: checksum(p) for name, p in parameters.items()}
        self._zero = {name for name, p in parameters.items() if not torch.count_nonzero(p.detach())}
        sites = {name.rpartition(".")[0] for name in parameters}
        self.checks.append(Check("trainable", f"{count:,} values in {len(parameters)} tensors at {len(sites)} sites"))

    # -- every step --------------------------------------------------------------------------------------------------

    def check_units(self, step: int, units: int, where: Iterable[Sequence[str]]) -> None:
        """A step must have something to learn from."""
        if not units:
            raise DoctorError(Fault(f"step {step}", f"has no supervised token in its rows ({_rows(where)})",
                                    "at least one", "All labels are masked: check train_on, max_length (truncation may "
                                    "have cut the answers off) and that the answers are not empty"))
        self._least_units = units if self._least_units is None else min(self._least_units, units)

    def check_loss(self, step: int, losses: Sequence[float], where: Sequence[Sequence[str]]) -> None:
        """The loss of every micro-batch must be finite."""
        bad = [rows for loss, rows in zip(losses, where, strict=True) if not _finite(loss)]
        if bad:
            worst = next(loss for loss in losses if not _finite(loss))
            raise NonFiniteError(Fault(f"step {step}", f"the loss is {worst} on rows {_rows(bad)}", "a finite loss",
                                       "Lower learning_rate, use dtype fp32, or look at these rows"))

    def check_gradients(self, step: int, rate: float, norm: float) -> None:
        """The gradient must be finite, and within the window each tensor must have had one that is not zero."""
        if not _finite(norm):
            bad = [n for n, p in self._parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
            raise NonFiniteError(Fault(f"step {step}", f"the gradient is not finite in {_listed(bad)}",
                                       "finite gradients", "Lower learning_rate or max_grad_norm, or use dtype fp32"))
        if not self._waiting:
            return
        self._waiting -= {name for name in self._waiting if _has_gradient(self._parameters[name])}
        if len(self._waiting) == len(self._parameters):
            raise DoctorError(Fault(f"step {step}", "no tensor of the tuning got a gradient",
                                    "a gradient in some at the first step", _NO_GRADIENT))
        if self._effective + (rate > 0) >= self.window and not self.allow_unused:
            self._fail_on_missing_gradients(f"within {self.window} steps")
        if not self._waiting:
            self.checks.append(Check("gradients", f"a finite, non-zero gradient in all {len(self._parameters)} tensors "
                                     f"by step {step}"))

    def check_movement(self, step: int, rate: float) -> None:
        """At the end of the window every tensor that began at zero must have moved: every B of a LoRA."""
        self._effective += rate > 0
        if self._effective != self.window or not rate > 0:
            return
        self._fail_on_still(self._still_zero(), f"by step {step}")
        self.checks.append(Check("movement", f"all {len(self._zero)} tensors that began at zero moved by step {step}"))

    # -- end ---------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Every tensor must have moved, and the base must have kept its bits."""
        now, before = checksums(frozen_tensors(self.tuning)), self.base or {}
        changed = [name for name, bits in now.items() if before.get(name) != bits]
        if changed:
            raise DoctorError(Fault("the base", f"changed at {_listed(changed)}", "the bits it had before training",
                                    "Something other than the tuning wrote to it: an optimizer with all of the model's "
                                    "parameters, or a norm that updates its statistics (put it in eval mode)"))
        self.checks.append(Check("base", f"all {len(now)} tensors have the bits they had before"))
        if self._effective >= 2:  # after a single step a LoRA's A has rightly no gradient yet
            if not self.allow_unused:
                self._fail_on_missing_gradients("in the whole run")
            still = [name for name, p in self._parameters.items() if checksum(p) == self._began[name]]
            self._fail_on_still(still, "by the end")
        if self._waiting:
            self.checks.append(Check("unused", f"no gradient reached {_listed(sorted(self._waiting))}"))
        if self._least_units is not None:
            self.checks.append(Check("supervision", f"at least {self._least_units} supervised tokens in every step"))

    def _fail_on_missing_gradients(self, when: str) -> None:
        if self._waiting and self._effective:  # a B that stays zero keeps the gradient from its A: tell that first
            self._fail_on_still(self._still_zero(), "so far")
        if self._waiting:
            raise DoctorError(Fault("the tuning", f"{len(self._waiting)} of {len(self._parameters)} tensors got no "
                                    f"gradient {when}: {_listed(sorted(self._waiting))}", "a non-zero gradient in each",
                                    _NO_GRADIENT))

    def _still_zero(self) -> list[str]:
        return [name for name in sorted(self._zero) if not torch.count_nonzero(self._parameters[name].detach())]

    def _fail_on_still(self, still: Sequence[str], when: str) -> None:
        still = [name for name in still if name not in self._waiting]
        if still:
            raise DoctorError(Fault("the tuning", f"{len(still)} of {len(self._parameters)} tensors did not move {when}"
                                    f": {_listed(still)}", "a change in each that got a gradient",
                                    "The optimizer does not hold them, or learning_rate is too small for their dtype"))


def _has_gradient(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is not None and bool(torch.count_nonzero(parameter.grad))


def _finite(value: float) -> bool:
    return value - value == 0.0


def _listed(names: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _rows(where: Iterable[Sequence[str]]) -> str:
    return _listed([row for rows in where for row in rows]) or "unknown"
