"""`merge_files`: a model folder and an adapter become a new model folder, which plain transformers loads.

    plan     read headers, name every tensor, check all names, shapes and the base's fingerprint
    apply    write every file of weights into a folder beside the target, tensor by tensor
    settle   copy tokenizer and templates, write the config, and rename the folder into place

A merge that fails or is killed leaves nothing at the target. The fingerprint is compared as it is when an adapter is
attached, over the names that the model has in memory. Where these are not known (an architecture with code of its own,
an adapter of a body merged into a whole model) only names and shapes are checked, and the report says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from deltaw import __version__, bases, store
from deltaw.bases import gguf
from deltaw.bases.sources import find_base, read_config
from deltaw.core import Adapter
from deltaw.core.survival import LEAST_SURVIVAL, SiteChange, survival, worst
from deltaw.errors import BaseMismatchError, BaseModelError, ConfigError, Fault, StateError, near
from deltaw.merge.apply import Writer
from deltaw.merge.checkpoint import Checkpoint, Stored, read_checkpoint
from deltaw.merge.plan import Plan, make_plan
from deltaw.merge.skeleton import Skeleton, build_skeleton, recorded_labels
from deltaw.merge.target import RECORD, copy_companions, new_folder, usable_target
from deltaw.merge.unpacked import METHOD, unpacked

_WORST = 3
BaseCheck = Literal["weights", "shapes", "not recorded", "skipped"]
Into = Literal["16bit", "requantized"]
INTO: tuple[Into, ...] = ("16bit", "requantized")
Weights = Literal["original", "dequantized", "requantized"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What a merge wrote."""

    out_dir: Path
    files: tuple[str, ...]
    """Every file of the folder."""
    changes: tuple[SiteChange, ...]
    """What happened to each changed tensor."""
    tensors: int
    """Number of tensors in the folder."""
    bytes: int
    """Size of the weights."""
    seconds: float
    base_check: BaseCheck
    """How it was checked that the adapter was made for this base: its sampled weights, or names and shapes only."""
    weights: Weights
    """What the change was added to: the folder's own floating-point weights, the values of its packed ones, or these
    values and the sum packed again."""
    quantization: str | None
    """How the base's folder is packed ("nf4", ...); None for floating-point weights."""
    untied: bool
    """Whether tied weights got values of their own, so that the config says `tie_word_embeddings: false`."""

    @property
    def changed(self) -> float:
        """Share of the changed tensors' values that are stored differently than before."""
        entries = sum(change.entries for change in self.changes)
        return sum(change.changed for change in self.changes) / entries if entries else 0.0

    @property
    def survived(self) -> float | None:
        """The share of the change that survived packing, of all packed tensors together; None where none is packed."""
        return survival(self.changes)

    @property
    def largest(self) -> float:
        """The largest |ΔW| of all, before rounding."""
        return max((change.largest for change in self.changes), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "out_dir": str(self.out_dir), "changed": self.changed, "largest": self.largest,
                "survived": self.survived}


def merge_files(model_dir: str | Path, adapter: Adapter | str | Path, out_dir: str | Path, *,
                into: Into | None = None, dtype: torch.dtype | str | None = None, any_base: bool = False,
                overwrite: bool = False, least_survival: float = LEAST_SURVIVAL, force: bool = False,
                progress: Callable[[int, int], None] | None = None) -> MergeReport:
    """Write the base with an adapter's change in its weights to a new folder; the report says what changed.

    `model_dir` is a base as `deltaw.bases.load_base` takes it: a folder, a Hub id, "package:NAME" or a GGUF file, which
    is converted first and needs the memory of the whole model once. Otherwise one tensor is in memory at a time.
    Tensors that the adapter does not touch are copied byte for byte, unless `dtype` asks for another one. `progress` is
    called with the bytes of weights written and their total. An existing model folder at `out_dir` is replaced only
    with `overwrite`; `any_base` skips the comparison of fingerprints.

    A folder that bitsandbytes packed needs `into`: "16bit" writes floating-point weights, the values of the packed ones
    with the change; "requantized" packs the sum again, in the base's own way, and measures which share of the change
    survived. Below `least_survival` of all of it, by energy, this is refused unless `force`. For the best weights, give
    the model as it was before it was packed; `MergeReport.weights`, and `deltaw_merge.json` in the folder, say which
    were used.

    Raises BaseModelError, AdapterFileError, BaseMismatchError (names, shapes or weights of another base), StateError (a
    change that has no merged form, values that are not finite) and ConfigError (`out_dir`, `dtype`, a full disk).

    >>> merge_files("models/base", "adapters/sql", "models/sql")                              # doctest: +SKIP
    """
    began = time.perf_counter()
    wanted = _dtype(dtype)
    _check_options(into, wanted, least_survival)
    value = adapter if isinstance(adapter, Adapter) else store.load(adapter)
    folder = base_folder(str(model_dir), wanted)
    target = usable_target(Path(out_dir), folder, overwrite=overwrite)
    config = read_config(find_base(str(folder)))
    method = _packed_by(config, str(model_dir), into)
    checkpoint = read_checkpoint(folder)
    skeleton = build_skeleton(folder, value)
    if method:
        checkpoint = unpacked(checkpoint, skeleton)
    if skeleton is not None:
        value = store.settle_parameters(value, skeleton.parameters_of)
    plan = make_plan(value, checkpoint, skeleton)
    if skeleton is None:
        _check_untied(config, plan)
    check = check_base(value, checkpoint, skeleton, plan, any_base=any_base)
    weights: Weights = "original" if not method else "requantized" if into == "requantized" else "dequantized"
    writer = Writer(value, checkpoint, skeleton, plan, wanted, progress, repack=weights == "requantized")
    with new_folder(target, writer.total) as new:
        files = [*writer.write(new), *copy_companions(folder, new), "config.json", RECORD]
        if not force:
            _check_survival(writer.changes, least_survival)
        report = MergeReport(out_dir=target, files=tuple(sorted(files)), changes=tuple(writer.changes),
                             tensors=len(plan.outputs), bytes=writer.total, seconds=time.perf_counter() - began,
                             base_check=check, weights=weights, quantization=method, untied=plan.unties)
        if weights == "dequantized":
            config = {key: value for key, value in config.items() if key != "quantization_config"}
        _write_json(new / "config.json", _new_config(config, plan, skeleton, value, wanted))
        _write_json(new / RECORD, _record(report, str(model_dir)))
    return report


# ------------------------------------------------------------------------------------------------------------- inputs


def _dtype(requested: torch.dtype | str | None) -> torch.dtype | None:
    if requested is None or requested == "auto":
        return None
    return bases.choose_dtype(requested, "cpu")[0]


def base_folder(model: str, dtype: torch.dtype | None) -> Path:
    """The folder of the base's safetensors; of a GGUF file, its conversion (float32 unless asked otherwise)."""
    place = find_base(model)
    if place.gguf is None:
        return place.folder
    kept = gguf.converted(place.gguf, dtype or torch.float32) or gguf.convert(place.gguf, dtype or torch.float32)[0]
    if kept is None:
        raise BaseModelError(Fault(f"base '{model}'", "its conversion could not be kept",
                                   remedy="Set DELTAW_HOME to a folder with room"))
    return kept


def _check_options(into: str | None, dtype: torch.dtype | None, least: float) -> None:
    faults = []
    if into not in (None, *INTO):
        faults.append(Fault("into", f"got {into!r}", " or ".join(INTO), near(str(into), INTO)))
    if into == "requantized" and dtype is not None:
        faults.append(Fault("dtype", f"got {dtype}, which fits no packed weights", "into '16bit' with it",
                            "Leave it out, or merge into 16bit"))
    if not 0 <= least <= 1:
        faults.append(Fault("least_survival", f"got {least}", "a share between 0 and 1"))
    if faults:
        raise ConfigError(*faults)


def _packed_by(config: dict[str, Any], source: str, into: str | None) -> str | None:
    """How the folder's weights are packed; None where they are plain numbers. Raises where `into` does not fit them."""
    about = config.get("quantization_config")
    if not about:
        if into == "requantized":
            raise ConfigError(Fault("into", "got 'requantized' for a base of plain numbers", "a base that bitsandbytes "
                                    "packed", "Leave it out; to pack the result, quantize the merged model"))
        return None
    about = dict(about)
    if about.get("quant_method", METHOD) != METHOD:
        raise BaseModelError(Fault(f"base '{source}'", f"is quantized ({about['quant_method']})",
                                   f"floating-point weights, or those that {METHOD} packed",
                                   "Merge into the base as it was before quantization, then quantize the result"))
    kind = "int8" if about.get("load_in_8bit") else str(about.get("bnb_4bit_quant_type", "nf4"))
    if into is None:
        raise BaseModelError(Fault(f"base '{source}'", f"is quantized ({METHOD} {kind})", "a choice of what to merge "
                                   "into", "Pass into='16bit' (its dequantized weights) or into='requantized'; or "
                                   "merge into the base as it was before quantization"))
    return kind


def _check_survival(changes: Sequence[SiteChange], least: float) -> None:
    share = survival(changes)
    if share is None or share >= least:
        return
    faults = [Fault("the merge", f"only {share:.1%} of the change survives rounding to the packed weights",
                    f"at least {least:.0%}", "Merge into 16bit, or keep the adapter beside the base; force=True "
                    "(--force) merges nevertheless")]
    faults += [Fault(f"'{change.tensor}'", f"{change.survived:.1%} of its change survives") for change
               in worst(changes, _WORST)]
    raise StateError(*faults)


def _check_untied(config: dict[str, Any], plan: Plan) -> None:
    """Refuse to change an embedding of a model with unknown ties: its other end would change with it, or be lost."""
    vocabulary = {part.get("vocab_size") for part in (config, *config.values()) if isinstance(part, dict)}
    changed = [o.name for o in plan.outputs if o.edit and len(o.shape) == 2 and o.shape[0] in vocabulary]
    if changed and config.get("tie_word_embeddings", True):
        raise StateError(Fault(f"'{changed[0]}'", "may be tied to another tensor, and transformers does not know this "
                               "architecture", "untied embeddings",
                               "Merge in memory: deltaw.detach(model, merge=name), then model.save_pretrained(folder)"))


def check_base(adapter: Adapter, checkpoint: Checkpoint, skeleton: Skeleton | None, plan: Plan, *,
                any_base: bool) -> BaseCheck:
    """Compare the base's fingerprint with the adapter's; raises BaseMismatchError, says what could be compared."""
    recorded = adapter.facts.get("base")
    if any_base:
        return "skipped"
    if not recorded:
        return "not recorded"
    if skeleton is None or not plan.same_names:
        return "shapes"
    known = bases.Fingerprint.from_dict(recorded)
    saved = tuple(f"{name}." for name, site in adapter.sites.items() if site.geometry.kind == "saved")
    tensors = _on_disk(checkpoint, skeleton)
    whole = bases.fingerprint(tensors)
    # A head that is new for the task may or may not count to the base.
    body = bases.fingerprint([(name, t) for name, t in tensors if not name.startswith(saved)]) if saved else whole
    current = body if body.architecture == known.architecture else whole
    fault = bases.compare(known, current)
    if fault is not None:
        raise BaseMismatchError(fault)
    return "weights"


def _on_disk(checkpoint: Checkpoint, skeleton: Skeleton) -> list[tuple[str, Tensor]]:
    """The model's parameters with their values mapped from disk; without values where disk holds them otherwise."""
    from safetensors import safe_open

    stored: dict[str, Stored] = {live: checkpoint.tensors[name] for name, (live, in_parts)
                                 in skeleton.live_names(list(checkpoint.tensors)).items() if not in_parts}
    opened = {file: safe_open(checkpoint.folder / file, framework="pt")
              for file in checkpoint.metadata}
    found = []
    for name, empty in skeleton.parameters():
        on_disk = stored.get(name) or stored.get(skeleton.tied.get(name, name))
        fits = on_disk is not None and on_disk.is_float and not on_disk.parts and on_disk.shape == tuple(empty.shape)
        if on_disk is not None and fits:
            found.append((name, opened[on_disk.file].get_tensor(on_disk.name)))  # type: ignore[no-untyped-call]
        else:
            found.append((name, empty))
    return found


# ------------------------------------------------------------------------------------------------------------ outputs


def _new_config(config: dict[str, Any], plan: Plan, skeleton: Skeleton | None, adapter: Adapter,
                dtype: torch.dtype | None) -> dict[str, Any]:
    """The base's config, with what the merge changed."""
    new = dict(config)
    if dtype is not None:
        _set_everywhere(new, ("dtype", "torch_dtype"), str(dtype).removeprefix("torch."), default="dtype")
    if plan.unties:
        _set_everywhere(new, ("tie_word_embeddings",), False, default="tie_word_embeddings")
    if skeleton is not None and adapter.config.task_type == "SEQ_CLS":
        made = skeleton.model.config
        names = recorded_labels(adapter)
        labels = dict(enumerate(names)) if len(names) == made.num_labels else made.id2label
        new |= {"architectures": [type(skeleton.model).__name__], "id2label": labels,
                "label2id": {label: number for number, label in labels.items()}}
        new.pop("num_labels", None)
    return new


def _record(report: MergeReport, base: str) -> dict[str, Any]:
    """What `deltaw_merge.json` says: which weights these are."""
    return {"format": 1, "deltaw": __version__, "base": base, "weights": report.weights,
            "quantization": report.quantization, "survived": report.survived,
            "sites": {change.tensor: {"survived": change.survived, "lost": change.lost} for change in report.changes}}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _set_everywhere(config: dict[str, Any], keys: tuple[str, ...], value: object, *, default: str) -> None:
    """Set the keys wherever they stand, also in the configs of a model's parts; the default key at the top."""
    if not any(key in config for key in keys):
        config[default] = value
    for key, found in list(config.items()):
        if key in keys:
            config[key] = value
        elif isinstance(found, dict) and any(k in found for k in keys):
            config[key] = dict(found)
            _set_everywhere(config[key], keys, value, default=next(k for k in keys if k in found))
