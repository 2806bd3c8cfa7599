"""The notice about an unused GPU, on machines of every kind."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from pbs_attn import _library

NO_NVCC = {"cuda_version": "", "cuda_status": "no CUDA compiler (nvcc) was found"}
SWITCHED_OFF = {"cuda_version": "", "cuda_status": "switched off (PBS_CUDA=OFF)"}
WITH_KERNELS = {"cuda_version": "13.0", "cuda_status": "sm_90a"}
FAMILIES = [
    {"name": "sm90", "first": 90, "last": 90},
    {"name": "sm80", "first": 80, "last": None},
]
HOPPER, AMPERE, TURING, BLACKWELL = (9, 0), (8, 0), (7, 5), (10, 0)


@pytest.fixture
def machine(monkeypatch):
    """Imitates a machine with these GPUs, and a library with these families."""

    def make(
        *gpus,
        compiled=NO_NVCC,
        torch_cuda="13.0",
        visible=1,
        families=FAMILIES,
        driver=13000,
        on_bus=True,
    ):
        monkeypatch.setattr(_library, "_gpu_families", lambda: families)
        monkeypatch.setattr(_library, "_gpu_capabilities", lambda: list(gpus))
        monkeypatch.setattr(_library, "compiled_info", lambda: compiled)
        monkeypatch.setattr(_library, "_driver_cuda", lambda: driver)
        monkeypatch.setattr(_library, "_has_nvidia_gpu", lambda: on_bus)
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)

    return make


@pytest.mark.parametrize("compiled", [NO_NVCC, SWITCHED_OFF])
def test_build_without_kernels(machine, compiled):
    machine(AMPERE, HOPPER, compiled=compiled)
    assert _library.missing_gpu_support() == (
        "the GPU is not used: this build of pbs_attn has no CUDA kernels "
        f"({compiled['cuda_status']}); in the folder of the sources, "
        "`PBS_CUDA=ON pip install --no-build-isolation .` builds them or says what it lacks"
    )


def test_torch_without_cuda(machine):
    machine(HOPPER, torch_cuda=None, visible=0, compiled=WITH_KERNELS)
    notice = _library.missing_gpu_support()
    assert notice.startswith(f"the GPU is not used: torch {torch.__version__} has no CUDA")


OLD_DRIVER = {"compiled": WITH_KERNELS, "driver": 12080, "torch_cuda": "12.8"}


def test_old_driver(machine):
    machine(HOPPER, **OLD_DRIVER)
    assert _library.missing_gpu_support() == (
        "the GPU is not used: this build of pbs_attn needs a driver for CUDA 13.0 or newer, and "
        "this machine's is one for CUDA 12.8; update the driver, or install a build of pbs_attn "
        "that an older nvcc compiled"
    )


@pytest.mark.parametrize("torch_cuda", ["13.0", None])
def test_no_driver(machine, torch_cuda):
    machine(driver=0, visible=0, torch_cuda=torch_cuda, compiled=WITH_KERNELS)
    assert "but no driver for it is loaded; install the driver" in _library.missing_gpu_support()


@pytest.mark.parametrize("torch_cuda", ["13.0", None])
def test_another_gpu(machine, torch_cuda):
    machine(TURING, (7, 0), torch_cuda=torch_cuda)
    notice = _library.missing_gpu_support()
    assert "need compute capability 8.0 or newer, and this machine has 7.5, 7.0" in notice


@pytest.mark.parametrize(
    ("wanted", "families"),
    [
        ("", [None, "sm80", "sm80", "sm90", "sm80"]),
        ("sm80", [None, "sm80", "sm80", "sm80", "sm80"]),
        ("sm90", [None, None, None, "sm90", None]),
        ("sm70", [None] * 5),
    ],
)
def test_families_by_gpu(machine, monkeypatch, wanted, families):
    machine()
    monkeypatch.setenv("PBS_GPU_FAMILY", wanted)
    gpus = (TURING, AMPERE, (8, 9), HOPPER, BLACKWELL)
    assert [_library.gpu_family(gpu) for gpu in gpus] == families
    assert [_library.runs_on(gpu) for gpu in gpus] == [name is not None for name in families]


def test_a_family_that_does_not_run_here(machine, monkeypatch):
    machine(HOPPER, compiled=WITH_KERNELS)
    monkeypatch.setenv("PBS_GPU_FAMILY", "sm70")
    assert _library.missing_gpu_support() == (
        "the GPU is not used: PBS_GPU_FAMILY is sm70, which names no kernels that run on it; unset "
        "the variable"
    )


@pytest.mark.parametrize("is_built", [True, False])
@pytest.mark.parametrize("gpu", [TURING, AMPERE, HOPPER, BLACKWELL])
def test_kernels_run_on_the_families_of_a_build_with_cuda(machine, monkeypatch, gpu, is_built):
    machine(gpu)
    stages = ("attention",) if is_built else ()
    monkeypatch.setattr(_library, "build_info", lambda: {"cuda_stages": stages})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)
    assert _library.has_kernel("attention", "cuda") == (is_built and gpu != TURING)


@pytest.mark.parametrize("driver, runs", [(0, True), (12080, False), (13000, True)])
def test_kernels_need_a_driver_for_them(machine, monkeypatch, driver, runs):
    """Without libcuda, torch would find no GPU."""
    machine(HOPPER, compiled=WITH_KERNELS, driver=driver)
    monkeypatch.setattr(_library, "build_info", lambda: {"cuda_stages": ("attention",)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    assert _library.has_kernel("attention", "cuda") == runs


@pytest.mark.parametrize(
    "gpus, options",
    [
        ([], {"torch_cuda": None, "on_bus": False, "driver": 0}),
        ([], {"visible": 0, "on_bus": False, "driver": 0}),
        ([], {"visible": 0}),  # NVML is missing, the driver is not
        ([HOPPER], {"compiled": WITH_KERNELS}),
        ([HOPPER], {"compiled": WITH_KERNELS, "driver": 14000}),
        ([HOPPER], {"visible": 0}),  # CUDA_VISIBLE_DEVICES hides it
        ([AMPERE], {"visible": 0}),
    ],
)
def test_nothing_to_say(machine, gpus, options):
    machine(*gpus, **options)
    assert _library.missing_gpu_support() is None


@pytest.mark.parametrize(
    "options, reason", [({}, "has no CUDA kernels"), (OLD_DRIVER, "needs a driver for CUDA 13.0")]
)
def test_import_warns_of_a_gpu_without_use(machine, options, reason):
    machine(HOPPER, **options)
    notice = rf"^pbs_attn: the GPU is not used: this build of pbs_attn {reason}"
    with pytest.warns(_library.GPUSupportWarning, match=notice):
        _library.load()


@pytest.mark.parametrize(
    "gpus, options",
    [
        ([HOPPER], {"compiled": SWITCHED_OFF}),
        ([HOPPER], {"compiled": WITH_KERNELS}),
        ([HOPPER], {"torch_cuda": None}),
        ([HOPPER], OLD_DRIVER | {"torch_cuda": None}),
        ([HOPPER], {"visible": 0}),
        ([TURING], {}),
        ([TURING], OLD_DRIVER),
        ([], {}),
    ],
)
def test_import_does_not_warn(machine, gpus, options):
    machine(*gpus, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _library.load()


NVML = """
extern "C" {
int nvmlInit_v2() { return INIT; }
int nvmlShutdown() { return 0; }
int nvmlDeviceGetCount_v2(unsigned* count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) {
  static int devices[2] = {0, 1};
  *device = &devices[index];
  return 0;
}
int nvmlDeviceGetCudaComputeCapability(void* device, int* major, int* minor) {
  *major = 8 + *static_cast<int*>(device);
  *minor = 0;
  return 0;
}
}
"""


@pytest.mark.parametrize("init, expected", [(0, [AMPERE, HOPPER]), (9, [])])
def test_capabilities_come_from_the_driver(init, expected, tmp_path):
    """Imitates the library of a driver with two GPUs, and one whose driver is not loaded."""
    make_driver(tmp_path, "libnvidia-ml.so.1", NVML, f"-DINIT={init}")
    assert with_driver(tmp_path, "_library._gpu_capabilities()") == f"{expected}"


def make_driver(folder, name, code, *options):
    source = (folder / name).with_suffix(".cpp")
    source.write_text(code)
    subprocess.run(["c++", "-shared", "-fPIC", *options, source, "-o", folder / name], check=True)


def with_driver(folder, expression):
    """The value of the expression in a process that finds the libraries of the driver in the
    folder."""
    code = f"from pbs_attn import _library; print({expression})"
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_version_comes_from_the_driver(tmp_path):
    code = 'extern "C" int cuDriverGetVersion(int* version) { *version = 12080; return 0; }'
    make_driver(tmp_path, "libcuda.so.1", code)
    assert with_driver(tmp_path, "_library._driver_cuda()") == "12080"


@pytest.mark.parametrize(
    "vendor, kind, expected",
    [
        ("0x10de", "0x030200", True),  # a GPU without a display
        ("0x10de", "0x030000", True),
        ("0x10de", "0x020000", False),  # a network card of NVIDIA
        ("0x1002", "0x030000", False),
        ("0x10de", None, False),
    ],
)
def test_gpus_without_a_driver_are_on_the_bus(vendor, kind, expected, tmp_path):
    for name, vendor_and_kind in (("a", ("0x8086", "0x060000")), ("b", (vendor, kind))):
        (tmp_path / name).mkdir()
        for file, text in zip(("vendor", "class"), vendor_and_kind, strict=True):
            if text is not None:
                (tmp_path / name / file).write_text(f"{text}\n")
    assert _library._has_nvidia_gpu(tmp_path) == expected
