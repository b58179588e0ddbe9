#!/usr/bin/env bash
# Builds an environment in which a real SGLang server runs on CPU (about 3 GB), once, outside the checkout; prints its Python.
# usage: [PYTHON=python3] [TORCH_INDEX=URL] [OPD_CACHE=~/.cache/opd_trainer] scripts/sglang_cpu/build.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

python=${PYTHON:-python3}
torch_index=${TORCH_INDEX:-}
cache=${OPD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/opd_trainer}
# Another recipe or another Python is another environment.
key=$({ cat "$here"/*.txt "$here"/*.py; "$python" -c 'import sys; print(sys.version_info[:2])'; } | sha256sum | cut -c1-12)
venv=$cache/sglang-cpu-$key

mkdir -p "$cache"
exec 9>"$venv.lock"
flock --wait 1800 9 || { echo "sglang: another process has been building $venv for half an hour" >&2; exit 1; }
if [ ! -e "$venv/.complete" ]; then
    echo "sglang: building $venv (several minutes, once)" >&2
    rm -rf "$venv"
    # Half of it is of no use, and takes gigabytes.
    trap 'rm -rf "$venv"' EXIT
    trap 'exit 1' INT TERM
    "$python" -m venv "$venv" 2>/dev/null || { rm -rf "$venv"; virtualenv --quiet --python "$python" "$venv"; } >&2
    install=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
    [ -z "$torch_index" ] || install+=(--extra-index-url "$torch_index")
    "${install[@]}" setuptools wheel >&2
    "${install[@]}" --requirement "$here/requirements.txt" >&2
    "${install[@]}" --no-deps --requirement "$here/requirements-no-deps.txt" >&2
    cp "$here/sitecustomize.py" "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/"
    touch "$venv/.complete"
    trap - EXIT INT TERM
fi
echo "$venv/bin/python"
