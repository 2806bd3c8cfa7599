"""Imports in the sources: the core imports nothing that is built on it, and there are no import
cycles."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pbs_attn"
CORE = ("ops", "attention", "sequences", "config", "masks", "_library", "_autograd", "_vmap")
BUILT_ON_IT = ("demo", "bench", "plot", "transformers", "integrations", "cli")


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(tree, name, is_package, known):
    """The modules of `known` that a module imports, including imports in functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                base = name.split(".")
                base = base[: len(base) - node.level + is_package]
                source = ".".join([*base, *filter(None, [source])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.add(inner if inner in known else source)
    return found & set(known) - {name}


GRAPH = {
    name: imports_of(ast.parse(path.read_text()), name, path.name == "__init__.py", FILES)
    for name, path in FILES.items()
}


def reached_from(name, graph):
    found, todo = set(), [name]
    while todo:
        new = graph[todo.pop()] - found
        found |= new
        todo += new
    return found


def cycles(graph):
    """The nodes that are part of a cycle."""
    return sorted(name for name in graph if name in reached_from(name, graph))


def by_package(graph):
    """The same with all modules of a package inside pbs_attn as one node."""

    def package(name):
        return ".".join(name.split(".")[:2])

    merged = {package(name): set() for name in graph}
    for name, imported in graph.items():
        merged[package(name)] |= {package(other) for other in imported} - {package(name)}
    return merged


def test_imports_are_read():
    tree = ast.parse("import torch\nfrom . import b, name\ndef f():\n  from ..c.d import x")
    known = ("p", "p.a", "p.a.b", "p.c.d")
    assert imports_of(tree, "p.a", True, known) == {"p.a.b", "p.c.d"}
    assert imports_of(ast.parse("from . import c, name"), "p.a", False, ("p", "p.c")) == {
        "p",
        "p.c",
    }
    assert GRAPH["pbs_attn.bench.pipeline"] >= {"pbs_attn", "pbs_attn.bench.options"}
    assert "pbs_attn.demo" in GRAPH["pbs_attn.cli"]  # in a function
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert cycles(graph) == ["b", "c"]
    assert cycles(by_package({"p.a.x": {"p.b.y"}, "p.b.y": set(), "p.b.z": {"p.a.x"}})) == [
        *("p.a", "p.b"),
    ]


@pytest.mark.parametrize("name", CORE)
def test_the_core_needs_nothing_that_is_built_on_it(name):
    reached = reached_from(f"pbs_attn.{name}", GRAPH)
    assert "pbs_attn" not in reached, "pbs_attn/__init__ imports all of them"
    tops = {other.split(".")[1] for other in reached}
    assert not [top for top in tops if top.startswith("_hf_") or top.startswith(BUILT_ON_IT)]


def test_modules_have_no_cycle():
    assert cycles(GRAPH) == []


def test_packages_have_no_cycle():
    assert cycles(by_package(GRAPH)) == []


def test_plots_need_no_bench():
    """A bench draws its rows. Plots also read them from files."""
    assert not [name for name in reached_from("pbs_attn.plot", GRAPH) if ".bench" in name]
