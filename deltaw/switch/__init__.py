"""Which changes are on: the switchboard, routing, and merging with exact undo."""

from deltaw.switch.attachment import attach, board, detach
from deltaw.switch.pretrained import reference
from deltaw.switch.switchboard import Switchboard

__all__ = ["Switchboard", "attach", "board", "detach", "reference"]
