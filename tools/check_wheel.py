"""What a wheel of pbs_attn must be, beyond what auditwheel and twine look at.

usage: check_wheel.py --platform PLATFORM [--foreign FOLDER]... WHEEL
       check_wheel.py --build-requirements pyproject.toml
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MOST_BYTES = 40 * 2**20
LIBRARY = "pbs_attn/libpbs.so"
FILES = {LIBRARY, "pbs_attn/py.typed", "pbs_attn/data/persuasion.txt", "_pbs_attn_cli.py"}
FOLDERS = re.compile(r"pbs_attn/|_pbs_attn_cli\.py$|pbs_attn-[\d.]+\.dist-info/")
# torch's stable ABI comes from the one library of torch; the others are the system's.
NEEDED = re.compile(
    r"libtorch_cpu\.so|ld-linux.*|lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)\.so\.\d+", re.ASCII
)


def findings(wheel: Path, platform: str, foreign: list[str]) -> list[str]:
    """Everything that is wrong with the wheel, a sentence each. `foreign` are folders of the build
    machine, which no file may name."""
    found = []
    if not re.fullmatch(rf"pbs_attn-[\d.]+-py3-none-{platform}\.whl", wheel.name):
        found.append(f"the name must be pbs_attn-<version>-py3-none-{platform}.whl")
    if wheel.stat().st_size > MOST_BYTES:
        found.append(f"the size must be at most {MOST_BYTES} bytes, got {wheel.stat().st_size}")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        found += [f"the wheel must have {name}" for name in sorted(FILES - set(names))]
        found += [f"the wheel must not have {n}" for n in names if not FOLDERS.match(n)]
        for name in names:
            content = archive.read(name)
            found += [
                f"{name} must not name a folder of the build machine, got {path}"
                for path in foreign
                if re.search(rb"(?<![\w.])" + re.escape(path.encode()) + rb"(?=/)", content)
            ]
        if LIBRARY in names:
            found += library_findings(archive.extract(LIBRARY, folder))
    return found


def library_findings(library: str) -> list[str]:
    """What is wrong with the shared library."""
    dynamic = printed("readelf", "-dW", library)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    found = [f"the library must not need {n}" for n in needed if not NEEDED.fullmatch(n)]
    if "libtorch_cpu.so" not in needed:
        found.append("the library must need libtorch_cpu.so")
    if re.search(r"\(R(UN)?PATH\)", dynamic):
        found.append("the library must have neither RPATH nor RUNPATH")
    if ".symtab" in printed("readelf", "-SW", library):
        found.append("the library must be stripped")
    exported = {
        line.split()[-1] for line in printed("nm", "-D", "--defined-only", library).splitlines()
    }
    found += [f"the library must not export {n}" for n in exported if not n.startswith("pbs_")]
    return found


def printed(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def build_requirements(project: Path) -> list[str]:
    """Those of pyproject.toml; Python 3.10 has no module that reads it."""
    section = project.read_text().split("[build-system]")[1]
    (listed,) = re.findall(r"^requires = \[(.*)\]$", section, re.MULTILINE)
    return re.findall(r'"([^"]+)"', listed)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--build-requirements", type=Path)
    parser.add_argument("--platform")
    parser.add_argument("--foreign", action="append", default=[])
    parser.add_argument("wheel", type=Path, nargs="?")
    args = parser.parse_args()
    if args.build_requirements:
        print("\n".join(build_requirements(args.build_requirements)))
        return 0
    found = findings(args.wheel, args.platform, args.foreign)
    for sentence in found:
        print(f"{args.wheel.name}: {sentence}", file=sys.stderr)
    if not found:
        print(f"{args.wheel.name}: {args.wheel.stat().st_size / 2**20:.1f} MiB, nothing is wrong")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
