"""What can go wrong in training, said in one line where one line says it all."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException

from tracklight.errors import RunFailed


@contextmanager
def told(batch_size: Any, num_processes: int) -> Iterator[None]:
    """Raise RunFailed for errors whose traceback would say less than a line.

    Args:
        batch_size: To be made smaller where memory runs out.
        num_processes: Of this run; with several, one can lose the others.
    """
    try:
        yield
    except Exception as error:
        if _is_out_of_memory(error):
            why = f"out of memory; make data.batch_size={batch_size} smaller first"
        elif isinstance(error, MisconfigurationException):
            why = " ".join(str(error).split())
        elif num_processes > 1 and any(name in str(error) for name in ("gloo", "NCCL")):
            why = "another process of this run is gone; resume=auto continues it"
        else:
            raise
        raise RunFailed(why) from error


def _is_out_of_memory(error: Exception) -> bool:
    # On the CPU, PyTorch has no exception of its own for it.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
