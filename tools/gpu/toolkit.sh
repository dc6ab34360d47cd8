# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=sh
#
# For run.sh, kernels.sh and compile.sh: where CUDA is, and a folder that CMake takes for an installed toolkit even where the
# compiler, cuBLAS and the driver come from three places.

# The folders of CUDA's parts among Python's packages: nvidia/cu13, nvidia/cublas, ...
cuda_packages() {
    python3 - << 'PYTHON' 2> /dev/null
import glob, os, site, sys
seen = []
for path in sys.path + site.getsitepackages():
    for folder in sorted(glob.glob(os.path.join(path or ".", "nvidia", "*"))):
        parts = [os.path.join(folder, part) for part in ("bin/nvcc", "include", "lib")]
        if folder not in seen and any(os.path.exists(part) for part in parts):
            seen.append(folder)
print("\n".join(seen))
PYTHON
}

# The root of an nvcc's toolkit, as it says itself: the program may be a link or a script.
cuda_root() {
    top=$("$1" --dryrun -x cu -c /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
    [ -n "$top" ] || top=$(dirname "$(readlink -f "$1")")/..
    (cd "$top" 2> /dev/null && pwd -P)
}

# Exports CUDACXX, CUDA_HOME and PATH. Status 1: there is no compiler. A CUDA_HOME that has headers alone is left as it is.
find_cuda() {
    for c in "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" "${CUDACXX:-}" "$(command -v nvcc)" /usr/local/cuda/bin/nvcc \
            $(ls -d /usr/local/cuda*/bin/nvcc 2> /dev/null) $(cuda_packages | sed 's|$|/bin/nvcc|'); do
        if [ -n "$c" ] && [ -x "$c" ] && root_of=$(cuda_root "$c") && [ -n "$root_of" ]; then
            CUDACXX=$(readlink -f "$c")
            [ -x "$root_of/bin/nvcc" ] && CUDACXX=$root_of/bin/nvcc
            CUDA_HOME=$root_of
            PATH=$(dirname "$CUDACXX"):$PATH
            export CUDACXX CUDA_HOME PATH
            return 0
        fi
    done
    return 1
}

# find_file NAME FOLDER...: the first that there is.
find_file() {
    name=$1
    shift
    for d in "$@"; do
        if [ -e "$d/$name" ]; then
            echo "$d/$name"
            return 0
        fi
    done
    return 1
}

# What can be linked against in the driver's place: the toolkit's stub, else the driver itself.
find_libcuda() {
    find_file libcuda.so "$1/lib64/stubs" "$1/lib/stubs" "$1/targets/x86_64-linux/lib/stubs" && return
    listed=$( (ldconfig -p || /sbin/ldconfig -p) 2> /dev/null | awk '/libcuda\.so\.1 / && /x86-64|64bit/ { print $NF; exit }')
    # shellcheck disable=SC2046
    find_file libcuda.so.1 ${listed:+"$(dirname "$listed")"} /usr/local/nvidia/lib64 /usr/local/nvidia/lib /usr/lib64 \
        /usr/lib/x86_64-linux-gnu $(echo "${LD_LIBRARY_PATH:-}" | tr : ' ')
}

# Where the loader may have to look for the driver, last of all.
add_driver_path() {
    for d in /usr/local/nvidia/lib64 /usr/local/nvidia/lib; do
        [ ! -e "$d/libcuda.so.1" ] || LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$d
    done
    [ -z "${LD_LIBRARY_PATH:-}" ] || export LD_LIBRARY_PATH
}

# toolkit_at FOLDER [empty]: sets TOOLKIT to CUDA_HOME where it is complete, else to FOLDER, which is made of links to CUDA_HOME,
# to Python's packages and to the driver. With `empty`, libraries that are nowhere are made without contents: enough to
# configure and compile, not to run.
toolkit_at() {
    TOOLKIT=$CUDA_HOME
    if [ -e "$CUDA_HOME/include/cublas_v2.h" ] && [ -d "$CUDA_HOME/nvvm" ] && [ -e "$CUDA_HOME/lib64/stubs/libcuda.so" ] &&
            [ -e "$CUDA_HOME/lib64/libcublas.so" ] && [ -e "$CUDA_HOME/lib64/libcudart.so" ]; then
        return 0
    fi
    t=$1
    rm -rf "$t"
    mkdir -p "$t/bin" "$t/include" "$t/lib64/stubs" || return 1
    # Copies: nvcc looks for its parts beside itself, wherever a link leads.
    for b in __nvcc_device_query bin2c crt cudafe++ cuobjdump fatbinary nvcc nvcc.profile nvdisasm nvlink nvprune ptxas; do
        [ ! -e "$CUDA_HOME/bin/$b" ] || cp -rpL "$CUDA_HOME/bin/$b" "$t/bin/" || return 1
    done
    ln -s "$CUDA_HOME/nvvm" "$t/nvvm"
    # The compiler's own first: of two versions of a header, that one is right.
    for home in "$CUDA_HOME" "$CUDA_HOME/targets/x86_64-linux" $(cuda_packages); do
        for f in "$home"/include/*; do
            n=$t/include/$(basename "$f")
            [ ! -e "$f" ] || [ -e "$n" ] || ln -s "$f" "$n"
        done
        for f in "$home"/lib64/lib* "$home"/lib/lib*; do
            n=$t/lib64/$(basename "$f")
            [ ! -f "$f" ] || [ -e "$n" ] || ln -s "$f" "$n"
        done
    done
    for f in "$t"/lib64/lib*.so.*; do
        # libcublas.so.13: the linker wants libcublas.so
        n=${f%%.so.*}.so
        [ ! -e "$f" ] || [ -e "$n" ] || ln -s "$f" "$n"
    done
    if driver=$(find_libcuda "$CUDA_HOME"); then
        ln -s "$driver" "$t/lib64/stubs/libcuda.so"
    fi
    for l in cudart cublas cublasLt stubs/cuda; do
        so=$t/lib64/$(dirname "$l")/lib$(basename "$l").so
        if [ ! -e "$so" ] && [ "${2:-}" = empty ]; then
            echo | gcc -shared -x c - -o "$so" || return 1
        elif [ ! -e "$so" ]; then
            echo "there is no lib$(basename "$l").so in $CUDA_HOME, nor among Python's packages" >&2
            return 1
        fi
    done
    if [ ! -e "$t/include/cublas_v2.h" ] && [ "${2:-}" != empty ]; then
        echo "there is no cublas_v2.h in $CUDA_HOME, nor among Python's packages" >&2
        return 1
    fi
    TOOLKIT=$t
}

# How CMake is told: a compiler and a root. The driver itself, in its stub's place, names libraries that lie beside it.
cmake_cuda_flags() {
    printf '%s\n' "-DCMAKE_CUDA_COMPILER=$TOOLKIT/bin/nvcc" "-DCUDAToolkit_ROOT=$TOOLKIT" \
        -DCMAKE_EXE_LINKER_FLAGS=-Wl,--allow-shlib-undefined -DCMAKE_SHARED_LINKER_FLAGS=-Wl,--allow-shlib-undefined
}
