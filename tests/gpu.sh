#!/usr/bin/env bash
# What only a GPU can show, in ten minutes on an H100: its tests, whole processes, kernels, steps beside diffusers.
#   bash tests/gpu.sh [FOLDER]
# A part that fails or takes too long does not stop the others. FOLDER (default: gpu) gets what each part printed, figures
# as JSON, and a summary with the exit codes.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-gpu}
folder=$(mkdir -p "$folder" && cd "$folder" && pwd)
cd "$root"

part() {  # a name, seconds at most, a command
    local name=$1 seconds=$2 began=$SECONDS code=0
    shift 2
    timeout "$seconds" "$@" > "$folder/$name.txt" 2>&1 || code=$?
    echo "$name: exit code $code after $((SECONDS - began)) s" | tee -a "$folder/summary.txt"
    tail -n 30 "$folder/$name.txt"
}

bench() {  # a name, seconds, further arguments
    local name=$1 seconds=$2
    shift 2
    part "$name" $((seconds + 30)) python -m minimti.bench --budget "$seconds" --json "$folder/$name.json" "$@"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$folder/summary.txt"
bench low 40 --only ratios --repeats 4 --cases 'train_low/ours/*'
bench processes 140 --processes --cases write train_warm sample_warm
part tests 120 python -m pytest -q -s -o addopts= tests/test_on_cuda.py
bench kernels 80 --kernels
bench steps 160 --only ratios --repeats 4 --plot "$folder/steps.png"
