"""Which device to use, and in which dtype it is fast."""

from __future__ import annotations

import gc
import os

import torch

from deepalign.errors import UserError, first_line


def pick_device(device: str) -> torch.device:
    """A device by name, or the best there is for "auto"; raises `UserError` where it cannot be used."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {device} cannot be used here: {first_line(error)}; try --device cpu, or sharded"
        ) from error
    return chosen


def own_device(device: str, local: int | None) -> str:
    """The device of one of several processes on a machine: each its own GPU, where the user named none."""
    if device != "auto" or local is None or not torch.cuda.is_available():
        return device
    # A launcher may show each process its own GPU only.
    return f"cuda:{local % torch.cuda.device_count()}"


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """A dtype by name, or the one that the device is fast in for "auto"; raises `UserError` for an unknown one."""
    if dtype == "auto":
        return torch.bfloat16 if fast_bfloat16(device) else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise UserError(f"--dtype {dtype} is not one of auto, {', '.join(known)}")
    return known[dtype]


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware; decided by its features, never by timing."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def free_memory() -> None:
    """Give back what models that nobody holds any more have left; trainers hold theirs in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def available_bytes() -> int:
    """Memory of the machine that can be had without taking another's; 0 where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as told:
            for line in told:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0
