#!/usr/bin/env bash
# Proves and measures this project on a GPU machine: Python 3.12, torch 2.11 or newer, no index, no Ray.
#
#     benchmarks/gpu/prepare.sh                            # on a machine with an index
#     benchmarks/gpu/run.sh --minutes 8 --out DIR          # on the GPU machine, from the repository's root
#     benchmarks/gpu/run.sh --quick --out DIR              # parity alone, in 90 seconds
#     benchmarks/gpu/run.sh --device cpu --tiny --out DIR  # anywhere; a test runs it
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
wheels=${WHEELS:-benchmarks/gpu/wheels}
packages=${PACKAGES:-benchmarks/gpu/packages}

if [ -d "$wheels" ] && [ ! -e "$packages/.complete" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$packages" "$wheels"/*.whl
    touch "$packages/.complete"
fi
export PYTHONPATH="$PWD:$PWD/$packages${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
exec "$python" -m benchmarks.gpu.main "$@"
