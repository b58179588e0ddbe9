# Sourced by scripts/*_cpu/build.sh: an environment outside the checkout, built once for each recipe and Python.
# PYTHON, TORCH_INDEX and OPD_CACHE are as in their usage.

# environment NAME DURATION RECIPE...: prints the Python of the environment of these files. Where it is not there yet, calls
# `fill VENV`, which finds pip with its options in the array `install`.
environment() {
    local name=$1 duration=$2 python=${PYTHON:-python3} torch_index=${TORCH_INDEX:-} key
    local cache=${OPD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/opd_trainer}
    shift 2
    # Another recipe or another Python is another environment.
    key=$({ cat "$@"; "$python" -c 'import sys; print(sys.version_info[:2])'; } | sha256sum | cut -c1-12)
    venv=$cache/$name-cpu-$key  # not local: the trap below needs it

    mkdir -p "$cache"
    exec 9>"$venv.lock"
    flock --wait 1800 9 || { echo "$name: another process has been building $venv for half an hour" >&2; exit 1; }
    if [ ! -e "$venv/.complete" ]; then
        echo "$name: building $venv ($duration, once)" >&2
        rm -rf "$venv"
        # Half of it is of no use, and takes gigabytes.
        trap 'rm -rf "$venv"' EXIT
        trap 'exit 1' INT TERM
        "$python" -m venv "$venv" 2>/dev/null || { rm -rf "$venv"; virtualenv --quiet --python "$python" "$venv"; } >&2
        install=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
        [ -z "$torch_index" ] || install+=(--extra-index-url "$torch_index")
        fill "$venv" >&2
        touch "$venv/.complete"
        trap - EXIT INT TERM
    fi
    echo "$venv/bin/python"
}
