"""Loads the compiled library, which registers torch.ops.pbs, and reads what it was built with."""

from __future__ import annotations

import ctypes
import functools
import json
from pathlib import Path
from typing import Any

import torch

_PATH = Path(__file__).with_name("libpbs.so")


def load() -> None:
    """Registers the operators.

    Raises:
        ImportError: if the library was not built or torch is too old for it.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        raise ImportError(f"pbs_attn needs torch >= 2.10, got {torch.__version__}")
    if not _PATH.exists():
        raise ImportError(f"{_PATH.name} is missing: install pbs_attn with `pip install .`")
    torch.ops.load_library(_PATH)


@functools.cache
def build_info() -> dict[str, Any]:
    """What the loaded library was built with and what it can run.

    Returns:
        ``version`` and ``commit``; ``torch_target``, the oldest torch it runs under;
        ``torch_built_with``; ``compiler``; ``cpu_capability``, the instruction set in use
        (``avx512``, ``avx2`` or ``baseline``); ``cuda``, whether it holds CUDA kernels;
        ``cuda_status``, for which architecture, or why not; ``cuda_stages``, the operators with a
        CUDA kernel; ``cuda_version`` and ``cutlass_version``, empty in a CPU-only build.
    """
    library = ctypes.CDLL(str(_PATH))
    for name in ("pbs_build_info", "pbs_cpu_capability", "pbs_cuda_stages"):
        getattr(library, name).restype = ctypes.c_char_p
    info = json.loads(library.pbs_build_info())
    info["cpu_capability"] = library.pbs_cpu_capability().decode()
    info["cuda"] = bool(info["cuda_version"])
    info["cuda_stages"] = tuple(library.pbs_cuda_stages().decode().split())
    return info


def has_kernel(stage: str, device: torch.device | str) -> bool:
    """Whether this build runs operator ``stage`` (such as ``"attention"``) on ``device``: on a CUDA
    device if it holds the kernel and the device, where torch finds one, is of compute capability
    9.0."""
    device = torch.device(device)
    if device.type == "cuda":
        is_built = stage in build_info()["cuda_stages"]
        if not is_built or not torch.cuda.is_available():
            return is_built
        return torch.cuda.get_device_capability(device) == (9, 0)
    return device.type == "cpu"


def missing_gpu_support() -> str | None:
    """What keeps this machine's GPU from being used, with the cure, in one line; None if nothing
    does, or there is no GPU."""
    return None
