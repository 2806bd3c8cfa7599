"""Inputs of the demo and the benches: a device and a text."""

import importlib.resources
import sys
from pathlib import Path

import torch

from . import _library
from ._errors import DemoError

TEXT_NAME = "persuasion.txt"


def say(line: str) -> None:
    """Prints a line to stderr: stdout is for results."""
    print(line, file=sys.stderr)


def choose_device(device: str) -> str:
    """Resolves "auto" to "cpu" or "cuda". Unless a CPU was asked for, prints why a GPU is not
    used.

    Raises:
        DemoError: if the device is not available.
    """
    is_available = torch.cuda.is_available()
    has_kernel = _library.has_kernel("attention", "cuda")
    missing = _library.missing_gpu_support()
    if device != "cpu" and missing is not None:
        say(missing)
    if device == "auto":
        return "cuda" if is_available and has_kernel else "cpu"
    if device == "cuda" and not is_available:
        raise DemoError("device must be cpu or auto here, got cuda: torch finds no CUDA device")
    if device == "cuda" and not has_kernel:
        raise DemoError("device must be cpu or auto, got cuda: this build has no CUDA attention")
    return device


def read_text(name: str | None) -> tuple[str, str]:
    """The text of a file, or of the novel, and the name of the file.

    Raises:
        DemoError: if the file cannot be read.
    """
    path = Path(name) if name is not None else _find_text()
    try:
        return path.read_text(encoding="utf-8"), path.name
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(f"text must be a readable UTF-8 file, got {path}: {error}") from error


def _find_text():
    """The path of the novel: package data if installed, examples/ in a source tree."""
    source_tree = Path(__file__).resolve().parent.parent / "examples" / TEXT_NAME
    for path in (importlib.resources.files("pbs_attn") / "data" / TEXT_NAME, source_tree):
        if path.is_file():
            return path
    raise DemoError(f"{TEXT_NAME} is missing from this installation: name a file with --text")
