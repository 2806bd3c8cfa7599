"""The lists of places in CONTRIBUTING.md name files and names that exist. CHANGELOG.md has the
version."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
WORD = r"[A-Za-z_]\w*"


def code(text):
    return re.findall(r"`([^`]+)`", text)


def places():
    """(files, names in code beside them) of each row of the lists."""
    section = CONTRIBUTING.split("## Places to touch")[1].split("\n## ")[0]
    for line in section.splitlines():
        place, *rest = [cell.strip() for cell in line.strip("|").split(" | ")]
        if rest and place != "place" and set(place) - set("-|"):
            yield code(place), [name for name in code(rest[0]) if re.fullmatch(WORD, name)]


def test_named_files_exist():
    section = CONTRIBUTING.split("## Where things are")[1]
    named = [text for text in code(section) if re.fullmatch(r"[\w./]+(/|\.\w+)?", text)]
    paths = {text for text in named if "/" in text and not text.startswith(("common/", "sm"))}
    paths -= {"bench/", "plot/", "native/", "results/"}  # beside the folder of their row
    assert len(paths) > 30
    assert not [path for path in sorted(paths) if not (ROOT / path).exists()]


def test_named_places_are_there():
    rows = list(places())
    assert len(rows) > 40
    missing = []
    for files, names in rows:
        assert files
        text = "\n".join((ROOT / file).read_text() for file in files)
        missing += [(files, name) for name in names if not re.search(rf"\b{name}\b", text)]
    assert not missing


def test_changelog_has_the_version():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    headings = re.findall(r"^## (\d+\.\d+\.\d+)(.*)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    numbers = [tuple(map(int, number.split("."))) for number, _ in headings]
    assert numbers == sorted(set(numbers), reverse=True)
    assert version in [number for number, _ in headings]
