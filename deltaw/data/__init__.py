"""Examples: read from where they lie, tokenised with the model's own template, and streamed in seeded batches.

`load_data` does the first two in one call; `BatchStream` and `collate` make batches of what it gives.
"""

from deltaw.data.collate import collate, pack
from deltaw.data.columns import EncodeStats
from deltaw.data.examples import EncodedData, Example, LabelledExample, Prompt, load_data
from deltaw.data.read import available_splits, judged_split, open_source
from deltaw.data.rows import Chat, Labelled, Message, PromptCompletion, Text, find_layout
from deltaw.data.source import Row, Source
from deltaw.data.stream import BatchStream, Subset, in_order, split_valid

__all__ = [
    "BatchStream", "Chat", "EncodeStats", "EncodedData", "Example", "Labelled", "LabelledExample", "Message", "Prompt",
    "PromptCompletion", "Row", "Source", "Subset", "Text", "available_splits", "collate", "find_layout", "in_order",
    "judged_split", "load_data", "open_source", "pack", "split_valid",
]
