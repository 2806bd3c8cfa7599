#!/usr/bin/env bash
# Fails on any ruff or clang-format finding. usage: tests/lint.sh
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format --dry-run -Werror
