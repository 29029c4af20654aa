#!/usr/bin/env bash
# Is this machine's GPU right, and how fast? Checks and measures it with the installed packages;
# installs nothing. Without a GPU, --rehearse runs every part.
#
#   scripts/gpu_check.sh [--rehearse] [PART...]     --help lists the parts
#   OUT=results BUDGET=300 scripts/gpu_check.sh smoke tests
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is not Python 3.11 or newer; set PYTHON" >&2
    exit 2
fi
export PYTHONPATH=$root:$root/kernels:$root/launch${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TOKENIZERS_PARALLELISM=false
exec "$python" -m benchlib.gpu_check "$@"
