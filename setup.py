"""Drives CMake and Ninja; CMakeLists.txt is where the build is decided."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
LIBRARY = "libpbs.so"


class CMakeBuild(build_ext):
    """Builds the one shared library; `PBS_CUDA=ON|OFF|AUTO`, `CUTLASS_DIR` and `PBS_PORTABLE` pass
    through."""

    def get_ext_filename(self, fullname):
        # Not a Python module: no libpython, no interpreter tag.
        return str(Path(*fullname.split(".")).with_name(LIBRARY))

    def build_extension(self, ext):
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = ROOT / "build" / "cmake"
        build_dir.mkdir(parents=True, exist_ok=True)
        # An isolated build has its own torch and cmake each time, so no path may be remembered.
        (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        self.run_cmake(
            ["-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"]
            + [f"-D{key}={value}" for key, value in self.definitions().items()]
        )
        self.run_cmake(["--build", str(build_dir), "--parallel", jobs])
        library.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a running process may have the old file mapped.
        fresh = library.with_suffix(".new")
        shutil.copy2(build_dir / LIBRARY, fresh)
        fresh.replace(library)

    def definitions(self):
        definitions = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "PBS_VERSION": self.distribution.get_version(),
            "PBS_COMMIT": git_commit(),
        }
        for name in ("PBS_CUDA", "CUTLASS_DIR", "PBS_PORTABLE"):
            if os.environ.get(name):
                definitions[name] = os.environ[name]
        return definitions

    @staticmethod
    def run_cmake(arguments):
        # stderr reaches pip's console even where it hides the build's stdout.
        status = subprocess.run(["cmake", *arguments], stdout=sys.stderr).returncode
        if status:
            # No traceback, which would push CMake's own message out of sight.
            sys.exit(f"pbs_attn: cmake ended with status {status}, for the reason above")


class PackageExamples(build_py):
    """Adds the demo's document to the package; in the repository it lives under examples/."""

    def run(self):
        super().run()
        if not self.editable_mode:
            data = Path(self.build_lib) / "pbs_attn" / "data"
            data.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / "examples" / "persuasion.txt", data)


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>: the library does not know which Python loads it."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def git_commit():
    if not (ROOT / ".git").exists():
        return "unknown"  # unpacked somewhere, perhaps inside another repository
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"


def cuda_build_requirements():
    """CUTLASS headers for an isolated build, only where a CUDA compiler could use them."""
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc")
    wants_cuda = os.environ.get("PBS_CUDA", "AUTO") != "OFF" and nvcc
    return ["nvidia-cutlass==4.2.0.0"] if wants_cuda and not os.environ.get("CUTLASS_DIR") else []


setup(
    ext_modules=[Extension("pbs_attn.libpbs", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": PackageExamples, "bdist_wheel": AnyPythonWheel},
    setup_requires=cuda_build_requirements(),
)
