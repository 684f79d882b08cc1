"""Whether an adapter can run on the base that is served, and its factors in the form that `banks` holds.

The checks are those of the switchboard. What cannot run row by row beside other adapters is refused with the way out:
a change of a bias, an embedding, stacked experts or a module trained in full has to be merged first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from deltaw import bases, store
from deltaw.core import Adapter
from deltaw.core.state import SwitchState
from deltaw.errors import AdapterFileError, BaseMismatchError, Fault
from deltaw.inject import Hosts, find_sites
from deltaw.serve.banks import Factors
from deltaw.switch import values


@dataclass(frozen=True, slots=True)
class Fitted:
    """An adapter in memory: A (R, I) and s·Bᵀ (R, O) by site."""

    factors: Factors
    nbytes: int


class Fitting:
    """One base, and what its adapters are checked against."""

    def __init__(self, model: nn.Module, *, dtype: torch.dtype, any_base: bool = False) -> None:
        self.model, self.dtype, self.any_base = model, dtype, any_base
        self.site_map = find_sites(model)
        self._hosts = Hosts(model, SwitchState())
        self._fingerprint = bases.fingerprint(self._parameters())

    @torch.no_grad()
    def fit(self, adapter: Adapter) -> Fitted:
        """The adapter's factors; raises BaseMismatchError and AdapterFileError for what cannot run on this base."""
        adapter = store.settle_parameters(adapter, self._parameter_names)
        others = [f"'{name}' ({site.geometry.kind})" for name, site in adapter.sites.items()
                  if site.geometry.kind != "linear"]
        if others:
            listed = ", ".join(others[:3]) + (", ..." if others[3:] else "")
            raise AdapterFileError(Fault("adapter", f"changes {listed}",
                                         "linear layers alone, to run beside others in one batch",
                                         "Merge it into a base of its own: deltaw merge"))
        recorded = adapter.facts.get("base")
        if recorded and not self.any_base:
            fault = bases.compare(bases.Fingerprint.from_dict(recorded), self._fingerprint)
            if fault is not None:
                raise BaseMismatchError(fault)
        targets = values.targets_of(adapter, self.model, self.site_map)
        factors = {}
        for site, delta in values.fitting(adapter, targets, self.site_map, self._hosts):
            scale = adapter.config.scaling(site.geometry.rank_of(delta.A, delta.B), site.name)
            B_OR = site.geometry.dense_out(delta.B.to(self.dtype))
            B_RO = torch.empty(B_OR.shape[::-1], dtype=self.dtype)
            factors[site.name] = delta.A.to(self.dtype), torch.mul(B_OR.t(), scale, out=B_RO)
        return Fitted(factors, sum(A.nbytes + B.nbytes for A, B in factors.values()))

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.model.named_parameters())

    def _parameter_names(self, module: str) -> list[str]:
        found = self.site_map.modules.get(module)
        return [] if found is None else list(found._parameters)
