#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds and measures everything that needs a GPU, in one run of under ten minutes on a bare CUDA machine (nvcc, cmake,
# Python 3; no Rust, no network).
#
#   cargo xtask gpu pack               on a machine with Rust: writes .gpu/ (libdrex.so, llama.cpp's patched source)
#   tools/gpu/run.sh                   on the GPU machine, in the same checkout with .gpu/ beside it
#   tools/gpu/run.sh --dry-run DIR     without a GPU: the same steps on a CPU with a tiny model; DIR is a patched build
#                                      as `cargo xtask build` makes it. Seconds.
#
# Environment:
#   OUT                  results, JSON and logs (gpu-results)
#   DREX_GPU_SECONDS     time limit of the whole (560); what does not fit is left out, and what was measured stays
#   DREX_GPU_PACK        the packed folder (.gpu)
#   DREX_GPU_WORK        where to build (a folder in TMPDIR)
#   DREX_GPU_TYPE        weights of the 7B and 8B models: f16 (default) or q8_0
#
# Each step has a time limit of its own, and none stops the others. Exit status: 0 if all of them succeeded.

set -u
here=$(cd "$(dirname "$0")" && pwd)
repo=$(cd "$here/../.." && pwd)
start=$(date +%s)

usage() { sed -n '5,20s/^# \{0,1\}//p' "$0"; }

dry=
case ${1-} in
    --dry-run) dry=1; runtime=${2-}; [ -d "$runtime" ] || { usage >&2; exit 2; } ;;
    -h|--help) usage; exit 0 ;;
    "") ;;
    *) usage >&2; exit 2 ;;
esac

out=${OUT:-gpu-results}
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
pack=${DREX_GPU_PACK:-$repo/.gpu}
seconds=${DREX_GPU_SECONDS:-560}
work=${DREX_GPU_WORK:-${TMPDIR:-/tmp}/drex-gpu-$(id -u)}
mkdir -p "$work" || exit 1
rm -f "$out"/*.json "$out"/*.txt
: > "$out/steps.txt"
exec 3>&1
log=$out/log.txt

left() { echo $((seconds - ($(date +%s) - start))); }

# step NAME LIMIT COMMAND...: runs it for LIMIT seconds at most, or what is left; its output goes to the log
step() {
    local name=$1 limit=$2 t0 status
    shift 2
    [ "$limit" -gt "$(left)" ] && limit=$(left)
    t0=$(date +%s)
    if [ "$limit" -lt 2 ]; then
        status="no time left"
    else
        { echo "== $name: $*"; timeout -k 5 "$limit" "$@" 2>&1; } >> "$log.$name"
        case $? in
            0) status=ok ;;
            124|137) status="cut after $limit s" ;;
            *) status="failed: $(grep -v '^ *$' "$log.$name" | tail -1 | cut -c1-160)" ;;
        esac
    fi
    # One short line is written whole, also by steps that run beside each other.
    printf '%s\t%s\t%s\n' "$name" "$(($(date +%s) - t0))" "$status" >> "$out/steps.txt"
    echo "[$(($(date +%s) - start)) s] $name: $status" >&3
    [ "$status" = ok ]
}

# wait_for FILE LIMIT: until a step that runs beside us has written it, or has failed
wait_for() {
    local end=$(($(date +%s) + $2))
    while [ ! -e "$1" ] && [ ! -e "$1.failed" ] && [ "$(date +%s)" -lt "$end" ] && [ "$(left)" -gt 2 ]; do
        sleep 0.2
    done
    [ -e "$1" ]
}

jobs=$(nproc)
rm -f "$work"/done.*

if [ -n "$dry" ]; then
    models="tiny"
    bin=$(cd "$runtime" && pwd)
    lib=$bin
    ngl=0
    grid=(--batch 2,4 --exit-layers 2,4 --p 0.2,0.8 --prompt 8 --tokens 10 --reps 3 --threads 1)
    build_serve() {
        g++ -std=c++17 -O2 -Wall -I "$bin/include" -I "$repo/include" "$here/serve.cpp" -o "$work/serve" \
            -L "$bin" -lllama -lggml -lggml-base -ldrex -lpthread -Wl,-rpath-link,"$bin" -Wl,-rpath,"$bin"
    }
    build() { step build-serve 120 build_serve_step && touch "$work/done.serve" "$work/done.server" || touch "$work/done.serve.failed" "$work/done.server.failed"; }
else
    models="llama-2-7b llama-3-8b"
    bin=$work/build/bin
    lib=$work/lib
    ngl=99
    grid=(--batch 8,16,32,64 --exit-layers 8,16 --p 0.2,0.5,0.8 --threads "$((jobs < 8 ? jobs : 8))")
    mkdir -p "$lib"
    cp "$pack/libdrex.so" "$lib/libdrex.so" && ln -sf libdrex.so "$lib/libdrex.so.0" || exit 1
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)
    build_unpack() {
        rm -rf "$work/llama.cpp" && mkdir -p "$work/llama.cpp" && tar -xJf "$pack/llama.cpp.tar.xz" -C "$work/llama.cpp"
    }
    build_configure() {
        local generator=()
        command -v ninja > /dev/null && generator=(-G Ninja)
        # One architecture; attention kernels for the usual cache types only, as is the default.
        cmake -S "$work/llama.cpp" -B "$work/build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release \
            -DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="${arch:-90}-real" -DGGML_CUDA_NCCL=OFF \
            -DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF \
            -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DBUILD_SHARED_LIBS=ON -DGGML_CCACHE=OFF \
            -DDREX_INCLUDE_DIR="$repo/include" -DDREX_LIBRARY="$lib/libdrex.so"
    }
    build_serve() {
        g++ -std=c++17 -O2 -I "$work/llama.cpp/include" -I "$work/llama.cpp/ggml/include" -I "$work/llama.cpp/src" -I "$repo/include" \
            "$here/serve.cpp" -o "$work/serve" -L "$bin" -L "$lib" -lllama -lggml -lggml-base -ldrex -lpthread \
            -Wl,-rpath-link,"$bin" -Wl,-rpath,"$bin" -Wl,-rpath,"$lib"
    }
    build() {
        step unpack 60 build_unpack_step && step configure 90 build_configure_step &&
            step build-llama 360 nice -n 10 cmake --build "$work/build" --parallel "$((jobs > 4 ? jobs - 2 : jobs))" --target llama &&
            step build-serve 60 build_serve_step && touch "$work/done.serve" || touch "$work/done.serve.failed"
        if [ -e "$work/done.serve" ]; then
            # with few jobs: what runs beside it is being measured
            step build-server 240 nice -n 19 cmake --build "$work/build" --parallel "$((jobs > 4 ? jobs/4 : 1))" --target llama-server &&
                touch "$work/done.server" || touch "$work/done.server.failed"
        fi
    }
fi
# `timeout` runs programs, not functions: these are what the steps run
for f in unpack configure serve; do
    if declare -f "build_$f" > /dev/null; then
        { echo '#!/bin/bash'; declare -p here repo work pack lib bin arch jobs 2> /dev/null; declare -f "build_$f"; echo "build_$f"; } > "$work/build_${f}_step"
        chmod +x "$work/build_${f}_step"
    fi
done
PATH=$work:$PATH

# the models, in memory where there is room
models_dir=$work
type=${DREX_GPU_TYPE:-f16}
if [ -z "$dry" ] && [ "$(df -Pk /dev/shm | awk 'NR == 2 { print int($4/1048576) }')" -ge 40 ]; then
    models_dir=/dev/shm/drex-gpu-$(id -u)
    mkdir -p "$models_dir"
fi
make_models() {
    for m in $models; do
        step "model-$m" 180 python3 "$here/make_model.py" "$m" "$models_dir/$m.gguf" --type "$type" &&
            touch "$work/done.$m" || touch "$work/done.$m.failed"
    done
}

build &
build_pid=$!
make_models &
models_pid=$!

# kernels: nothing of llama.cpp is needed, so they run while that is being built
if [ -x "$here/kernels.sh" ]; then
    step kernels 240 env OUT="$out" DREX_LIB="$lib" "$here/kernels.sh" ${dry:+--dry-run}
fi

grid_of() {
    local m=$1 share=$2
    if ! wait_for "$work/done.serve" 0 || ! wait_for "$work/done.$m" "$seconds"; then
        printf 'serve-%s\t0\tnot run: no build, or no model\n' "$m" >> "$out/steps.txt"
        return
    fi
    step "serve-$m" "$share" "$work/serve" --model "$models_dir/$m.gguf" --json "$out/$m.json" --ngl "$ngl" --seconds "$((share - 10))" "${grid[@]}"
}
for m in $models; do
    wait_for "$work/done.serve" "$seconds" || { grid_of "$m" 0; continue; }
    # the first model leaves time for the second, and both some for the server
    case $m in
        llama-2-7b) grid_of "$m" $((($(left) - 60)*6/10)) ;;
        *) grid_of "$m" $(($(left) - 50)) ;;
    esac
done

if wait_for "$work/done.server" 30; then
    step server 90 env LD_LIBRARY_PATH="$lib" python3 "$here/server.py" "$bin/llama-server" "$repo/models/ee-rustdoc-16l-q8_0.gguf" "$ngl" "$out/server.json"
else
    printf 'server\t0\tnot built in time\n' >> "$out/steps.txt"
fi

# what still runs has no time left
[ -e "$work/done.server" ] || [ -e "$work/done.server.failed" ] || pkill -P "$build_pid" 2> /dev/null
wait "$build_pid" 2> /dev/null
wait "$models_pid" 2> /dev/null
[ -z "$dry" ] && rm -rf "$models_dir"/llama-*.gguf
for f in "$log".*; do
    { tail -n 400 "$f"; rm -f "$f"; } >> "$log"
done
python3 "$here/summary.py" "$out" ${dry:+--dry-run}
