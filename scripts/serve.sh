#!/usr/bin/env bash
# Serve the demo model, split over two ranks, with a chat page: http://127.0.0.1:8000
# Installs the dependencies first.
#
#   scripts/serve.sh [FLAGS OF launch/serve.py]      e.g. --port 9000 --api-key SECRET
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
install_dsv3 "[serve]"

export OMP_NUM_THREADS=1
exec .venv/bin/torchrun --standalone --nproc-per-node 2 launch/serve.py "$@"
