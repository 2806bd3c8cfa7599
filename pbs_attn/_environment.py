"""Where a measurement was taken: the columns that every benchmark row ends with."""

from __future__ import annotations

import csv
import os
import platform
from pathlib import Path

import torch

from ._library import build_info


def cpu_name() -> str:
    """The CPU as the kernel names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def describe(device: torch.device | str = "cpu") -> dict[str, str]:
    """Hardware, threads and versions as CSV columns."""
    device = torch.device(device)
    is_gpu = device.type == "cuda"
    info = build_info()
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else cpu_name(),
        "threads": str(torch.get_num_threads()),
        "cpu_capability": info["cpu_capability"],
        "torch": torch.__version__,
        "pbs_attn": info["version"],
        "commit": info["commit"],
    }


def can_write(path: Path | str) -> bool:
    """Whether a file can be written there: its folder exists and admits it."""
    path = Path(path)
    folder = path.resolve().parent
    return folder.is_dir() and os.access(folder, os.W_OK) and not path.is_dir()


def write_csv(path: Path | str, rows: list[dict[str, str]]) -> None:
    """Rows of the same columns, under a header."""
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=rows[0])
        writer.writeheader()
        writer.writerows(rows)
