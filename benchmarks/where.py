"""Where a benchmark computes and in which number format: the options, and their names."""

from __future__ import annotations

import argparse

import torch

from deltaw.bases import choose_dtype


def add_options(parser: argparse.ArgumentParser, *, dtype: str) -> None:
    """`--device` and `--dtype`; `dtype` is what the latter is by default."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default=dtype,
                        help="auto: bf16 where the device multiplies it natively")


def chosen(args: argparse.Namespace) -> torch.dtype:
    """The format that was asked for, and a line that says so.

    Attention by cuDNN, which torch prefers on Hopper, plans anew for 30 ms at every new length. It is off for everybody
    here: with lengths that change at each step the rivals are faster without it too.
    """
    dtype, reason = choose_dtype(args.dtype, args.device)
    print(f"{name(args.device)}, {short(dtype)}: {reason}", flush=True)
    if args.device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return dtype


def name(device: str) -> str:
    """What the device is called."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def short(dtype: torch.dtype) -> str:
    """The name by which an option knows a format."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
