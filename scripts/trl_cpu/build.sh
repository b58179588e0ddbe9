#!/usr/bin/env bash
# Builds an environment with TRL for benchmarks/vs_trl.py (about 1 GB with PyTorch's CPU wheels), once, outside the checkout;
# prints its Python.
# usage: [PYTHON=python3] [TORCH_INDEX=URL] [OPD_CACHE=~/.cache/opd_trainer] scripts/trl_cpu/build.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../environment.sh"

fill() {
    "${install[@]}" --requirement "$here/requirements.txt"
}

environment trl "a few minutes" "$here"/*.txt
