#!/usr/bin/env bash
# Chat with the demo model, split over two ranks; with a question, answer it and exit.
# Installs the dependencies first.
#
#   scripts/demo.sh ["Your question"]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
install_dsv3 "[chat]"

generate() {
    OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc-per-node 2 launch/generate.py "$@"
}

if [ $# -eq 0 ] && [ -t 0 ] && [ -t 1 ]; then
    echo "The demo model remembers a conversation. Try: My name is Anna. -- What is my name?" >&2
    generate --interactive
else
    question=${1:-"My name is Anna and I live in Amsterdam. What is my name?"}
    prompts=$(mktemp)
    trap 'rm -f "$prompts"' EXIT
    printf '%s\n' "$question" >"$prompts"
    generate --input-file "$prompts"
fi
