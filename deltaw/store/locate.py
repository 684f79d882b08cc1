"""Where an adapter's files are: in a local folder, or on the Hub, from which only what deltaw reads is fetched."""

from __future__ import annotations

import re
from pathlib import Path

from deltaw.errors import AdapterFileError, Fault, near
from deltaw.store.atomic import settled
from deltaw.store.tensors import shown

CONFIG_FILE, TENSORS_FILE, RECORD_FILE = "adapter_config.json", "adapter_model.safetensors", "deltaw.json"
PICKLE_FILE = "adapter_model.bin"
_PICKLES = (".bin", ".pt", ".pth", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_folder(path_or_hub_id: str | Path, *, revision: str | None, subfolder: str | None) -> Path:
    """The folder that holds an adapter's config and tensors; `AdapterFileError` says what is there instead."""
    try:
        return _find(path_or_hub_id, revision, subfolder)
    except AdapterFileError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, a NUL in it, a circle of links
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        raise AdapterFileError(Fault(shown(str(path_or_hub_id)), f"cannot be read ({why})", "an adapter's folder or a "
                                     "Hub id")) from error


def _find(path_or_hub_id: str | Path, revision: str | None, subfolder: str | None) -> Path:
    root = settled(Path(path_or_hub_id))
    if root.exists():
        if revision is not None:
            raise AdapterFileError(Fault(f"revision {revision!r}", f"was asked of the local folder {path_or_hub_id}",
                                         "an adapter on the Hub", "Leave revision out"))
        folder = settled(root / subfolder) if subfolder else root
        return _adapter_in(folder, str(path_or_hub_id))
    if isinstance(path_or_hub_id, str) and _HUB_ID.fullmatch(path_or_hub_id):
        return _fetch(path_or_hub_id, revision, subfolder)
    siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
    raise AdapterFileError(Fault(shown(str(path_or_hub_id)), "does not exist", "an adapter's folder or a Hub id",
                                 near(root.name, siblings)))


def _adapter_in(folder: Path, named: str) -> Path:
    """The folder itself, or the only folder in it that holds an adapter."""
    if not folder.is_dir():
        if folder.suffix in _PICKLES:
            raise AdapterFileError(_pickle_fault(folder))
        got = "is a file" if folder.is_file() else "does not exist"
        raise AdapterFileError(Fault(str(folder), got, "an adapter's folder", "Give the folder that holds its files"))
    if not (folder / CONFIG_FILE).is_file():
        inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}") if path.is_file())
        if len(inside) != 1:
            raise AdapterFileError(Fault(named, f"has no {CONFIG_FILE}", "an adapter's folder", _choice(
                [path.name for path in inside])))
        folder = inside[0]
    if not (folder / TENSORS_FILE).is_file():
        if (folder / PICKLE_FILE).exists():
            raise AdapterFileError(_pickle_fault(folder / PICKLE_FILE))
        raise AdapterFileError(Fault(str(folder), f"has no {TENSORS_FILE}", "an adapter's folder"))
    return folder


def _choice(names: list[str]) -> str:
    return f"Choose one of its adapters with subfolder=: {', '.join(names[:20])}" if names else ""


def _pickle_fault(path: Path | str) -> Fault:
    return Fault(str(path), "is a pickle, which can run any code when it is read", TENSORS_FILE,
                 "If you trust it, load it with PEFT and save it again: save_pretrained(folder) writes safetensors")


def _fetch(hub_id: str, revision: str | None, subfolder: str | None) -> Path:
    """The local copy of an adapter on the Hub."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    wanted = [prefix + name for name in (CONFIG_FILE, TENSORS_FILE, RECORD_FILE)]
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted)) / prefix
        if (folder / CONFIG_FILE).is_file() and (folder / TENSORS_FILE).is_file():
            return folder
        there = HfApi().list_repo_files(hub_id, revision=revision)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterFileError(Fault(shown(hub_id), "is no local folder, and cannot be fetched from the Hub "
                                     f"({type(error).__name__})", "an adapter's folder or a Hub id",
                                     "Check the name and the network; a private one needs `hf auth login`")) from error
    inside = sorted(Path(name).parent.as_posix() for name in there if name.endswith(f"/{CONFIG_FILE}"))
    if prefix + PICKLE_FILE in there and prefix + TENSORS_FILE not in there:
        raise AdapterFileError(_pickle_fault(f"{hub_id}: {prefix}{PICKLE_FILE}"))
    if prefix + CONFIG_FILE not in there and not subfolder and len(inside) == 1:
        return _fetch(hub_id, revision, inside[0])
    raise AdapterFileError(Fault(f"{hub_id} on the Hub", f"has no {prefix}{CONFIG_FILE} with {TENSORS_FILE}",
                                 "an adapter", _choice(inside)))
