"""What a result is measured on, in words."""

from __future__ import annotations

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import fastfocal


def cpu() -> tuple[str, list[str]]:
    """Name of the processor, and its vector instruction sets."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
    except OSError:
        return platform.processor() or platform.machine(), []
    facts = {name.strip(): value.strip() for name, value in lines.items()}
    flags = facts.get("flags", facts.get("Features", "")).split()
    wanted = ("avx", "fma", "f16c", "amx", "asimd", "sve", "bf16")
    name = facts.get("model name", platform.processor() or platform.machine())
    return name, sorted(f for f in flags if f.startswith(wanted))


def describe(device: torch.device, *packages: str) -> str:
    """Device, threads, and versions of torch, of those of the packages that are installed, and of fastfocal."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{cpu()[0]} ({fastfocal.build_info()['cpu_capability']}), {torch.get_num_threads()} threads"
    versions = [f"torch {torch.__version__}"]
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    return f"{where} · {', '.join([*versions, f'fastfocal {fastfocal.__version__}'])}"
