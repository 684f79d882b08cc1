"""The frozen network: load it, choose its precision, recognise it again, and speak its chat template."""

from deltaw.bases.device import chosen_device
from deltaw.bases.fingerprint import Fingerprint, compare, fingerprint
from deltaw.bases.heads import head_modules
from deltaw.bases.load import Base, load_base
from deltaw.bases.precision import choose_dtype
from deltaw.bases.stops import stop_tokens, turn_end
from deltaw.bases.template import describe_mismatch, render, require_template, template_hash, tokenizer_hash

__all__ = [
    "Base", "Fingerprint", "choose_dtype", "chosen_device", "compare", "describe_mismatch", "fingerprint",
    "head_modules", "load_base", "render", "require_template", "stop_tokens", "template_hash", "tokenizer_hash",
    "turn_end",
]
