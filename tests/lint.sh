#!/usr/bin/env bash
# Fails on any finding of ruff, clang-format, mypy or check-jsonschema. usage: tests/lint.sh
# mypy reads torch's and transformers' types: it runs where pbs_attn is installed, as in .ci/run.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format --dry-run -Werror
if python -c 'import torch, transformers' 2>/dev/null; then
  python -m mypy
else
  echo 'mypy is left out: it needs torch and transformers' >&2
fi
if command -v check-jsonschema >/dev/null; then
  check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
else
  echo 'the workflows are left out: pip install -r requirements/lint.txt' >&2
fi
