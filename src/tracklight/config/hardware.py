"""What this machine has: GPUs by their device files, and cores; torch is not imported."""

import os
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tracklight.errors import BadInput

MAX_TEMPORARY = 75  # characters: a socket in a folder below has 107 for its address
NO_PLACE = f"is full, cannot be written, or has more than {MAX_TEMPORARY} characters"


def check_machine(accelerator: str, devices: Any) -> None:
    """Refuse an accelerator, or a number of devices, that this machine certainly lacks."""
    gpus = count_gpus()
    no_gpu = accelerator in ("gpu", "cuda") and gpus == 0
    if no_gpu or (accelerator == "mps" and platform.system() != "Darwin"):
        problem = f"trainer.accelerator={accelerator}: no GPU found on this machine"
        raise BadInput(f"{problem}; use trainer.accelerator=auto")
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and gpus == 0)
    if not on_cpu and accelerator not in ("auto", "gpu", "cuda"):
        return
    needed = max(_device_indices(devices) or (), default=-1) + 1
    if needed < 2 and on_cpu:  # to count cores takes longer than all other checks of a config
        return
    available = max(2, count_cores()) if on_cpu else gpus
    if available is not None and needed > available:
        kind = "CPU processes" if on_cpu else "GPUs"
        problem = f"trainer.devices={devices} asks for {needed} {kind}, but this machine has room for"
        raise BadInput(f"{problem} {available}; try trainer.devices={available}")


def resolve_precision(precision: Any, accelerator: str) -> str:
    """Return the full name of the precision in which Lightning will train: no CPU has float16 autocast."""
    full = {None: "32-true", "32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
    name = full.get(precision if precision is None else str(precision), str(precision))
    if name != "16-mixed":
        return name
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and count_gpus() == 0)
    return "bf16-mixed" if on_cpu else name


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
    """Return how many CPU cores this process may use: its affinity, its containers' quota, Slurm's share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    slurm = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or cores
    return max(1, int(min([float(cores), float(slurm), *_quotas()])))


def default_threads(processes: int, own: int | None = None) -> int:
    """Return the threads of a process: OMP_NUM_THREADS, else its share of the cores, or of torch's `own`."""
    if asked := re.match(r"\s*0*([1-9]\d*)", os.environ.get("OMP_NUM_THREADS", "")):
        return int(asked[1])
    cores = count_cores()
    return max(1, min(cores, own or cores) // processes)


def _quotas(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[float]:
    """Yield the CPU quotas, in cores, of this process's control groups and those around them (v1, v2)."""
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        is_v1 = "cpu" in controllers.split(",")
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if is_v1 else ("cpu.max",)
        inner = root / controllers / path.strip("/")
        for folder in (inner, *inner.parents):  # in a container, the inner one may be that outside of it
            with suppress(OSError, ValueError):  # no such file; "max"
                quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
                if quota > 0:
                    yield quota / period


def describe_machine() -> dict[str, str | int | list[str]]:
    """Describe the machine for a run's record; GPUs are named without waking the CUDA driver."""
    facts: dict[str, str | int | list[str]] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "usable_cores": count_cores(),
        "gpus": _gpu_names(),
    }
    with suppress(ValueError, OSError):
        facts["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch := sys.modules.get("torch"):
        facts |= {"torch": str(torch.__version__), "cuda": str(torch.version.cuda)}
    return facts


def _cpu_model() -> str:
    with suppress(OSError, IndexError):
        return re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)[0].strip()
    return platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        names += re.findall(r"^Model:\s*(.+?)\s*$", path.read_text(), re.M) or ["NVIDIA GPU"]
    return names


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


def choose_temporary_folder(runs: Path) -> None:
    """Let temporary files lie beside the runs where the system has no place for them; else refuse."""
    given, beside = os.environ.get("TMPDIR"), str(runs.absolute() / ".tmp")
    for place in filter(None, (given, "/tmp", "/var/tmp", "/dev/shm", beside)):
        with suppress(OSError):
            if place == beside:
                Path(place).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(b"full?")
            if len(place) <= MAX_TEMPORARY:
                break
    else:
        raise BadInput(f"TMPDIR, /tmp and {beside}: each {NO_PLACE}; try TMPDIR=FOLDER")
    if place != (given or "/tmp"):
        os.environ["TMPDIR"] = tempfile.tempdir = place
        if given:
            warnings.warn(f"TMPDIR={given} {NO_PLACE}; temporary files lie in {place}", stacklevel=2)
