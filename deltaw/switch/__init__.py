"""Which changes are on: the switchboard, routing, and merging with exact undo."""

from deltaw.switch.attachment import attach, board, detach
from deltaw.switch.banks import Banks
from deltaw.switch.pretrained import reference
from deltaw.switch.switchboard import Switchboard

__all__ = ["Banks", "Switchboard", "attach", "board", "detach", "reference"]
