#!/usr/bin/env bash
# Lint, types and tests; installs dsv3 with its test tools into .venv first.
#
#   scripts/test.sh                              the whole suite: half an hour on two cores
#   scripts/test.sh --quick [pytest arguments]   under two minutes: one process, no kernels
#   scripts/test.sh PYTEST_ARGUMENTS             the tests that they select, one at a time
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
if [ $# != 0 ]; then
    exec .venv/bin/pytest "$@"
fi
echo "the whole suite: half an hour on two cores (--quick: under two)" >&2
# Two files at a time, in order: a file's tests share their processes, and many only wait.
# The stacks of a test that hangs show its name.
exec .venv/bin/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder \
    -o faulthandler_timeout=300
