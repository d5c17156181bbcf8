"""The device of a rank, and the settings of its memory allocator and threads."""

import ctypes
import os

import torch

from parallel.errors import ConfigError

LEAST_FOR_FP8 = (8, 9)
"""The compute capability of the first GPUs that multiply numbers of 8 bits."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def device_type(wanted: str) -> str:
    """Return 'cuda' or 'cpu': the type of the devices of a run on a machine like this one.

    `wanted` is `train.device`: 'auto' is 'cuda' where torch sees a GPU.
    """
    return "cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.device_count()) else "cpu"


def choose_device(wanted: str, *, local_rank: int, local_world_size: int) -> tuple[torch.device, str]:
    """Return this rank's device and the backend: nccl where each rank of this host has a GPU of its own, else gloo.

    Raises ConfigError where `train.device` is 'cuda' and torch sees no GPU.
    """
    count = torch.cuda.device_count()
    if wanted == "cuda" and not count:
        raise ConfigError(
            "train.device: 'cuda' needs a GPU that torch can see, and there is none. Try 'auto' or 'cpu'."
        )
    if device_type(wanted) == "cpu":
        return torch.device("cpu"), "gloo"
    backend = "nccl" if local_world_size <= count else "gloo"
    return torch.device("cuda", local_rank % count), backend


def check_precision(precision: str, device: torch.device) -> None:
    """Raise ConfigError where `train.precision` is 'fp8' and a GPU has no tensor cores for numbers of 8 bits."""
    if precision != "fp8" or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_FOR_FP8:
        major, minor = capability
        raise ConfigError(
            "train.precision: 'fp8' needs a GPU of compute capability 8.9 or higher (Ada, Hopper, Blackwell), and"
            f" {device} is {torch.cuda.get_device_name(device)}, of {major}.{minor}. Try 'bf16'."
        )


def set_up_device(device: torch.device, *, memory_limit: int | None, local_world_size: int) -> None:
    """Make a GPU the current one and limit its allocator to `memory_limit` bytes; set malloc and threads for a CPU."""
    if device.type == "cuda":
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(device)
        if memory_limit is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, memory_limit / total), device)
        return
    _keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:  # the ranks of a host share its cores
        torch.set_num_threads(max(1, _num_cores() // local_world_size))


def _num_cores() -> int:
    """Return the number of cores that this process may use: of a host that is shared by jobs, the share of this job."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _keep_freed_memory() -> None:
    """Have glibc keep the memory that a step frees, since the next step needs it again.

    By default glibc returns large blocks to the kernel, which clears every page when it gives them out again. The
    largest blocks are still returned: of those glibc would keep more than are used, as it seldom reuses aligned ones.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # bytes, the largest value allowed: larger blocks are mapped one by one
