"""For MkDocs: the committed results lie outside of docs/, where pages link to them as they do for a
reader of the repository. The site gets copies and a list of them."""

import re
from pathlib import Path

from mkdocs.structure.files import File

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def on_files(files, *, config):
    paths = sorted(RESULTS.glob("*.csv"))
    for path in paths:
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    lines = ["# Committed results", "", *(f"- [{path.name}]({path.name})" for path in paths)]
    files.append(File.generated(config, "results/index.md", content="\n".join(lines)))
    return files


def on_page_markdown(markdown, **_):
    markdown = re.sub(r"\]\(\.\./benchmarks/results/?\)", "](results/index.md)", markdown)
    return markdown.replace("](../benchmarks/results/", "](results/")
