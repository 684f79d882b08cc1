"""Which changes are on: the switchboard, routing, and merging with exact undo."""

from deltaw.switch.attach import attach, board, detach
from deltaw.switch.board import Switchboard

__all__ = ["Switchboard", "attach", "board", "detach"]
