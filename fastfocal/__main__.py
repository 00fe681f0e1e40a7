"""``python -m fastfocal``: the main job on real input, in under two minutes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from fastfocal import build_info

EXTRAS = {"matplotlib": "matplotlib", "PIL": "pillow", "sklearn": "scikit-learn", "tqdm": "tqdm"}  # module: package
PICTURES = (".jpg", ".pdf", ".png", ".svg")
OUT = Path("fastfocal_demo.png")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fastfocal",
        description="Trains a small detector (FPN with three levels) on scenes of handwritten digits twice from one seed, "
        "with the plain per-level focal loss and with FastFocalLoss; compares gradients, training curves, time, memory and "
        "recall; saves one picture. Under two minutes on two CPU cores.",
    )
    parser.add_argument("--steps", type=int, default=200, help="training steps, 8 scenes each (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda if there is one)")
    parser.add_argument("--out", type=Path, default=OUT, help="picture (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, scenes and their order (default: %(default)s)")
    arguments = parser.parse_args(argv)

    # All that can be wrong is found before the first step.
    missing = [package for module, package in EXTRAS.items() if find_spec(module) is None]
    if missing:
        sys.exit(f'python -m fastfocal needs {", ".join(missing)}: pip install "fastfocal[demo]"')
    if arguments.steps < 1 or arguments.seed < 0:
        sys.exit(f"--steps must be at least 1 and --seed at least 0, got {arguments.steps} and {arguments.seed}")
    if arguments.out.suffix.lower() not in PICTURES or not arguments.out.absolute().parent.is_dir():
        sys.exit(f"--out must name a {', '.join(PICTURES)} file in a folder that exists, got {arguments.out}")
    device = choose_device(arguments.device)

    from fastfocal.demo import run

    run(arguments.steps, device, arguments.out, arguments.seed)


def choose_device(name: str | None) -> torch.device:
    usable = torch.cuda.device_count() if build_info()["cuda"] else 0
    if name is None:
        return torch.device("cuda" if usable else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        sys.exit(f"--device must be cpu, cuda or cuda:<index>, got {name}")
    if device.type not in ("cpu", "cuda"):
        sys.exit(f"--device must be cpu, cuda or cuda:<index>, got {name}")
    if device.type == "cuda" and not build_info()["cuda"]:
        sys.exit(f"--device {name}: this build of fastfocal has no CUDA kernels")
    if device.type == "cuda" and (device.index or 0) >= usable:
        sys.exit(f"--device {name}: torch {torch.__version__} sees {usable} CUDA devices here")
    return device


if __name__ == "__main__":
    main()
