"""transformers' `Trainer`, TRL's trainers and `push_to_hub` on an attached model: they save adapters, not the base.

`attach` calls `install` on a transformers model, `detach` calls `uninstall`. In between, on this one model object:

    save_pretrained(folder)   writes PEFT's folder for the adapter that is on; further adapters in subfolders by name
    load_state_dict(...)      takes a state of adapters alone, and refuses that of other adapters
    forward(...)              refuses to skip an adapted head, as TRL's fused losses would without a word

In a folder named `checkpoint-<step>`, where `Trainer` keeps its checkpoints, `model.safetensors` stands beside PEFT's
files with the adapters' live tensors: the file that `Trainer` itself reads for `resume_from_checkpoint` and
`load_best_model_at_end`. To save the whole model with a change in its weights instead: `deltaw.detach(model,
merge=name).save_pretrained(folder)`.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from torch import Tensor, nn

from deltaw import store
from deltaw.core import Adapter, SiteDelta
from deltaw.core.layers import CHILD, SAVED_CHILD
from deltaw.errors import ConfigError, Fault, StateError, near
from deltaw.inject import strip
from deltaw.store.atomic import replace_folder

if TYPE_CHECKING:
    from deltaw.switch.switchboard import Switchboard

BOARD = "_deltaw_board"
"""Where `attach` keeps a model's switchboard."""
LIVE_STATE = "model.safetensors"
_SAVE, _HAS_ADAPTERS = "save_pretrained", "_hf_peft_config_loaded"
_CHECKPOINT = re.compile(r"checkpoint-\d+")
# Options of transformers' own method that say how to write a base's weights; adapters are one small file.
_NO_EFFECT = ("max_shard_size", "safe_serialization", "save_original_format", "save_peft_format", "token", "variant")


def install(model: nn.Module, board: Switchboard) -> None:
    """Let a transformers model with this board save and load its adapters; nothing happens to other models."""
    transformers = sys.modules.get("transformers")  # not imported: then no model can be one of its
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        model.__dict__[_SAVE] = Saving(model, board)


def uninstall(model: nn.Module) -> None:
    """Give a model its own `save_pretrained` back."""
    saving = model.__dict__.get(_SAVE)
    if isinstance(saving, Saving):
        saving.end()


def reference(model: nn.Module) -> nn.Module:
    """The base of an attached model as a model of its own, over the same tensors: TRL's `ref_model`, at no memory.

    It has no adapters and no gradients, and follows the base (to another device, say). Make it before the trainer is
    made. Raises StateError while an adapter is merged, since the base is then not there to be shared.
    """
    board: Switchboard | None = model.__dict__.get(BOARD)
    if board is None:
        raise StateError(Fault("reference()", f"this {type(model).__name__} has no switchboard", "an attached model"))
    if board.merged_mix:
        raise StateError(Fault("reference()", f"{', '.join(board.merged_mix)} is merged into the weights",
                               "an unmerged model", "Call unmerge() first"))
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    base = copy.deepcopy(model, shared)
    uninstall(base)
    strip(base)
    object.__delattr__(base, BOARD)
    return base.eval()


class Saving:
    """What `save_pretrained` is on an attached model, with the checks that hold while it is."""

    def __init__(self, model: nn.Module, board: Switchboard) -> None:
        self._model, self._board = model, board
        self._before = {k: model.__dict__[k] for k in (_SAVE, _HAS_ADAPTERS) if k in model.__dict__}
        # transformers asks this before it trains a quantized model, and when it checkpoints one with a frozen input.
        model.__dict__[_HAS_ADAPTERS] = True
        self._without_base = False
        self._hooks = [
            model.register_load_state_dict_pre_hook(self._check_state),  # type: ignore[no-untyped-call]
            model.register_load_state_dict_post_hook(self._base_is_here),  # type: ignore[no-untyped-call]
            model.register_forward_pre_hook(self._check_head, with_kwargs=True),
        ]

    def __call__(self, save_directory: str | Path, is_main_process: bool = True,
                 state_dict: Mapping[str, Tensor] | None = None, push_to_hub: bool = False, **options: Any) -> None:
        """Write the attached adapters as PEFT folders, the one that is on at the top; called as `Trainer` calls it.

        With several attached, the first that is on (else the first attached) is at the top and each other one in a
        subfolder of its name. `state_dict` is used in place of the model's own tensors, as gathered ones must be.

        Raises StateError if no adapter is attached, AdapterFileError if the folder cannot be written.
        """
        self._check_options(push_to_hub, options)
        names = self._board.names
        if not names:
            raise StateError(Fault("save_pretrained()", "no adapter is attached", "at least one",
                                   "Call deltaw.detach(model) to save the base"))
        if not is_main_process:
            return
        top = next(iter(self._board.active), names[0])
        folder = Path(save_directory)
        for name in sorted(names, key=lambda n: n != top):
            store.save(self._value(name, state_dict), folder if name == top else folder / _folder_name(name))
        if _CHECKPOINT.fullmatch(folder.name):
            self._save_live(folder, state_dict)

    def end(self) -> None:
        """Take it off the model again."""
        for hook in self._hooks:
            hook.remove()
        for key in (_SAVE, _HAS_ADAPTERS):
            self._model.__dict__.pop(key, None)
        self._model.__dict__.update(self._before)

    # -- saving ------------------------------------------------------------------------------------------------------

    def _value(self, name: str, state: Mapping[str, Tensor] | None) -> Adapter:
        """An adapter as a value that names its base, with tensors from `state` where one is given."""
        adapter = self._board.adapter(name)
        base = getattr(getattr(self._model, "config", None), "_name_or_path", None)
        facts = ({"base_model": base} if base else {}) | dict(adapter.facts)
        if state is None:
            return Adapter(adapter.config, adapter.sites, facts)
        names = {id(p): key for key, p in self._model.named_parameters(remove_duplicate=False)}
        given = {path: state[names[id(p)]] for path, p in self._board.parameters(name).items() if names[id(p)] in state}
        sites = {}
        for site, delta in adapter.sites.items():
            tensors = {key: given.get(site if delta.geometry.kind == "bias" else f"{site}.{key}", tensor)
                       for key, tensor in delta.tensors.items()}
            sites[site] = SiteDelta(delta.geometry, {k: t.detach().cpu().clone() for k, t in tensors.items()})
        return Adapter(adapter.config, sites, facts)

    def _save_live(self, folder: Path, state: Mapping[str, Tensor] | None) -> None:
        from safetensors.torch import save

        live = {key: tensor.detach().cpu().contiguous().clone()
                for key, tensor in (self._model.state_dict() if state is None else state).items() if _of_adapter(key)}
        replace_folder(folder, {LIVE_STATE: save(live, metadata={"format": "pt"})})

    def _check_options(self, push_to_hub: bool, options: Mapping[str, Any]) -> None:
        faults = [Fault(f"save_pretrained({key}=...)", "has no meaning for adapters", "an option of transformers' own",
                        near(key, _NO_EFFECT)) for key in options if key not in _NO_EFFECT]
        if push_to_hub:
            faults.append(Fault("save_pretrained(push_to_hub=True)", "is not supported for adapters", "False",
                                "Call model.push_to_hub(repo_id)"))
        if faults:
            raise ConfigError(*faults)

    # -- checks while attached ---------------------------------------------------------------------------------------

    def _check_state(self, model: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Refuse a state with tensors of other adapters than the attached ones, which torch might only warn of."""
        given = {key.removeprefix(prefix) for key in state if key.startswith(prefix)}
        here = set(self._model.state_dict())
        adapters = {key for key in here if _of_adapter(key)}
        self._without_base = not given & (here - adapters)
        theirs = {key for key in given if _of_adapter(key)}
        needed = {key for key, p in self._model.named_parameters() if p.requires_grad and _of_adapter(key)}
        unknown, lacking = sorted(theirs - adapters), sorted(needed - theirs) if theirs else []
        if unknown or lacking:
            faults = [f"{len(keys)} tensors {what}, such as '{keys[0]}'"
                      for keys, what in ((unknown, "that are not attached"), (lacking, "missing")) if keys]
            raise StateError(Fault("load_state_dict()", "a state of other adapters, with " + " and ".join(faults),
                                   f"those of {', '.join(self._board.names)}",
                                   "Attach the same names and configs as in the run that is resumed"))

    def _base_is_here(self, model: nn.Module, result: Any) -> None:
        """A state of adapters alone is whole: the frozen base is in the model already."""
        if self._without_base:
            result.missing_keys[:] = [key for key in result.missing_keys if _of_adapter(key)]

    def _check_head(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuse TRL's fused loss over an adapted head: it multiplies by the head's own weight and calls no adapter."""
        if not kwargs.get("fused_lm_head"):
            return
        head = self._model.get_output_embeddings()  # type: ignore[operator]  # a PreTrainedModel's method
        if CHILD in head._modules or SAVED_CHILD in head._modules:
            raise StateError(Fault("TRL's fused loss", "reads the head's own weight and would skip the adapter on it",
                                   "an output layer without an adapter",
                                   "Leave the head out of target_modules and modules_to_save"))


def _of_adapter(key: str) -> bool:
    parts = key.split(".")
    return CHILD in parts or SAVED_CHILD in parts


def _folder_name(adapter: str) -> str:
    """A folder's name for an adapter's: quoted where a path would be read otherwise."""
    quoted = quote(adapter, safe=" ")
    return quoted.replace(".", "%2E") if set(quoted) == {"."} else quoted


__all__ = ["Saving", "install", "reference", "uninstall"]
