"""The source distribution and the wheel, the dependencies of the library, and where it is found."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import pbs_attn
from pbs_attn import _library
from pbs_attn.ops import OPERATORS, SEQUENCE_OPERATORS

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path(pbs_attn.__file__).with_name("libpbs.so")


def attempt(*command, cwd=ROOT, **variables):
    """Runs a command without the PYTHONPATH of this process."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def run(*command, **options):
    """The output of a command that must succeed."""
    result = attempt(*command, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    code = "import sys; from setuptools import build_meta as b; b.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, folder)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="session")
def wheel(sdist, tmp_path_factory):
    """A wheel built from the source distribution, so that one build shows that both are complete.
    The sources are unpacked inside another repository."""
    folder, other = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("other")
    run("git", "init", "-q", cwd=other)
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    run("git", *author, "commit", "-q", "--allow-empty", "-m", "other", cwd=other)
    command = [sys.executable, "-m", "pip", "wheel", sdist, "--no-deps", "--no-build-isolation"]
    options = {"TMPDIR": str(other), "PBS_CUDA": "OFF", "PBS_PORTABLE": "ON"}
    run(*command, "--no-cache-dir", "-w", folder, cwd=folder, **options)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """Python of a fresh environment with the wheel, which borrows torch from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", code).strip())
    (site / "borrowed.pth").write_text(str(Path(torch.__file__).parent.parent))
    return python


@pytest.fixture(scope="session")
def installed_folder(installed, tmp_path_factory):
    code = "import pbs_attn; print(pbs_attn.__path__[0])"
    return Path(run(installed, "-c", code, cwd=tmp_path_factory.mktemp("elsewhere")).strip())


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources that was not built."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "pbs_attn", tmp_path / "pbs_attn", ignore=ignored)
    return tmp_path


def symbols(*options):
    result = subprocess.run(["nm", "-D", *options, LIBRARY], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return {line.split()[-1].split("@")[0] for line in result.stdout.splitlines()}


def test_library_needs_only_the_stable_abi():
    unresolved = symbols("--undefined-only")
    from_torch = {name for name in unresolved if "torch" in name or "c10" in name}
    assert from_torch, "the library must call torch"
    assert all(re.match(r"(aoti_torch|torch)_[a-zA-Z0-9_]+$", name) for name in from_torch)
    assert not any(name.startswith(("Py", "_Py")) for name in unresolved)
    assert not any(name.startswith(("cuda", "cu")) for name in unresolved), "cudart is static"


def test_library_exports_nothing_that_could_clash():
    exported = symbols("--defined-only", "--extern-only")
    assert {"pbs_build_info", "pbs_cpu_capability"} <= exported
    assert not [name for name in exported if not name.startswith("pbs_")]


def test_build_info():
    info = pbs_attn.build_info()
    assert info["version"] == re.search(
        r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    ).group(1)
    assert info["torch_target"] == "2.10"
    assert info["cpu_capability"] in ("avx512", "avx2", "baseline")
    assert info["cuda"] == info["cuda_status"].startswith("sm_")
    assert bool(info["cuda_stages"]) == info["cuda"]
    for family in info["gpu_families"]:
        newest = family["last"]  # None where newer GPUs run it, too
        assert family["name"] and (newest is None or family["first"] <= newest)
    assert info["gpu_families"], "a build without CUDA names them too"
    assert all(head_dim % 32 == 0 for head_dim in info["head_dims"]) and info["head_dims"]
    assert info["cuda_version"] if info["cuda"] else not info["cuda_version"]


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_answer(capability):
    code = """
import torch, pbs_attn
torch.manual_seed(0)
q = torch.randn(1, 4, 700, 64)
k, v = torch.randn(2, 1, 2, 700, 64)
got = pbs_attn.attention(q, k, v, config=pbs_attn.PBSConfig(threshold=1.0))
want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-6)
half = pbs_attn.attention(q.half(), k.half(), v.half(), config=pbs_attn.PBSConfig(threshold=1.0))
torch.testing.assert_close(half.float(), want, rtol=2e-3, atol=2e-3)
print(pbs_attn.build_info()["cpu_capability"])
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PBS_CPU_CAPABILITY": capability, "PATH": "/usr/bin:/bin"},
    )
    assert result.returncode == 0, result.stderr
    widest = pbs_attn.build_info()["cpu_capability"]
    order = ["baseline", "avx2", "avx512"]
    assert result.stdout.strip() == min(capability, widest, key=order.index)


def test_version_is_that_of_the_library(installed, tmp_path):
    assert pbs_attn.__version__ == pbs_attn.build_info()["version"]
    code = "import pbs_attn, importlib.metadata as m; print(m.version('pbs-attn'))"
    assert run(installed, "-c", code, cwd=tmp_path).strip() == pbs_attn.__version__


def test_source_distribution_has_sources_alone(sdist):
    with tarfile.open(sdist) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    assert {"CMakeLists.txt", "csrc/ops.cpp", "examples/persuasion.txt"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_is_for_any_python(wheel):
    assert re.fullmatch(r"pbs_attn-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert {"pbs_attn/libpbs.so", "pbs_attn/py.typed", "pbs_attn/data/persuasion.txt"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "build/"))]


def test_library_keeps_no_path_of_its_build(installed_folder):
    dynamic = run("readelf", "-dW", installed_folder / "libpbs.so")
    assert "libtorch_cpu.so" in dynamic
    assert not re.search(r"R(UN)?PATH", dynamic)
    assert not re.search(r"\[.*/.*\]", dynamic), "the names of other libraries must have no folder"


def test_portable_library_asks_for_nothing_new(installed_folder):
    """It needs only glibc 2.28 and the libstdc++ of GCC 8, which is the meaning of
    manylinux_2_28."""
    compiler = pbs_attn.build_info()["compiler"]
    number = re.match(r"\d+", compiler)  # clang begins with a word
    if number is None or int(number[0]) > 12:
        pytest.skip(
            f"the compiler ({compiler}) takes more from libstdc++: see cmake/portable.cmake"
        )
    table = run("objdump", "-T", installed_folder / "libpbs.so")
    versions = re.findall(r"\((GLIBC|GLIBCXX|CXXABI)_([\d.]+)\)", table)
    limits = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
    assert {kind for kind, _ in versions} == set(limits)
    too_new = {(k, v) for k, v in versions if tuple(map(int, v.split("."))) > limits[k]}
    assert not too_new


def test_portable_library_names_no_folder_of_its_build(installed_folder, sdist):
    content = (installed_folder / "libpbs.so").read_bytes()
    assert b"csrc/ops.cpp" in content  # a place in the sources, not on the machine
    for folder in (Path(torch.__file__).parent, sdist.parent.parent):
        assert str(folder).encode() not in content


def test_portable_library_says_what_is_wrong(installed, tmp_path):
    """An exception of the library passes through torch with its whole message."""
    code = """
import torch, pbs_attn
q = torch.randn(1, 1, 300, 65)
try:
    pbs_attn.attention(q, q, q)
except RuntimeError as error:
    print(str(error).splitlines()[-1])
"""
    said = run(installed, "-c", code, cwd=tmp_path)
    assert said == "q must have a head_dim of 64, 96, 128 or 256, got 65\n"


USE = """
import torch, pbs_attn
q = torch.randn(1, 1, 600, 64)
assert pbs_attn.attention(q, q, q).isfinite().all()
print(pbs_attn.__path__[0], pbs_attn.build_info()["cuda_status"])
"""


def test_commit_is_not_that_of_another_repository(installed, tmp_path):
    code = "import pbs_attn; print(pbs_attn.build_info()['commit'])"
    assert run(installed, "-c", code, cwd=tmp_path) == "unknown\n"


def test_installed_package_runs_outside_the_sources(installed, installed_folder, tmp_path):
    said = run(installed, "-c", USE, cwd=tmp_path)
    assert said == f"{installed_folder} switched off (PBS_CUDA=OFF)\n"


def test_sources_take_the_library_of_the_same_installed_package(installed, checkout):
    said = run(installed, "-c", USE, cwd=checkout)
    assert said == f"{checkout / 'pbs_attn'} switched off (PBS_CUDA=OFF)\n"


def test_other_sources_do_not_take_the_installed_library(installed, installed_folder, checkout):
    with (checkout / "pbs_attn" / "plot" / "results.py").open("a") as file:
        file.write("# edited after the installation\n")
    result = attempt(installed, "-c", "import pbs_attn", cwd=checkout)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        f"ImportError: pbs_attn in {checkout}/pbs_attn must have the files of the installed one in "
        f"{installed_folder}, whose libpbs.so it needs, but results.py differs: "
        f"`pip install {checkout}` again (with `-e` to edit the sources), or take {checkout} off "
        "Python's path"
    )


def test_sources_without_any_library(checkout, monkeypatch):
    folder = checkout / "pbs_attn"
    monkeypatch.setattr(_library, "_PACKAGE", folder)
    monkeypatch.setattr(sys, "path", [str(checkout)])
    words = f"libpbs.so must lie in {folder} or in an installed pbs_attn, found neither: "
    with pytest.raises(ImportError, match=re.escape(f"{words}`pip install {checkout}`")):
        _library._path.__wrapped__()


def test_types_of_every_public_name_are_checked():
    """By mypy, which tests/lint.sh runs on typed_use.py."""
    text = (ROOT / "tests" / "typed_use.py").read_text()
    used = {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
    assert set(pbs_attn.__all__) <= used
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r"^files = .*tests/typed_use.py.*\n(?:.*\n)?strict = true", project, re.M)


@pytest.mark.parametrize("operators", [OPERATORS, SEQUENCE_OPERATORS])
def test_documented_schemas_are_the_registered_ones(operators):
    text = (ROOT / "docs" / "ops.md").read_text()
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    (block,) = [block for block in blocks if block.startswith(f"{operators[0]}(\n")]
    documented = [" ".join(schema.split()) for schema in block.split("\n\n")]
    documented = [schema.replace("( ", "(").replace(" )", ")") for schema in documented]
    registered = [getattr(torch.ops.pbs, name).default._schema for name in operators]
    assert [torch._C.parse_schema(f"pbs::{line}") for line in documented] == registered
