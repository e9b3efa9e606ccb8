#!/usr/bin/env bash
# Regenerates the stubs under proto/tandem from the .proto files. A test checks that they are up to date.
set -euo pipefail
cd "$(dirname "$0")"
out="${1:-.}"
python="${PYTHON:-../.venv/bin/python}"
"$python" -m grpc_tools.protoc -I. --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" \
    tandem/v1/inference.proto tandem/v1/kv.proto tandem/v1/prefill.proto tandem/v1/worker.proto \
    tandem/kserve/open_inference.proto
