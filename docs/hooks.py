"""For MkDocs: the committed results, CONTRIBUTING.md and CHANGELOG.md lie outside of docs/, where
pages link to them as they do for a reader of the repository. The site gets copies, and a list of
the results. Its title has the version."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")


def on_config(config):
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    config.site_name = f"{config.site_name} {version}"
    return config


def on_files(files, *, config):
    paths = sorted(RESULTS.glob("*.csv"))
    for path in paths:
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    lines = ["# Committed results", "", *(f"- [{path.name}]({path.name})" for path in paths)]
    files.append(File.generated(config, "results/index.md", content="\n".join(lines)))
    for name in PAGES:
        text = (ROOT / name).read_text().replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown, **_):
    markdown = re.sub(r"\]\(\.\./benchmarks/results/?\)", "](results/index.md)", markdown)
    for name in PAGES:
        markdown = markdown.replace(f"](../{name}", f"]({name}")
    return markdown.replace("](../benchmarks/results/", "](results/")
