#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# The kernels on a CUDA device: compares their results with references, again
# under compute-sanitizer, compiles them for it, and measures bandwidths.
#
#   tools/gpu/kernels.sh                   on a machine with a GPU and nvcc
#   tools/gpu/kernels.sh --only PART       compare or bandwidth
#   tools/gpu/kernels.sh --dry-run         on a driver without a device
#
# DREX_LIB names the folder of libdrex.so (target/release). OUT names the folder
# that receives kernels.txt, what is printed, and kernels.json, the bandwidths
# (./gpu-results). CUDA_HOME names CUDA's folder, else nvcc is looked for; a dry
# run needs cuda.h alone. DREX_KERNELS_SECONDS (240) is the time of the whole:
# what matters least comes last.

set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
. "$root/tools/gpu/toolkit.sh"
dry=0
only="compare bandwidth"
while [ $# -gt 0 ]; do
    case $1:${2:-} in
        --dry-run:*) dry=1 ;;
        --only:compare | --only:bandwidth) only=$2; shift ;;
        *) sed -n '5,18s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
    shift
done
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
# A dry run is slow, and nobody lent it the machine.
slow=$((dry ? 10 : 1))
end=$(($(date +%s) + ${DREX_KERNELS_SECONDS:-240} * slow))

find_cuda
have_nvcc=$?
add_driver_path
cuda=${CUDA_HOME:-/usr/local/cuda}
header=$(find_file cuda.h "$cuda/include" "$cuda/targets/x86_64-linux/include") || {
    echo "there is no $cuda/include/cuda.h; CUDA_HOME names CUDA's folder" >&2
    exit 2
}

say() { echo "$*" | tee -a "$log"; }

# One step with a limit in seconds; a failure is noted, and the others go on.
step() {
    limit=$(($1 * slow))
    name=$2
    shift 2
    left=$((end - $(date +%s)))
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 1 ]; then
        say "FAILED  $name (no time left)"
        status=1
        return 1
    fi
    say "== $name"
    # Through a file: a pipe would hide the step's own status.
    timeout -k 5 "$limit" "$@" > "$build/step.txt" 2>&1
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
prebuilt=$root/kernels/prebuilt
warn="-std=c++17 -O2 -Wall -Wextra -U_FORTIFY_SOURCE"

if [ $dry = 1 ]; then
    # shellcheck disable=SC2086
    step 120 "compile the driver without a device" "$cxx" $warn -Wno-unknown-pragmas -fPIC -shared -Wl,-soname,libcuda.so -Wl,-Bsymbolic \
        -o "$build/libcuda.so" "$root/kernels/host/emulate.cpp" "$root/tests/cuda/fake_driver.cpp" || exit 1
    export DREX_GPU_SMALL=1
else
    driver=$(find_libcuda "$cuda") || { say "FAILED  there is no libcuda, nor a stub of it"; exit 1; }
    ln -s "$driver" "$build/libcuda.so"
fi
# shellcheck disable=SC2086
step 120 "compile gpu-kernels" "$cxx" $warn -I "$(dirname "$header")" -DDREX_CASES="\"$root/kernels/cases.txt\"" -o "$build/gpu-kernels" "$root/tools/gpu/kernels.cpp" \
    -L "$build" -ldrex -lcuda -Wl,--allow-shlib-undefined -Wl,-rpath,"$build" || exit 1
if [ $dry = 0 ]; then
    # At run time, the driver and not its stub.
    rm "$build/libcuda.so"
fi

case $only in *compare*)
    # What users get, then the same under the sanitizers, then what they get on other devices.
    step 60 "compare" "$build/gpu-kernels" test "$prebuilt/drex.fatbin"
    if [ $dry = 0 ]; then
        sanitizer=$(command -v compute-sanitizer || find_file compute-sanitizer "$cuda/bin" "$cuda/compute-sanitizer")
        for tool in memcheck racecheck; do
            DREX_GPU_SMALL=1 step 70 "compute-sanitizer $tool" "${sanitizer:-compute-sanitizer}" --tool "$tool" --error-exitcode 9 \
                "$build/gpu-kernels" test "$prebuilt/drex.fatbin"
        done
        # No machine code at all, here and in drex's own loading of its images.
        CUDA_FORCE_PTX_JIT=1 step 60 "compare, PTX" "$build/gpu-kernels" test "$prebuilt/drex.ptx.fatbin"
        DREX_GPU_SMALL=1 step 70 "compute-sanitizer initcheck" "${sanitizer:-compute-sanitizer}" --tool initcheck --error-exitcode 9 \
            "$build/gpu-kernels" test "$prebuilt/drex.fatbin"
        if step 90 "compile the kernels" sh "$root/kernels/compile.sh" "${CUDACXX:-nvcc}" "$build"; then
            if cmp -s "$build/drex.fatbin" "$prebuilt/drex.fatbin"; then
                say "as committed"
            else
                step 60 "compare, this compiler's" "$build/gpu-kernels" test "$build/drex.fatbin"
            fi
        fi
    fi
    ;;
esac

case $only in *bandwidth*)
    set --
    if [ $dry = 0 ] && [ $have_nvcc = 0 ]; then
        # A plain read to compare with, and the ramp with other chunks.
        step 40 "compile the probe" "$CUDACXX" -O3 -std=c++17 -arch=native --fatbin -o "$build/probe.fatbin" "$root/tools/gpu/probe.cu" &&
            set -- "probe=$build/probe.fatbin"
        for other in 2048x256 4096x128 4096x256 8192x256; do
            step 40 "compile the kernels, $other" "$CUDACXX" -O3 -std=c++17 -arch=native -DDREX_RAMP_CHUNK=${other%x*} \
                -DDREX_RAMP_THREADS=${other#*x} --fatbin -o "$build/drex-$other.fatbin" "$root/kernels/drex.cu" &&
                set -- "$@" "$other=$build/drex-$other.fatbin"
        done
    fi
    step 120 "bandwidth" "$build/gpu-kernels" bench "$prebuilt/drex.fatbin" "$out/kernels.json" "$@"
    ;;
esac
exit $status
