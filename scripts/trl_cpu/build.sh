#!/usr/bin/env bash
# Builds an environment with TRL for benchmarks/vs_trl.py (about 1 GB with PyTorch's CPU wheels), once, outside the checkout;
# prints its Python.
# usage: [PYTHON=python3] [TORCH_INDEX=URL] [OPD_CACHE=~/.cache/opd_trainer] scripts/trl_cpu/build.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

python=${PYTHON:-python3}
torch_index=${TORCH_INDEX:-}
cache=${OPD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/opd_trainer}
# Another recipe or another Python is another environment.
key=$({ cat "$here"/*.txt; "$python" -c 'import sys; print(sys.version_info[:2])'; } | sha256sum | cut -c1-12)
venv=$cache/trl-cpu-$key

mkdir -p "$cache"
exec 9>"$venv.lock"
flock --wait 1800 9 || { echo "trl: another process has been building $venv for half an hour" >&2; exit 1; }
if [ ! -e "$venv/.complete" ]; then
    echo "trl: building $venv (a few minutes, once)" >&2
    rm -rf "$venv"
    # Half of it is of no use.
    trap 'rm -rf "$venv"' EXIT
    trap 'exit 1' INT TERM
    "$python" -m venv "$venv" 2>/dev/null || { rm -rf "$venv"; virtualenv --quiet --python "$python" "$venv"; } >&2
    install=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
    [ -z "$torch_index" ] || install+=(--extra-index-url "$torch_index")
    "${install[@]}" --requirement "$here/requirements.txt" >&2
    touch "$venv/.complete"
    trap - EXIT INT TERM
fi
echo "$venv/bin/python"
