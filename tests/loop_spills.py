"""Fails if a main loop of a CUDA kernel of the library loads or stores spilled registers:

python tests/loop_spills.py [--library FILE] [--kernels NAME ...]

It reads the machine code of all architectures with cuobjdump, which comes with nvcc, and needs no
GPU. A loop is main if tensor cores multiply in it, and if no loop inside it has a quarter of its
products: rare paths do not hide the loop around them.
"""

import argparse
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import networkx  # torch depends on it

from pbs_attn import _library

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)([^;]*);")
PRODUCTS = ("HMMA", "HGMMA", "QGMMA")
SPILLS = ("STL", "LDL")
BRANCHES = ("BRA", "BSSY")
LEAVES = ("EXIT", "RET")


class Instruction(NamedTuple):
    address: int
    name: str
    target: int | None  # of a branch
    is_conditional: bool


class Loop(NamedTuple):
    first: int  # address
    products: int
    spills: int


class Kernel(NamedTuple):
    architecture: str
    name: str
    loops: list[Loop]


def kernels(lines: Iterator[str], names: list[str]) -> Iterator[Kernel]:
    """The kernels of a listing of `cuobjdump -sass` whose names contain one of `names`."""
    architecture, name, code = "", "", list[str]()
    for line in lines:
        if found := re.search(r"arch = (\w+)|Function : (\w+)", line):
            if name:
                yield Kernel(architecture, name, main_loops(code))
            architecture = found[1] or architecture
            is_asked = found[2] and any(part in found[2] for part in names)
            name, code = found[2] if is_asked else "", []
        elif name:
            code.append(line)
    if name:
        yield Kernel(architecture, name, main_loops(code))


def parse(lines: list[str]) -> list[Instruction]:
    instructions = []
    for line in lines:
        if not (found := INSTRUCTION.search(line)):
            continue
        name = found[2].split(".")[0]
        target = re.search(r"0x([0-9a-f]+)\s*$", found[3]) if name in BRANCHES else None
        is_conditional = re.search(r"@|\.DIV|\.CONV|[!U]*P\w+,", found[0]) is not None
        instructions.append(
            Instruction(
                int(found[1], 16),
                name,
                int(target[1], 16) if target else None,
                is_conditional,
            )
        )
    return instructions


def main_loops(lines: list[str]) -> list[Loop]:
    code = parse(lines)
    if not any(i.name in PRODUCTS for i in code):
        return []
    starts = {code[0].address}
    for this, following in itertools.pairwise(code):
        if this.target is not None:
            starts.add(this.target)
        if this.target is not None or this.name in LEAVES:
            starts.add(following.address)
    blocks: dict[int, list[Instruction]] = {}
    for instruction in code:
        if instruction.address in starts:
            block = blocks[instruction.address] = []
        block.append(instruction)
    edges = edges_of(blocks)
    loops = natural_loops(next(iter(blocks)), edges)

    def count(members: set[int], names: tuple[str, ...]) -> int:
        return sum(i.name in names for start in members for i in blocks[start])

    products = {first: count(members, PRODUCTS) for first, members in loops.items()}
    return [
        Loop(first, products[first], count(members, SPILLS))
        for first, members in loops.items()
        if products[first]
        and not any(
            inner != first and loops[inner] < members and 4 * products[inner] >= products[first]
            for inner in loops
        )
    ]


def edges_of(blocks: dict[int, list[Instruction]]) -> dict[int, list[int]]:
    edges = {}
    following = [*list(blocks)[1:], None]
    for (start, block), after in zip(blocks.items(), following, strict=True):
        last = block[-1]
        targets = [last.target] if last.target in blocks else []
        ends = last.name in (*LEAVES, "BRA") and not last.is_conditional
        if after is not None and not ends:
            targets.append(after)
        edges[start] = targets
    return edges


def natural_loops(entry: int, edges: dict[int, list[int]]) -> dict[int, set[int]]:
    """The blocks of each loop, by its first block, which dominates all others."""
    graph = networkx.DiGraph(edges)
    graph = graph.subgraph(networkx.descendants(graph, entry) | {entry})
    parents = networkx.immediate_dominators(graph, entry)
    parents.pop(entry, None)  # some versions have it

    def dominates(first: int, start: int) -> bool:
        while start != first and start in parents:
            start = parents[start]
        return start == first

    loops: dict[int, set[int]] = {}
    for source, first in graph.edges:
        if dominates(first, source):
            members = loops.setdefault(first, {first})
            if source != first:
                inside = graph.subgraph(set(graph) - {first})
                members |= networkx.ancestors(inside, source) | {source}
    return loops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", default=str(_library._path()))
    parser.add_argument("--kernels", nargs="+", default=["attend_kernel", "sampled_kernel"])
    args = parser.parse_args()
    command = ["cuobjdump", "-sass", args.library]
    num_loops, num_spilling = 0, 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for kernel in kernels(process.stdout, args.kernels):
            for loop in kernel.loops:
                num_loops += 1
                if loop.spills:
                    num_spilling += 1
                    print(f"{kernel.architecture} {kernel.name} at {loop.first:#x}:", end=" ")
                    print(f"{loop.spills} loads and stores, {loop.products} products", flush=True)
    if process.returncode != 0:
        sys.exit(f"cuobjdump failed after {num_loops} main loops, with status {process.returncode}")
    print(f"{num_spilling} of {num_loops} main loops spill")
    sys.exit(num_spilling > 0 or num_loops == 0)


if __name__ == "__main__":
    main()
