#!/usr/bin/env bash
# Creates a virtual environment and installs the project with its pinned dependencies into it.
# usage: [PYTHON=python3] [TORCH_INDEX=URL] scripts/setup.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$1
python=${PYTHON:-python3}
torch_index=${TORCH_INDEX:-}

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 2
}

command -v "$python" >/dev/null || fail "$python is not on the PATH." "Install Python 3.11, 3.12 or 3.13, or name it: make setup PYTHON=/path/to/python3.11"
version=$("$python" -c 'import platform; print(platform.python_version())')
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' ||
    fail "$python is Python $version; 3.11, 3.12 or 3.13 is needed: Megatron-core 0.16 has wheels for no newer one." \
        "Name another one: make setup PYTHON=python3.11"

if [ ! -x "$venv/bin/pip" ]; then
    rm -rf "$venv"
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        "$python" -m venv "$venv"
    elif "$python" -m virtualenv --version >/dev/null 2>&1; then
        "$python" -m virtualenv --quiet "$venv"
    elif command -v virtualenv >/dev/null; then
        virtualenv --quiet --python "$python" "$venv"
    else
        fail "$python ($version) cannot create virtual environments." \
            "Install its venv module (Debian, Ubuntu: apt install python${version%.*}-venv) or virtualenv (pip install --user virtualenv)."
    fi
fi

# -I: packages of a PYTHONPATH must not count as installed.
install=("$venv/bin/python" -I -m pip --disable-pip-version-check install --quiet --constraint constraints.txt)
if [ -n "$torch_index" ]; then
    # A wheel with a local version (2.13.0+cpu) is preferred to the ordinary build (2.13.0).
    install+=(--extra-index-url "$torch_index")
fi
echo "setup: installing into $venv (a few minutes on the first run)"
"${install[@]}" --editable '.[dev]'
"$venv/bin/python" -I -m pip check
