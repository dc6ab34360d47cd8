#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds and measures everything that needs a GPU, on a bare CUDA machine (nvcc, cmake, g++, Python 3; no Rust, no network).
#
#   cargo xtask gpu pack               on a machine with Rust: writes .gpu/ (libdrex.so, llama.cpp's patched source)
#   tools/gpu/run.sh                   on the GPU machine, in the same checkout with .gpu/ beside it
#   tools/gpu/run.sh --only LIST       some of build, kernels, serve, server. What was built or measured before stays, so that
#                                      a run that was cut goes on where it was. serve and server build what they need.
#   tools/gpu/run.sh --clean           forgets all of that, and does nothing else
#   tools/gpu/run.sh --dry-run DIR     without a GPU: the same steps on a CPU with a tiny model; DIR is a patched build
#                                      as `cargo xtask build` makes it
#
# Environment:
#   OUT                  receives results.json and log.txt (gpu-results)
#   DREX_GPU_SECONDS     time limit of the whole (560); what does not fit is left out, and what was measured stays
#   DREX_GPU_PACK        the packed folder (.gpu)
#   DREX_GPU_WORK        where to build and to keep (a folder in TMPDIR)
#   DREX_GPU_TYPE        weights of the 7B and 8B models: f16 (default) or q8_0
#
# Each step has a time limit of its own, and none stops the others. Exit status: 0 if all of them succeeded.

set -u
here=$(cd "$(dirname "$0")" && pwd)
repo=$(cd "$here/../.." && pwd)
start=$(date +%s)
. "$here/toolkit.sh"

usage() { sed -n '5,22s/^# \{0,1\}//p' "$0"; }

dry='' only=build,kernels,serve,server clean=''
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry=1; runtime=${2-}; [ -d "$runtime" ] || { usage >&2; exit 2; }; shift ;;
        --only) only=${2-}; shift ;;
        --clean) clean=1 ;;
        -h|--help) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
    shift
done
for part in ${only//,/ }; do
    case $part in build|kernels|serve|server) ;; *) echo "--only $part: there is no such part" >&2; usage >&2; exit 2 ;; esac
done
want() { case ,$only, in *,"$1",*) return 0 ;; *) return 1 ;; esac; }

# Its name is known beforehand, and programs in it are run: it must be ours.
own_folder() {
    mkdir -p -m 700 "$1" && [ -d "$1" ] && [ ! -L "$1" ] && [ -O "$1" ] && return
    echo "$1: not a folder of this user" >&2
    exit 1
}
work=${DREX_GPU_WORK:-${TMPDIR:-/tmp}/drex-gpu-$(id -u)}
own_folder "$work"
work=$(cd "$work" && pwd)
# In memory where there is room for both models.
models_dir=$work
if [ -z "$dry" ]; then
    shm=/dev/shm/drex-gpu-$(id -u)
    if [ -e "$shm" ] || df -Pk /dev/shm 2> /dev/null | awk 'NR == 2 && $4 >= 40*1048576 { big = 1 } END { exit !big }'; then
        models_dir=$shm
        own_folder "$models_dir"
    fi
fi
if [ -n "$clean" ]; then
    rm -rf "$work" "$models_dir"
    exit 0
fi
out=${OUT:-gpu-results}
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
pack=${DREX_GPU_PACK:-$repo/.gpu}
pack=$(cd "$pack" 2> /dev/null && pwd) || { echo "${DREX_GPU_PACK:-$repo/.gpu}: not found; run cargo xtask gpu pack" >&2; exit 1; }
slow=${dry:+10}
slow=${slow:-1}
seconds=$((${DREX_GPU_SECONDS:-560}*slow))
parts=$work/parts
mkdir -p "$parts" "$work/bin" "$work/lib"
log=$out/log.txt
: > "$log"
rm -f "$out/results.json" "$work"/done.* "$work"/step.*
exec 3>&1

left() { echo $((seconds - ($(date +%s) - start))); }
least() { echo $(($1 < $2 ? $1 : $2)); }
has_seconds() { [ "$(left)" -gt "$1" ]; }

# step NAME LIMIT COMMAND...: runs it for LIMIT seconds at most, or what is left; its output goes to the log
step() {
    # A dry run is slow, and has no limit to keep.
    local name=$1 limit=$(($2*slow)) t0 status text=$work/step.$1
    shift 2
    [ "$limit" -gt "$(left)" ] && limit=$(left)
    t0=$(date +%s)
    : > "$text"
    if [ "$limit" -lt 2 ]; then
        status="no time left"
    else
        # In the background, since only then a signal is heard before it ends.
        timeout -k 5 "$limit" "$@" > "$text" 2>&1 &
        wait $!
        case $? in
            0) status=ok ;;
            124|137) status="cut after $limit s" ;;
            *) status="failed: $(grep -v '^ *$' "$text" | tail -1 | cut -c1-160)" ;;
        esac
    fi
    # Written whole, also by steps that run beside each other.
    printf '== %s: %s (%s)\n%s\n' "$name" "$*" "$status" "$(tail -n 400 "$text")" >> "$log"
    note "$name" "$(($(date +%s) - t0))" "$status"
    echo "[$(($(date +%s) - start)) s] $name: $status" >&3
    [ "$status" = ok ]
}

# note NAME SECONDS STATUS: what became of a step. Of two notes, the later one counts.
note() {
    printf '%s\t%s\t%s\n' "$1" "$2" "$3" >> "$parts/steps.txt"
    summary --quiet
}
summary() { python3 "$here/summary.py" "$parts" "$out/results.json" ${dry:+--dry-run} "$@"; }

# wait_for FILE LIMIT: until a step that runs beside us has written it, or has failed
wait_for() {
    local end=$(($(date +%s) + $2))
    while [ ! -e "$1" ] && [ ! -e "$1.failed" ] && [ "$(date +%s)" -lt "$end" ] && has_seconds 2; do
        sleep 0.2
    done
    [ -e "$1" ]
}
beside() { # COMMAND...: as a job that takes with it what it has begun
    trap 'kill $(jobs -p) 2> /dev/null; exit 143' TERM
    "$@"
}
done_if() { # NAME COMMAND...
    local name=$1
    shift
    if "$@"; then touch "$work/done.$name"; else touch "$work/done.$name.failed"; fi
}

ticker=
finish() {
    local status=$?
    trap - EXIT
    [ -z "$ticker" ] || kill "$ticker" 2> /dev/null
    for job in $(jobs -p); do kill "$job" 2> /dev/null; done
    summary || [ $status != 0 ] || status=1
    exit $status
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

jobs=$(nproc)
lib=$work/lib
cmp -s "$pack/libdrex.so" "$lib/libdrex.so" || cp "$pack/libdrex.so" "$lib/libdrex.so" || exit 1
ln -sf libdrex.so "$lib/libdrex.so.0"
find_cuda
have_cuda=$?
add_driver_path

# What the machine is, in a second, before anything is begun.
preflight() {
    local gpu
    one() { [ -n "${2// /}" ] && printf '%-10s %s\n' "$1" "$2" || printf '%-10s MISSING\n' "$1"; }
    one nvcc "${CUDACXX:-} $("${CUDACXX:-nvcc}" --version 2> /dev/null | sed -n 's/.*release \([^,]*\),.*/\1/p')"
    for p in cmake ninja make g++ python3; do
        one "$p" "$(command -v $p) $($p --version 2> /dev/null | head -1)"
    done
    one cublas "$(find_file cublas_v2.h "${CUDA_HOME:-}/include" $(cuda_packages | sed 's|$|/include|'))"
    one libcublas "$(find_file libcublas.so "${CUDA_HOME:-}/lib64" || find_file libcublas.so.13 $(cuda_packages | sed 's|$|/lib|'))"
    one libcuda "$(find_libcuda "${CUDA_HOME:-/nowhere}")"
    one sanitizer "$(command -v compute-sanitizer || find_file compute-sanitizer "${CUDA_HOME:-}/bin" "${CUDA_HOME:-}/compute-sanitizer")"
    gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,compute_cap --format=csv,noheader 2> /dev/null | head -1)
    one gpu "$gpu"
    one cores "$jobs"
    one memory "$(awk '/MemTotal/ { print int($2/1048576) " GiB" }' /proc/meminfo)"
    one work "$work, $(df -Ph "$work" | awk 'NR == 2 { print $4 " free" }')"
    one models "$models_dir, $(df -Ph "$models_dir" | awk 'NR == 2 { print $4 " free" }')"
}
preflight | tee "$parts/machine.txt"
cat "$parts/machine.txt" >> "$log"
summary --quiet
arch=$(sed -n 's/^gpu .*, \([0-9]*\)\.\([0-9]*\)$/\1\2/p' "$parts/machine.txt")
arch=${arch:-90}

# Cells come one by one, and a run may be ended by force: what is there is written now and then.
( exec > /dev/null 2>&1 3>&-; while sleep 15; do summary --quiet; done ) &
ticker=$!

# `timeout` runs programs, not functions: these are what the steps run.
task() {
    { echo '#!/bin/bash'; declare -p here repo work pack lib bin arch dry CUDA_HOME CUDACXX 2> /dev/null; echo '. "$here/toolkit.sh"'
      declare -f "$1"; echo "$1"; } > "$work/bin/$1"
    chmod +x "$work/bin/$1"
    echo "$work/bin/$1"
}

unpack() {
    local sum
    sum=$(sha256sum < "$pack/llama.cpp.tar.xz") || return
    [ "$(cat "$work/unpacked" 2> /dev/null)" = "$sum" ] && { echo "unpacked before"; return; }
    rm -rf "$work/llama.cpp" "$work/build" "$work/unpacked"
    # Not tar, which would want xz.
    python3 - "$pack/llama.cpp.tar.xz" "$work/llama.cpp" << 'PYTHON' || return
import sys, tarfile
with tarfile.open(sys.argv[1]) as archive:
    archive.extractall(sys.argv[2], **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
PYTHON
    echo "$sum" > "$work/unpacked"
}

configure() {
    local generator=() flags
    command -v ninja > /dev/null && generator=(-G Ninja)
    # A dry run has no cuBLAS and no driver, and builds nothing of this.
    toolkit_at "$work/toolkit" ${dry:+empty} || return
    mapfile -t flags < <(cmake_cuda_flags)
    # One architecture; attention kernels for the usual cache types only, as is the default.
    cmake -S "$work/llama.cpp" -B "$work/build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release \
        -DGGML_CUDA=ON "${flags[@]}" -DCMAKE_CUDA_ARCHITECTURES="$arch-real" -DGGML_CUDA_NCCL=OFF \
        -DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF \
        -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DBUILD_SHARED_LIBS=ON -DGGML_CCACHE=OFF \
        -DDREX_INCLUDE_DIR="$repo/include" -DDREX_LIBRARY="$lib/libdrex.so"
}

build_serve() {
    local include=(-I "$work/llama.cpp/include" -I "$work/llama.cpp/ggml/include" -I "$work/llama.cpp/src")
    [ -z "$dry" ] || include=(-I "$bin/include")
    g++ -std=c++17 -O2 -Wall "${include[@]}" -I "$repo/include" "$here/serve.cpp" -o "$work/bin/serve" -L "$bin" -L "$lib" \
        -lllama -lggml -lggml-base -ldrex -lpthread -Wl,--allow-shlib-undefined -Wl,-rpath-link,"$bin" \
        -Wl,-rpath,"$bin" -Wl,-rpath,"$lib"
}

if [ -n "$dry" ]; then
    models="tiny"
    bin=$(cd "$runtime" && pwd)
    ngl=0
    grid=(--batch 2,4 --exit-layers 2,4 --p 0.2,0.8 --prompt 8 --tokens 10 --reps 3 --threads 1)
    llama() { step unpack 60 "$(task unpack)" && step configure 180 "$(task configure)"; }
    server() { :; }
else
    models="llama-2-7b llama-3-8b"
    bin=$work/build/bin
    ngl=99
    grid=(--batch 8,16,32,64 --exit-layers 8,16 --p 0.2,0.5,0.8 --threads "$((jobs < 8 ? jobs : 8))")
    compile() { nice -n 10 cmake --build "$work/build" --parallel "$jobs" --target "$1"; }
    llama() {
        step unpack 60 "$(task unpack)" && step configure 90 "$(task configure)" &&
            step build-llama 600 nice -n 10 cmake --build "$work/build" --parallel "$((jobs > 4 ? jobs - 2 : jobs))" --target llama
    }
    server() { step build-server 400 nice -n 10 cmake --build "$work/build" --parallel "$jobs" --target llama-server; }
    [ $have_cuda = 0 ] || { note nvcc 0 "failed: no nvcc in CUDA_HOME, PATH, /usr/local or Python's packages"; exit 1; }
fi
llama_and_serve() { llama && step build-serve 120 "$(task build_serve)"; }

# The GPU's libraries may be found only where the machine's own LD_LIBRARY_PATH says.
export LD_LIBRARY_PATH="$lib:$bin${CUDA_HOME:+:$work/toolkit/lib64}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

type=${DREX_GPU_TYPE:-f16}
make_models() {
    for m in $models; do
        if [ -e "$models_dir/$m-$type.gguf" ]; then
            touch "$work/done.$m"
        else
            done_if "$m" step "model-$m" 240 python3 "$here/make_model.py" "$m" "$models_dir/$m-$type.gguf" --type "$type"
        fi
    done
}
kernels() { # PART LIMIT
    step "kernels-$1" "$2" env OUT="$parts" DREX_LIB="$lib" DREX_KERNELS_SECONDS="$2" sh "$here/kernels.sh" ${dry:+--dry-run} --only "$1"
}

build_pid=
if [ "$only" != kernels ]; then
    beside done_if llama llama_and_serve &
    build_pid=$!
fi
if want serve; then
    beside make_models &
fi
# The kernels' results need nothing of llama.cpp; their times want a quiet machine.
want kernels && kernels compare "$(least 240 $(($(left) - 60)))"
if [ -n "$build_pid" ]; then
    # A build that takes all the time there is: the bandwidths are measured beside it.
    reserve=5
    want kernels && reserve=90
    wait_for "$work/done.llama" $(($(left) - reserve))
    want serve && for m in $models; do wait_for "$work/done.$m" $(($(left) - reserve)); done
fi
want kernels && kernels bandwidth "$(least 100 "$(left)")"

grid_of() {
    local m=$1 share=$2
    if [ ! -e "$work/done.llama" ] || [ ! -e "$work/done.$m" ]; then
        note "serve-$m" 0 "not run: no build, or no model"
        return
    fi
    step "serve-$m" "$share" "$work/bin/serve" --model "$models_dir/$m-$type.gguf" --json "$parts/$m.json" --ngl "$ngl" \
        --seconds "$((share - 15))" "${grid[@]}"
}
if want serve; then
    wait_for "$work/done.llama" "$(left)"
    # The first model leaves time for the second, and both some for the server.
    after=0
    want server && [ -z "$dry" ] && has_seconds 300 && after=120
    for m in $models; do
        case $m in
            llama-2-7b) grid_of "$m" $((($(left) - after)*6/10)) ;;
            *) grid_of "$m" $(($(left) - after)) ;;
        esac
    done
fi

# Nothing is measured any more: all cores for the server.
if { want server || want build; } && wait_for "$work/done.llama" "$(left)"; then
    done_if server server
    if want server; then
        if [ -e "$work/done.server" ]; then
            step server 120 python3 "$here/server.py" "$bin/llama-server" "$repo/models/ee-rustdoc-16l-q8_0.gguf" "$ngl" "$parts/server.json"
        else
            note server 0 "not built in time"
        fi
    fi
fi
