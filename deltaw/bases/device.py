"""Which device a name stands for on this machine."""

from __future__ import annotations

from deltaw.errors import ConfigError, Fault


def chosen_device(name: str, *, option: str = "--device") -> str:
    """A GPU for "auto" where there is one; raises ConfigError, in the option's name, for what this machine lacks."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        first = str(error).splitlines()[0]
        raise ConfigError(Fault(option, f"got '{name}' ({first})", "auto, or a device of this machine")) from error
    return name
