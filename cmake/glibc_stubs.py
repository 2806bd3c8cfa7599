"""Makes stubs of libdl, libpthread and librt, which bind a library to the versions of their
functions that every glibc has.

glibc 2.34 moved these functions into libc, under a new version (dlopen@GLIBC_2.34). The old names
(dlopen@GLIBC_2.2.5 in libdl.so.2) are the same code, and still exist. A library that is linked
against these stubs needs only the old names, so it also loads on older systems. The static CUDA
runtime uses about fifty of them.

usage: glibc_stubs.py COMPILER FOLDER      prints the stubs' paths, none before glibc 2.34
"""

import re
import subprocess
import sys
from pathlib import Path

MOVED = (2, 34)
HOMES = {
    "libdl.so.2": ("dl",),
    "libpthread.so.0": ("pthread_", "sem_"),
    "librt.so.1": ("shm_",),
}


def moved_functions(table: str) -> dict[str, str]:
    """The old version of each function that 2.34 moved, from what `objdump -T` prints of libc."""
    old, moved = {}, set()
    for hidden, version, name in re.findall(r" (\(?)GLIBC_([\d.]+)\)? +(\w+)$", table, re.M):
        number = tuple(map(int, version.split(".")))
        if not hidden and number == MOVED:
            moved.add(name)
        elif hidden and number < MOVED:
            old[name] = max(old.get(name, ()), number)
    return {name: ".".join(map(str, old[name])) for name in sorted(moved & old.keys())}


def write_stub(compiler: str, path: Path, functions: dict[str, str]) -> None:
    code = "".join(f".globl {name}\n.type {name},%function\n{name}:\n" for name in functions)
    source = path.with_suffix(".s")
    source.write_text(f'.text\n{code}.section .note.GNU-stack,"",%progbits\n')
    script = path.with_suffix(".map")
    nodes = [
        f"GLIBC_{version} {{ {' '.join(f'{n};' for n, v in functions.items() if v == version)} }};"
        for version in sorted(set(functions.values()))
    ]
    script.write_text("\n".join(nodes))
    options = ["-shared", "-nostdlib", f"-Wl,-soname,{path.name}", f"-Wl,--version-script,{script}"]
    subprocess.run([compiler, *options, source, "-o", path], check=True)


def main(compiler: str, folder: Path) -> None:
    find = [compiler, "-print-file-name=libc.so.6"]
    libc = subprocess.run(find, check=True, capture_output=True, text=True).stdout.strip()
    dump = ["objdump", "-T", libc]
    table = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    moved = moved_functions(table)
    folder.mkdir(parents=True, exist_ok=True)
    for home, prefixes in HOMES.items():
        functions = {name: moved[name] for name in moved if name.startswith(prefixes)}
        if functions:
            write_stub(compiler, folder / home, functions)
            print(folder / home)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
