#!/bin/sh
# Generates generation_pb2.py, generation_pb2.pyi and generation_pb2_grpc.py from generation.proto.
# With --check, changes nothing and fails where they are not what the installed grpcio-tools generates.
set -eu
cd "$(dirname "$0")/.."
python="${BIN:+$BIN/}python"

generate() {
    "$python" -m grpc_tools.protoc -I. --python_out="$1" --pyi_out="$1" --grpc_python_out="$1" protos/generation.proto
}

if [ "${1:-}" != --check ]; then
    generate .
    exit
fi
fresh="$(mktemp -d)"
trap 'rm -rf "$fresh"' EXIT
generate "$fresh"
for file in generation_pb2.py generation_pb2.pyi generation_pb2_grpc.py; do
    diff -q "protos/$file" "$fresh/protos/$file" || { echo "protos/$file is out of date: make protos" >&2; exit 1; }
done
