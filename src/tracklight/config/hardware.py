"""What this machine has: GPUs by their device files, cores, folders; torch is not imported."""

import os
import platform
import re
from pathlib import Path
from typing import Any

from tracklight.errors import BadInput


def check_machine(accelerator: str, devices: Any) -> None:
    """Refuse an accelerator, or a number of devices, that this machine surely lacks.

    Raises:
        BadInput: There is none of that kind, or fewer than asked for.
    """
    gpus = count_gpus()
    if accelerator in ("gpu", "cuda") and gpus == 0:
        raise BadInput(
            f"trainer.accelerator={accelerator}: no GPU found on this machine; "
            "use trainer.accelerator=auto"
        )
    if accelerator == "mps" and platform.system() != "Darwin":
        raise BadInput(
            "trainer.accelerator=mps: no GPU found on this machine; use trainer.accelerator=auto"
        )
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and gpus == 0)
    if not on_cpu and accelerator not in ("auto", "gpu", "cuda"):
        return
    available = max(2, count_cores()) if on_cpu else gpus
    asked = _devices_needed(devices)
    if available is not None and asked > available:
        kind = "CPU processes" if on_cpu else "GPUs"
        raise BadInput(
            f"trainer.devices={devices} asks for {asked} {kind}, but this machine has room for "
            f"{available}; try trainer.devices={available}"
        )


def check_folder(key: str, folder: Path) -> None:
    """Refuse a folder that cannot be written, or that cannot be made.

    Raises:
        BadInput: A file is in its place, or the nearest folder that exists is not writable.
    """
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise BadInput(
            f"{key}={folder}: {there} is a file where a folder should be; try another {key}"
        )
    if not os.access(there, os.W_OK):
        raise BadInput(f"{key}={folder}: {there} is not writable; try another {key}")


def _devices_needed(devices: Any) -> int:
    """Count the devices a machine must have: the number, or one past the highest index."""
    if isinstance(devices, str):
        if not devices.strip("-").isdigit():
            indices = re.findall(r"\d+", devices)
            return max(map(int, indices)) + 1 if indices else 0
        devices = int(devices)
    return max(devices) + 1 if isinstance(devices, list) else devices


def num_devices(devices: Any) -> int | None:
    """Count the devices that `trainer.devices` asks for; None for as many as there are."""
    if isinstance(devices, str):
        indices = re.findall(r"\d+", devices)
        if "," in devices:
            return len(indices)
        return int(indices[0]) if indices and "-" not in devices else None
    return len(devices) if not isinstance(devices, int) else None if devices < 0 else devices


def count_cores() -> int:
    """Count the CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_gpus(devices: Path = Path("/dev")) -> int | None:
    """Count GPUs by their device files, without importing torch.

    Returns:
        The most there can be, or None where the device files do not tell (macOS, WSL, AMD, Jetson).
    """
    if platform.system() != "Linux":
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return 0
    names = [path.name for path in devices.iterdir()]
    found = sum(re.fullmatch(r"nvidia\d+", name) is not None for name in names)
    if found:
        return found if visible is None else min(found, len(visible.split(",")))
    return (
        None if any(re.match(r"nvidia|nvhost|nvgpu|nvmap|dxg$|kfd$", name) for name in names) else 0
    )
