#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# The kernels on a CUDA device: compiles them for it, compares their results
# with references, again under compute-sanitizer, and measures bandwidths.
#
#   tools/gpu/kernels.sh            on a machine with a GPU and nvcc
#   tools/gpu/kernels.sh --dry-run  on a driver without a device
#
# DREX_LIB names the folder of libdrex.so (target/release). OUT names the folder
# that receives kernels.txt, what is printed, and kernels.json, the bandwidths
# (./gpu-results). CUDA_HOME names CUDA's folder, else nvcc is taken from PATH; a
# dry run needs cuda.h alone.

set -u
dry=0
if [ "${1:-}" = "--dry-run" ]; then
    dry=1
    shift
fi
if [ $# != 0 ]; then
    sed -n '5,16p' "$0" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/../.." && pwd)
lib=$(cd "${DREX_LIB:-$root/target/release}" && pwd) || exit 2
out=${OUT:-gpu-results}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cxx=${CXX:-c++}
log="$out/kernels.txt"
: > "$log"
status=0

nvcc=""
if [ -n "${CUDA_HOME:-}" ]; then
    nvcc="$CUDA_HOME/bin/nvcc"
else
    nvcc=$(command -v nvcc || true)
    [ -n "$nvcc" ] || nvcc=/usr/local/cuda/bin/nvcc
fi
cuda=$(cd "$(dirname "$nvcc")/.." 2>/dev/null && pwd) || cuda=/usr/local/cuda

if [ ! -f "$cuda/include/cuda.h" ]; then
    echo "there is no $cuda/include/cuda.h; CUDA_HOME names CUDA's folder" >&2
    exit 2
fi

say() { echo "$*" | tee -a "$log"; }

# One step with a limit in seconds; a failure is noted, and the others go on.
step() {
    limit=$1
    name=$2
    shift 2
    say "== $name"
    # Through a file: a pipe would hide the step's own status.
    timeout "$limit" "$@" > "$build/step.txt" 2>&1
    code=$?
    tee -a "$log" < "$build/step.txt"
    if [ $code != 0 ]; then
        say "FAILED  $name (status $code)"
        status=1
        return 1
    fi
    return 0
}

# drex loads the driver by its name.
ln -s "$lib/libdrex.so" "$build/libdrex.so"
ln -s "$lib/libdrex.so" "$build/libdrex.so.0"
image="$root/kernels/prebuilt/drex.fatbin"
warn="-std=c++17 -O2 -Wall -Wextra -U_FORTIFY_SOURCE"

if [ $dry = 1 ]; then
    # shellcheck disable=SC2086
    step 120 "compile the driver without a device" "$cxx" $warn -Wno-unknown-pragmas -fPIC -shared -Wl,-soname,libcuda.so -Wl,-Bsymbolic \
        -o "$build/libcuda.so" "$root/kernels/host/emulate.cpp" "$root/tests/cuda/fake_driver.cpp" || exit 1
    driver="$build"
    export DREX_GPU_SMALL=1
else
    if step 120 "compile the kernels" sh "$root/kernels/compile.sh" "$nvcc" "$build"; then
        image="$build/drex.fatbin"
        cmp -s "$image" "$root/kernels/prebuilt/drex.fatbin" && say "as committed" || say "another compiler than the committed ones'"
    fi
    driver="$cuda/lib64/stubs"
    [ -d "$driver" ] || driver="$cuda/targets/x86_64-linux/lib/stubs"
fi
# shellcheck disable=SC2086
step 120 "compile gpu-kernels" "$cxx" $warn -I "$cuda/include" -o "$build/gpu-kernels" "$root/tools/gpu/kernels.cpp" \
    -L "$build" -ldrex -L "$driver" -lcuda -Wl,-rpath,"$build" || exit 1

step 120 "compare" "$build/gpu-kernels" test "$image"
step 90 "bandwidth" "$build/gpu-kernels" bench "$image" "$out/kernels.json"
if [ $dry = 0 ]; then
    # The committed image as well, which is what users get.
    step 60 "compare, committed image" "$build/gpu-kernels" test "$root/kernels/prebuilt/drex.fatbin"
    sanitizer=$(command -v compute-sanitizer || echo "$cuda/bin/compute-sanitizer")
    for tool in memcheck racecheck initcheck; do
        DREX_GPU_SMALL=1 step 120 "compute-sanitizer $tool" "$sanitizer" --tool "$tool" --error-exitcode 9 \
            "$build/gpu-kernels" test "$image"
    done
fi
exit $status
