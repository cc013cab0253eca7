#!/usr/bin/env bash
# Collect the packages that a GPU machine without network lacks, as wheels for Python 3.12 on Linux x86-64 (pure, or
# cp312 manylinux). PyTorch and the rest of its stack are there; none of them comes along. W&B can be switched off.
#
#   tools/gpu_wheels.sh [FOLDER]        default: .whl
#
# There:  python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .whl/*.whl
#         PYTHONPATH=/tmp/site DS_BUILD_OPS=0 python3 -m tools.gpu_check --out OUT
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.whl}
limit_megabytes=60

pinned() { grep -E "^$1==" requirements.txt; }
binary=(
    "$(pinned megatron-core)" "$(pinned pydantic)" "$(pinned webdataset)" "$(pinned torch-fidelity)" "$(pinned hjson)"
    # What those need and the machine lacks. pydantic asks for exactly this core.
    pydantic-core==2.50.4 typing-inspection==0.4.5 annotated-types==0.8.0 braceexpand==0.1.7 einops==0.8.2
    py-cpuinfo==9.0.0 multimethod==2.1
)

mkdir -p "$folder"
rm -f "$folder"/*.whl
platforms=()
for name in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${name}_x86_64")
done
for package in "${binary[@]}"; do
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version 3.12 --implementation cp "${platforms[@]}" -d "$folder" "$package"
done
# DeepSpeed is a source package; without its extensions the wheel is pure.
DS_BUILD_OPS=0 python3 -m pip wheel --quiet --disable-pip-version-check --no-deps -w "$folder" "$(pinned deepspeed)"

for wheel in "$folder"/*.whl; do
    case "$(basename "$wheel")" in
        torch-*|nvidia_*|triton-*) echo "gpu_wheels: $wheel must not come along" >&2; exit 1;;
        *-py3-none-any.whl|*-py2.py3-none-any.whl|*-cp312-cp312-manylinux*|*-abi3-manylinux*|*-py3-none-manylinux*) ;;
        *) echo "gpu_wheels: $wheel is neither pure nor made for Python 3.12 on Linux x86-64" >&2; exit 1;;
    esac
done
megabytes=$(du -sm "$folder" | cut -f1)
if [ "$megabytes" -gt "$limit_megabytes" ]; then
    echo "gpu_wheels: $folder holds $megabytes MB, more than the $limit_megabytes MB that may travel" >&2
    exit 1
fi
echo "$(find "$folder" -name '*.whl' | wc -l) wheels, $megabytes MB, in $folder"
