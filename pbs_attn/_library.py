"""Loads the compiled library, which registers torch.ops.pbs, and reads how it was built."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

_NAME = "libpbs.so"
_PACKAGE = Path(__file__).resolve().parent


class GPUSupportWarning(UserWarning):
    """There is a GPU that PBS could run on, but the build of pbs_attn has no kernels for it, or its
    driver is too old for them."""


def load() -> None:
    """Registers the operators.

    Raises:
        ImportError: if the library was not built or belongs to other Python files, or if torch is
            too old for it.

    Warns:
        GPUSupportWarning: if the build has no kernels for a GPU that torch sees, unless the user
            left them out on purpose, or if the driver is too old for them.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        raise ImportError(f"pbs_attn needs torch >= 2.10, got {torch.__version__}")
    torch.ops.load_library(_path())
    info = compiled_info()
    is_unasked = not info["cuda_version"] and "PBS_CUDA=OFF" not in info["cuda_status"]
    is_unused = (is_unasked or _is_driver_old()) and torch.version.cuda is not None
    if is_unused and any(map(runs_on, _gpu_capabilities())):
        notice = missing_gpu_support()
        if notice:
            warnings.warn(f"pbs_attn: {notice}", GPUSupportWarning, stacklevel=2)


@functools.cache
def _path() -> Path:
    """The path of the library in this folder, or else in an installed pbs_attn with the same Python
    files.

    In the root of the sources, Python finds the folder pbs_attn before the installed package, and
    only the installed package has the library. The check compares files, not versions: a version
    lasts until the next release, and newer Python files could call an older library with arguments
    that it does not know, or with other defaults.
    """
    folders = [_PACKAGE, *(Path(entry).resolve() / "pbs_attn" for entry in sys.path)]
    folder = next((folder for folder in folders if (folder / _NAME).exists()), None)
    if folder is None:
        raise ImportError(
            f"{_NAME} must lie in {_PACKAGE} or in an installed pbs_attn, found neither: "
            f"`pip install {_PACKAGE.parent}`"
        )
    sources = _PACKAGE.parent
    for file in [] if folder == _PACKAGE else sorted(folder.rglob("*.py")):
        own = _PACKAGE / file.relative_to(folder)
        if not own.exists() or own.read_bytes() != file.read_bytes():
            raise ImportError(
                f"pbs_attn in {_PACKAGE} must have the files of the installed one in {folder}, "
                f"whose {_NAME} it needs, but {own.name} differs: `pip install {sources}` again "
                f"(with `-e` to edit the sources), or take {sources} off Python's path"
            )
    return folder / _NAME


def _read(name: str) -> str:
    """The text that a function of the library returns."""
    function = getattr(ctypes.CDLL(str(_path())), name)
    function.restype = ctypes.c_char_p
    text: bytes = function()
    return text.decode()


@functools.cache
def compiled_info() -> dict[str, str]:
    """The part of build_info that is fixed when the library is compiled."""
    info: dict[str, str] = json.loads(_read("pbs_build_info"))
    return info


@functools.cache
def _gpu_families() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(_read("pbs_gpu_families")))


def runs_on(capability: tuple[int, int]) -> bool:
    """Whether a build with CUDA has kernels for GPUs of this compute capability."""
    return gpu_family(capability) is not None


def gpu_family(capability: tuple[int, int]) -> str | None:
    """The family of kernels that a GPU of this compute capability uses: the one that the
    environment variable ``PBS_GPU_FAMILY`` names, or else the first that runs on it. None if there
    is no such family."""
    wanted = os.environ.get("PBS_GPU_FAMILY", "")
    size = 10 * capability[0] + capability[1]
    for family in _gpu_families():
        is_wanted = wanted in ("", family["name"])
        if is_wanted and family["first"] <= size <= (family["last"] or size):
            return str(family["name"])
    return None


def gpu_capabilities() -> str:
    """The compute capabilities that a build with CUDA has kernels for, such as "8.0 or newer"."""
    oldest = min(family["first"] for family in _gpu_families())
    return f"{oldest // 10}.{oldest % 10} or newer"


@functools.cache
def build_info() -> dict[str, Any]:
    """Tells what the loaded library was built with, and what it can run.

    Returns:
        A dict with these keys.

            - ``version``, ``commit`` and ``compiler``
            - ``torch_target``, the oldest torch that the library runs under
            - ``torch_built_with``, the torch of the build
            - ``cpu_capability``, the instruction set in use: ``avx512``, ``avx2`` or ``baseline``
            - ``cuda``, whether the library holds CUDA kernels
            - ``cuda_status``, the architectures of these kernels, or why there are none
            - ``cuda_stages``, the operators with a CUDA kernel
            - ``cuda_version`` and ``cutlass_version``, empty in a CPU-only build
            - ``gpu_families``, the families of GPU with kernels in a build with CUDA. Each has a
              ``name``, and the ``first`` and ``last`` of its compute capabilities. 90 means 9.0,
              and None as ``last`` includes all newer GPUs.
            - ``head_dims``, the head dimensions that the operators take
    """
    info: dict[str, Any] = dict(compiled_info())
    info["cpu_capability"] = _read("pbs_cpu_capability")
    info["cuda"] = bool(info["cuda_version"])
    info["cuda_stages"] = tuple(_read("pbs_cuda_stages").split())
    info["gpu_families"] = _gpu_families()
    info["head_dims"] = tuple(int(size) for size in _read("pbs_head_dims").split())
    return info


def has_kernel(stage: str, device: torch.device | str) -> bool:
    """Whether this build runs an operator on a device.

    A CUDA device needs a build with the kernel. If torch finds a GPU, its compute capability must
    also be one of ``build_info()["gpu_families"]``, and its driver must run the build.

    Args:
        stage: name of the operator, such as ``"attention"``.
        device: a device of torch, or its name.
    """
    device = torch.device(device)
    if device.type == "cuda":
        is_built = stage in build_info()["cuda_stages"]
        if not is_built or not torch.cuda.is_available():
            return is_built
        return runs_on(torch.cuda.get_device_capability(device)) and not _is_driver_old()
    return device.type == "cpu"


def missing_gpu_support() -> str | None:
    """Why PBS cannot use this machine's NVIDIA GPU, and how to fix it, in one line. None if it can,
    if there is no GPU, or if torch's CUDA devices are hidden. Does not initialize CUDA."""
    capabilities = _gpu_capabilities()
    if not capabilities and _has_nvidia_gpu() and not _driver_cuda():
        return (
            "the GPU is not used: this machine has one of NVIDIA, but no driver for it is loaded; "
            "install the driver, or start the container with access to the GPU"
        )
    is_hidden = torch.version.cuda is not None and torch.cuda.device_count() == 0
    if not capabilities or is_hidden:
        return None
    if not any(map(runs_on, capabilities)):
        wanted = os.environ.get("PBS_GPU_FAMILY", "")
        if wanted:
            return (
                f"the GPU is not used: PBS_GPU_FAMILY is {wanted}, which names no kernels that run "
                "on it; unset the variable"
            )
        found = ", ".join(f"{major}.{minor}" for major, minor in capabilities)
        return (
            "PBS runs on the CPU here: its GPU kernels need compute capability "
            f"{gpu_capabilities()}, and this machine has {found}"
        )
    if torch.version.cuda is None:
        return (
            f"the GPU is not used: torch {torch.__version__} has no CUDA; install a CUDA build of "
            "torch"
        )
    if not compiled_info()["cuda_version"]:
        return (
            f"the GPU is not used: this build of pbs_attn has no CUDA kernels "
            f"({compiled_info()['cuda_status']}); in the folder of the sources, "
            "`PBS_CUDA=ON pip install --no-build-isolation .` builds them or says what it lacks"
        )
    if _is_driver_old():
        major, minor = _driver_cuda() // 1000, _driver_cuda() % 1000 // 10
        return (
            f"the GPU is not used: this build of pbs_attn needs a driver for CUDA "
            f"{_toolkit_major()}.0 or newer, and this machine's is one for CUDA {major}.{minor}; "
            "update the driver, or install a build of pbs_attn that an older nvcc compiled"
        )
    return None


def _toolkit_major() -> int:
    """The major version of the CUDA that compiled the library; 0 for a build without kernels."""
    return int(compiled_info()["cuda_version"].split(".")[0] or 0)


def _is_driver_old() -> bool:
    """Whether the driver cannot run this build's kernels, as in include/pbs/driver.h."""
    major = _toolkit_major()
    return major > 0 and 0 < _driver_cuda() < 1000 * major


@functools.cache
def _driver_cuda() -> int:
    """The newest CUDA that this machine's driver runs: 12080 means 12.8, and 0 means that there is
    no driver. Like _gpu_capabilities, it does not initialize CUDA."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def _has_nvidia_gpu(bus: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether the PCI bus has an NVIDIA GPU, with or without a driver."""
    for device in bus.glob("*"):
        try:
            vendor, kind = ((device / name).read_text() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor.startswith("0x10de") and kind.startswith("0x03"):  # NVIDIA, a display controller
            return True
    return False


def _gpu_capabilities() -> list[tuple[int, int]]:
    """The compute capabilities of this machine's NVIDIA GPUs, from the NVML of the driver.

    Unlike torch.cuda, this works with a CPU build of torch, and does not initialize CUDA. An import
    must not do so, because processes forked afterwards could not use the GPU.
    """
    found = []
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return []
        count = ctypes.c_uint()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        for index in range(count.value):
            device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device))
            nvml.nvmlDeviceGetCudaComputeCapability(
                device, ctypes.byref(major), ctypes.byref(minor)
            )
            found.append((major.value, minor.value))
        nvml.nvmlShutdown()
    except (OSError, AttributeError):  # no driver, or one older than these functions
        return []
    return found
