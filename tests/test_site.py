"""mkdocs builds docs/ without a warning and finds broken links, and the site loads nothing from
other hosts."""

import ast
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

REASON = "mkdocs-material is not installed: pip install -r requirements/docs.txt"
pytest.importorskip("material", reason=REASON)
ROOT = Path(__file__).resolve().parent.parent
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


def build(source, site):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    files = ["-f", source / "mkdocs.yml", "-d", site]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run([*command, *files], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    result = build(ROOT, folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_every_page_is_built(site):
    pages = {path.stem for path in site.glob("*.html")} - {"404"}
    assert pages == {path.stem for path in ROOT.glob("docs/*.md")} | {"CONTRIBUTING", "CHANGELOG"}
    for path in ROOT.glob("benchmarks/results/*.csv"):
        assert (site / "results" / path.name).read_bytes() == path.read_bytes()
    assert (site / "search" / "search_index.json").exists()
    assert not list(site.rglob("*.py"))


def test_the_reference_has_every_public_name(site):
    """It also has every field of the settings. The names are read from the sources, without
    imports."""
    page = (site / "api.html").read_text()
    package = ast.parse((ROOT / "pbs_attn" / "__init__.py").read_text())
    (names,) = [ast.literal_eval(x.value) for x in package.body if is_assigned(x, "__all__")]
    functions = [name for name in names if name not in ("__version__", "transformers")]
    functions += [f"transformers.{name}" for name in ("register", "explain", "routes")]
    assert len(functions) > 15
    for name in functions:
        assert re.search(rf">\s*pbs_attn\.{name}\s*<", page), name
    config = ast.parse((ROOT / "pbs_attn" / "config.py").read_text())
    (settings,) = [x for x in config.body if isinstance(x, ast.ClassDef)]
    fields = [x.target.id for x in settings.body if isinstance(x, ast.AnnAssign)]
    assert len(fields) > 10
    for name in fields:
        assert f'title="pbs_attn.config.PBSConfig.{name}">' in page, name


def is_assigned(node, name):
    return isinstance(node, ast.Assign) and [x.id for x in node.targets] == [name]


def test_title_has_the_version(site):
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert f"pbs_attn {version}</title>" in (site / "index.html").read_text()


def test_a_link_to_the_repository_where_it_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("REPOSITORY_URL", "https://example.org/pbs_attn")
    assert build(ROOT, tmp_path).returncode == 0
    assert 'href="https://example.org/pbs_attn"' in (tmp_path / "index.html").read_text()


def external(path):
    """The resources that a page or a style sheet loads from another host."""
    text, found = path.read_text(), []
    if path.suffix == ".css":
        found = re.findall(r"""(?:url\(|@import)\s*["']?([^"')\s]+)""", text)
    else:
        parser = HTMLParser()
        parser.handle_starttag = lambda tag, attributes: found.append(
            dict(attributes).get(LOADS.get(tag)) or ""
        )
        parser.feed(text)
        assert any(found), path
    return [link for link in found if re.match(r"(\w+:)?//", link)]


def test_nothing_is_loaded_from_elsewhere(site, tmp_path):
    files = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    assert {path.suffix for path in files} == {".html", ".css"}
    assert not {path.name: links for path in files if (links := external(path))}
    for name, text in (("a.html", '<script src="//x/y.js">'), ("a.css", "@import 'http://x'")):
        (tmp_path / name).write_text(text)
        assert external(tmp_path / name)


@pytest.mark.parametrize(
    "link",
    ["nowhere.md", "ops.md#nowhere", "../benchmarks/results/nowhere.csv", "/ops.md", "../README"],
)
def test_a_broken_link_stops_the_build(link, tmp_path):
    for name in ("docs", "benchmarks/results", "pbs_attn"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("mkdocs.yml", "pyproject.toml", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    with (tmp_path / "docs" / "index.md").open("a") as page:
        page.write(f"\n[broken]({link})\n")
    result = build(tmp_path, tmp_path / "site")
    assert result.returncode != 0
    assert "WARNING" in result.stderr and "index.md" in result.stderr
