"""The environment of a measurement: the last columns of every row of a benchmark."""

from __future__ import annotations

import platform
import re
import uuid
from pathlib import Path

import torch

from ._library import build_info, gpu_family

RUN = uuid.uuid4().hex[:12]  # of this process: times of different processes are not compared


def cpu_name() -> str:
    """The name of the CPU, from the kernel."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def driver_version() -> str:
    """The version of NVIDIA's driver; empty if the system does not report it."""
    path = Path("/proc/driver/nvidia/version")
    return find_driver_version(path.read_text()) if path.exists() else ""


def find_driver_version(text: str) -> str:
    """The version in the text that the driver reports; empty if there is none."""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)
    return found[1] if found else ""


def describe(device: torch.device | str) -> dict[str, str]:
    """Hardware, threads, versions and the process that measured, as CSV columns. `gpu_family`, the
    kernels in use, and `driver` are empty on a CPU."""
    device = torch.device(device)
    is_gpu = device.type == "cuda"
    info = build_info()
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else cpu_name(),
        "gpu_family": str(gpu_family(torch.cuda.get_device_capability(device))) if is_gpu else "",
        "threads": str(torch.get_num_threads()),
        "cpu_capability": info["cpu_capability"],
        "torch": torch.__version__,
        "pbs_attn": info["version"],
        "commit": info["commit"],
        "driver": driver_version() if is_gpu else "",
        "run": RUN,
    }
