#!/usr/bin/env bash
# Lint, types and tests; installs dsv3 with its test tools into .venv first.
#
#   scripts/test.sh [pytest arguments]           the whole suite: about 20 minutes on two cores
#   scripts/test.sh --quick [pytest arguments]   under two minutes: one process, no kernels
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
install_dsv3 "[test]"

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
if [ "${1:-}" = --quick ]; then
    shift
    exec .venv/bin/pytest tests/unit tests/oracle/test_demo.py -m "not slow" "$@"
fi
if [ $# = 0 ]; then
    echo "the whole suite: about 20 minutes on two cores (--quick: under two)" >&2
fi
exec .venv/bin/pytest "$@"
