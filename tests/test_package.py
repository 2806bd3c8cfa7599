"""What the wheel is, and what the library needs."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import pbs_attn
from pbs_attn.ops import OPERATORS

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path(pbs_attn.__file__).with_name("libpbs.so")


def symbols(*options):
    result = subprocess.run(["nm", "-D", *options, LIBRARY], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return {line.split()[-1].split("@")[0] for line in result.stdout.splitlines()}


def test_library_needs_only_the_stable_abi():
    unresolved = symbols("--undefined-only")
    from_torch = {name for name in unresolved if "torch" in name or "c10" in name}
    assert from_torch, "the library must call torch"
    assert all(re.match(r"(aoti_torch|torch)_[a-z0-9_]+$", name) for name in from_torch)
    assert not any(name.startswith(("Py", "_Py")) for name in unresolved)
    assert not any(name.startswith(("cuda", "cu")) for name in unresolved), "cudart is static"


def test_library_exports_nothing_that_could_clash():
    exported = symbols("--defined-only", "--extern-only")
    assert {"pbs_build_info", "pbs_cpu_capability"} <= exported
    assert not any(name.startswith(("cuda", "cu", "aoti", "torch_")) for name in exported)


def test_build_info():
    info = pbs_attn.build_info()
    assert info["version"] == re.search(
        r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    ).group(1)
    assert info["torch_target"] == "2.10"
    assert info["cpu_capability"] in ("avx512", "avx2", "baseline")
    assert info["cuda"] == (info["cuda_status"] == "sm_90a")
    assert bool(info["cuda_stages"]) == info["cuda"]
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


def test_wheel_is_for_any_python(tmp_path):
    command = ["-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"pbs_attn-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert "pbs_attn/libpbs.so" in names
    assert any(name.startswith("pbs_attn/data/") for name in names), "the demo's document"
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "build/"))]


def test_documented_schemas_are_the_registered_ones():
    text = (ROOT / "docs" / "ops.md").read_text()
    documented = re.search(r"```\n(.*?)```", text, re.DOTALL).group(1).splitlines()
    registered = [getattr(torch.ops.pbs, name).default._schema for name in OPERATORS]
    assert [torch._C.parse_schema(f"pbs::{line}") for line in documented] == registered
