#!/usr/bin/env bash
# Answers a prompt with the demo model, split over two ranks. Installs what is needed first.
#
#   scripts/demo.sh ["Your question"]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
install_dsv3 ""

question=${1:-"My name is Anna and I live in Amsterdam. What is my name?"}
prompts=$(mktemp)
trap 'rm -f "$prompts"' EXIT
printf '%s\n' "$question" >"$prompts"
OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc-per-node 2 launch/generate.py \
    --input-file "$prompts"
