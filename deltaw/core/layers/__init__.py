"""The layers: what is put on a module of the base so that it adds its adapters' changes, one kind to a file."""

from deltaw.core.layers.adapted import (
    CHILD,
    Adapted,
    Rows,
    floating,
    parameter_owner,
    replace_parameter,
)
from deltaw.core.layers.conv import AdaptedConv
from deltaw.core.layers.embedding import AdaptedEmbedding
from deltaw.core.layers.linear import AdaptedLinear
from deltaw.core.layers.saved import SAVED_CHILD, AdaptedModule
from deltaw.core.layers.shared_input import watching
from deltaw.core.layers.sharing import plain_layers, share
from deltaw.core.layers.slots import LowRank, Slot, TrainedBias
from deltaw.core.layers.substituted import AdaptedAttention, AdaptedParameters

__all__ = [
    "CHILD",
    "SAVED_CHILD",
    "Adapted",
    "AdaptedAttention",
    "AdaptedConv",
    "AdaptedEmbedding",
    "AdaptedLinear",
    "AdaptedModule",
    "AdaptedParameters",
    "LowRank",
    "Rows",
    "Slot",
    "TrainedBias",
    "floating",
    "parameter_owner",
    "plain_layers",
    "replace_parameter",
    "share",
    "watching",
]
