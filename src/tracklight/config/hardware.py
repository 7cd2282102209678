"""What this machine has: GPUs by their device files, and cores; torch is not imported."""

import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tracklight.errors import BadInput


def check_machine(accelerator: str, devices: Any) -> None:
    """Refuse an accelerator, or a number of devices, that this machine certainly lacks."""
    gpus = count_gpus()
    no_gpu = accelerator in ("gpu", "cuda") and gpus == 0
    if no_gpu or (accelerator == "mps" and platform.system() != "Darwin"):
        raise BadInput(
            f"trainer.accelerator={accelerator}: no GPU found on this machine; use trainer.accelerator=auto"
        )
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and gpus == 0)
    if not on_cpu and accelerator not in ("auto", "gpu", "cuda"):
        return
    available = max(2, count_cores()) if on_cpu else gpus
    needed = max(_device_indices(devices) or (), default=-1) + 1
    if available is not None and needed > available:
        kind = "CPU processes" if on_cpu else "GPUs"
        raise BadInput(
            f"trainer.devices={devices} asks for {needed} {kind}, but this machine has room for "
            f"{available}; try trainer.devices={available}"
        )


def _device_indices(devices: Any) -> Sequence[int] | None:
    text = str(devices)
    numbers = [int(number) for number in re.findall(r"-?\d+", text)]
    if "[" in text or "," in text:
        return numbers
    return range(numbers[0]) if numbers and numbers[0] >= 0 else None


def num_devices(devices: Any) -> int | None:
    """Return how many devices `trainer.devices` asks for; None for as many as there are."""
    indices = _device_indices(devices)
    return None if indices is None else len(indices)


def count_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_gpus(devices: Path = Path("/dev")) -> int | None:
    """Return the most GPUs there can be; None where no device file tells (macOS, WSL, AMD)."""
    if platform.system() != "Linux":
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return 0
    names = [path.name for path in devices.iterdir()]
    found = sum(re.fullmatch(r"nvidia\d+", name) is not None for name in names)
    if found:
        return found if visible is None else min(found, len(visible.split(",")))
    unknown = any(re.match(r"nvidia|nvhost|nvgpu|nvmap|dxg$|kfd$", name) for name in names)
    return None if unknown else 0
