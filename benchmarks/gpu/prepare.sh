#!/usr/bin/env bash
# Collects the wheels that a GPU machine without a package index needs, into benchmarks/gpu/wheels (ignored by git).
# Runs on a machine with an index. PYTHON is a Python with pip and torch, by default the project's environment.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
wheels=benchmarks/gpu/wheels
limit_mib=60
rm -rf "$wheels"
mkdir -p "$wheels"

# Versions that requirements.txt leaves open are those of this environment, with which the tests ran.
"$python" - benchmarks/gpu/requirements.txt > "$wheels/pinned.txt" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version
for line in open(sys.argv[1]):
    name = line.split("#")[0].strip()
    if name and "==" not in name:
        try:
            name = f"{name}=={version(name)}"
        except PackageNotFoundError:
            pass
    if name:
        print(name)
PYTHON
"$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$wheels" \
    --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --platform manylinux_2_12_x86_64 --platform manylinux2010_x86_64 --platform any \
    --requirement "$wheels/pinned.txt"

# DeepSpeed has no wheel. Without its operators it is pure Python; this project uses none of them.
deepspeed=$("$python" -c 'from importlib.metadata import version; print(version("deepspeed"))')
if ! DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "$python" -m pip wheel --quiet --no-deps --no-build-isolation \
    --wheel-dir "$wheels" "deepspeed==$deepspeed"; then
    echo "deepspeed could not be built: part 2 will be skipped" >&2
fi

size_mib=$(($(du -sk "$wheels" | cut -f1) / 1024))
ls -lh "$wheels"
echo "$size_mib MiB in $wheels"
if [ "$size_mib" -gt "$limit_mib" ]; then
    echo "more than $limit_mib MiB: leave packages out of benchmarks/gpu/requirements.txt" >&2
    exit 1
fi
