#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Compiles llama.cpp's CUDA source that our patches touch, without a GPU: the proof that it compiles, not that it works.
#
#   cargo xtask gpu pack
#   pip install --target T nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
#       nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl nvidia-cublas
#   tools/gpu/compile.sh T/nvidia/cu13           the touched file: half a minute
#   tools/gpu/compile.sh T/nvidia/cu13 all       all of ggml's CUDA backend, with the settings of run.sh: half an hour on
#                                                two cores
#
# An installed toolkit (/usr/local/cuda) does as well. ARCH (90) is the architecture. `all` also needs cmake and ninja.

set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/toolkit.sh"
[ $# -ge 1 ] && [ -x "$1/bin/nvcc" ] || { sed -n '5,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }
CUDA_HOME=$(cd "$1" && pwd)
find_cuda
arch=${ARCH:-90}
pack=${DREX_GPU_PACK:-$here/../../.gpu}
[ -e "$pack/llama.cpp.tar.xz" ] || { echo "$pack/llama.cpp.tar.xz: not found; run cargo xtask gpu pack" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/src"
tar -xJf "$pack/llama.cpp.tar.xz" -C "$work/src"

if [ "${2-}" != all ]; then
    cd "$work/src/ggml"
    "$CUDACXX" -c -std=c++17 -gencode "arch=compute_$arch,code=sm_$arch" -O1 -use_fast_math -extended-lambda \
        -I "$CUDA_HOME/include/cccl" -I "$CUDA_HOME/include" -I include -I src -DGGML_CUDA_USE_GRAPHS -DGGML_BACKEND_SHARED \
        -DGGML_SHARED -Xcompiler -fPIC src/ggml-cuda/ggml-cuda.cu -o "$work/ggml-cuda.o"
    nm -C "$work/ggml-cuda.o" | grep -q ggml_backend_cuda_get_stream
    echo "ggml-cuda.cu compiles for sm_$arch with $("$CUDACXX" --version | grep release)"
    exit
fi

# What only the linker would need may be empty here.
toolkit_at "$work/toolkit" empty
mapfile -t flags < <(cmake_cuda_flags)
cmake -S "$work/src" -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_CUDA=ON "${flags[@]}" \
    -DCMAKE_CUDA_ARCHITECTURES="$arch-real" -DGGML_CUDA_NCCL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF \
    -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_OPENSSL=OFF \
    -DBUILD_SHARED_LIBS=ON -DGGML_CCACHE=OFF
ninja -C "$work/build" -j "${JOBS:-$(nproc)}" ggml-cuda
echo "ggml's CUDA backend compiles for sm_$arch"
