"""What a measurement is valid for: machine, versions, date."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("torch", "torchvision", "pytorch-lightning", "mlflow", "hydra-core")


@dataclass(frozen=True)
class Setting:
    """Where and with what was measured."""

    machine: str
    versions: str
    date: str

    @classmethod
    def here(cls) -> "Setting":
        """Look at this machine."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        versions = [f"Python {platform.python_version()}"]
        versions += [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
        return cls(
            f"{_processor()}, {cores} cores, {platform.system()}",
            ", ".join(versions),
            time.strftime("%Y-%m-%d"),
        )

    def lines(self) -> list[str]:
        """Lay it out."""
        return [f"{self.date}. {self.machine}.", f"{self.versions}."]


def device_name() -> str:
    """Return the GPU's name."""
    import torch

    return torch.cuda.get_device_name()


def _processor() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
