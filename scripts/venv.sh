# Sourced by demo.sh, serve.sh and test.sh: creates .venv next to pyproject.toml and installs dsv3 into it.
# Does nothing if dsv3 is installed and pyproject.toml has not changed since.
#
#   install_dsv3 EXTRAS     e.g. install_dsv3 "[test]"

TORCH=2.13.0

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed; none was found on the PATH" >&2
    return 2
}

# Without a GPU, the CPU build of torch is enough; the default build has gigabytes of CUDA libraries.
install_torch() {
    if .venv/bin/python -c 'import torch' 2>/dev/null; then
        return
    fi
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        .venv/bin/pip install -q "torch>=2.9"
        return
    fi
    .venv/bin/pip install -q "torch==$TORCH+cpu" 2>/dev/null ||
        .venv/bin/pip install -q "torch==$TORCH" --index-url https://download.pytorch.org/whl/cpu ||
        .venv/bin/pip install -q "torch==$TORCH"
}

install_dsv3() {
    local extras=$1 stamp=".venv/.installed${1//[^a-z]/}"
    if [ "$stamp" -nt pyproject.toml ]; then
        return
    fi
    echo "installing dsv3$extras into .venv (once) ..." >&2
    [ -x .venv/bin/pip ] || "$(find_python)" -m venv .venv
    install_torch
    .venv/bin/pip install -q -e ".$extras"
    touch "$stamp"
}
