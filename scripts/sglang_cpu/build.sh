#!/usr/bin/env bash
# Builds an environment in which a real SGLang server runs on CPU (about 3 GB), once, outside the checkout; prints its Python.
# usage: [PYTHON=python3] [TORCH_INDEX=URL] [OPD_CACHE=~/.cache/opd_trainer] scripts/sglang_cpu/build.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../environment.sh"

fill() {
    "${install[@]}" setuptools wheel
    "${install[@]}" --requirement "$here/requirements.txt"
    "${install[@]}" --no-deps --requirement "$here/requirements-no-deps.txt"
    cp "$here/sitecustomize.py" "$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/"
}

environment sglang "several minutes" "$here"/*.txt "$here"/*.py
