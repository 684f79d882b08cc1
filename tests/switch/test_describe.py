"""The printed table names every site once and counts what is trained."""

from __future__ import annotations

from torch import nn

from deltaw.core import LoraConfig
from deltaw.switch import attach


def test_like_sites_share_a_line_and_the_sum_is_exact() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(6, 4)}) for _ in range(3)),
                           "head": nn.Linear(4, 2)})
    board = attach(model, LoraConfig(r=2, target_modules=["q", "head"], rank_pattern={"head": 1}), name="sql")
    text = str(board)
    count = sum(p.numel() for p in board.parameters("sql").values())
    assert f"sql (on): 4 sites, {count} values" in text
    for part in ("layers.*.q", "x 3", "4x6"):
        assert part in text
    assert text.count("head") == 1
    board.use({"sql": 0.5})
    assert "on, weight 0.5" in str(board)
    board.use(None)
    assert "sql (off)" in str(board)
