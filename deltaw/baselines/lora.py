"""LoRA as a part among others, for LoRA + PreEmbed and LoRA + PreLayer (Hu et al. 2021, appendix E)."""

from __future__ import annotations

from torch import nn

from deltaw.baselines.part import Part, Row
from deltaw.core import LoraConfig
from deltaw.switch import attach, detach


class LoraPart(Part):
    """One adapter of a switchboard of its own."""

    kind = "lora"
    NAME = "default"

    def __init__(self, model: nn.Module, config: LoraConfig, seed: int, name: str = NAME) -> None:
        self.name = name
        self.board = attach(model, config, name, seed=seed)

    def parameters(self) -> dict[str, nn.Parameter]:
        """"<site>.lora_A" and so on."""
        return self.board.parameters(self.name)

    def turn(self, on: bool) -> None:
        """Use the adapter, or nothing."""
        self.board.use(self.name if on else None)

    def remove(self) -> None:
        """Take the board off."""
        detach(self.board.model)

    def rows(self) -> list[Row]:
        """One line for each site."""
        return [Row(t.site.name, t.site.kind, tuple(t.site.geometry.shape), t.rank, t.parameters)
                for t in self.board.table(self.name)]
