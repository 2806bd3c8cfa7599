"""The reader of machine code that looks for spills in loops, on a listing written by hand."""

import os
import sys

import loop_spills
import pytest


def listing(spill: str, *, where: str) -> list[str]:
    """A kernel with a main loop, in it a rare loop, and a path that jumps back into it."""
    places = {"before": "NOP", "main": "NOP", "rare": "NOP", "aside": "NOP", "after": "NOP"}
    places[where] = spill
    code = f"""
        0000 {places["before"]}
        0010 HMMA.16816.F32 R4, R8, R9, R4
        0020 HMMA.16816.F32 R4, R8, R9, R4
        0030 HMMA.16816.F32 R4, R8, R9, R4
        0040 HMMA.16816.F32 R4, R8, R9, R4
        0050 HMMA.16816.F32 R4, R8, R9, R4
        0060 {places["main"]}
        0070 @P1 BRA 0x100
        0080 @!P2 BRA 0xb0
        0090 {places["rare"]}
        00a0 @P3 BRA 0x90
        00b0 @P0 BRA 0x10
        00c0 {places["after"]}
        00d0 HMMA.16816.F32 R4, R8, R9, R4
        00e0 @P4 BRA 0xd0
        00f0 EXIT
        0100 {places["aside"]}
        0110 BRA 0x80
    """
    lines = [line.split(maxsplit=1) for line in code.strip().splitlines()]
    head = ["arch = sm_80", "\t\tFunction : attend_kernel"]
    return [*head, *(f"        /*{at}*/    {text} ;  /* 0x0 */" for at, text in lines)]


@pytest.mark.parametrize(
    ("where", "spills"), [("before", 0), ("main", 1), ("rare", 1), ("aside", 1), ("after", 0)]
)
@pytest.mark.parametrize("spill", ["STL [R1], R2", "@P0 LDL.LU.64 R2, [R1+0x8]"])
def test_counts_spills_of_main_loops(where, spills, spill):
    lines = iter(listing(spill, where=where))
    (kernel,) = loop_spills.kernels(lines, ["attend"])
    assert (kernel.architecture, kernel.name) == ("sm_80", "attend_kernel")
    found = {loop.first: (loop.products, loop.spills) for loop in kernel.loops}
    assert found == {0x10: (5, spills), 0xD0: (1, 0)}


def test_leaves_out_other_kernels():
    assert not list(loop_spills.kernels(iter(listing("NOP", where="main")), ["sampled"]))


def run(tmp_path, monkeypatch, lines, status):
    """The script's exit status or message, where cuobjdump prints these lines and then ends."""
    program = tmp_path / "cuobjdump"
    program.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + f"\nEND\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sys, "argv", ["loop_spills.py", "--library", "libpbs.so"])
    with pytest.raises(SystemExit) as end:
        loop_spills.main()
    return end.value.code


@pytest.mark.parametrize(("spill", "status"), [("NOP", 0), ("STL [R1], R2", 1)])
def test_fails_if_a_main_loop_spills(tmp_path, monkeypatch, spill, status):
    assert run(tmp_path, monkeypatch, listing(spill, where="main"), 0) == status


def test_fails_without_main_loops(tmp_path, monkeypatch):
    assert run(tmp_path, monkeypatch, ["arch = sm_80"], 0) == 1


def test_fails_if_the_listing_is_cut_off(tmp_path, monkeypatch):
    message = run(tmp_path, monkeypatch, listing("NOP", where="main"), 3)
    assert message == "cuobjdump failed after 2 main loops, with status 3"
