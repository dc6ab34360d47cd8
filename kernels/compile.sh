#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Compiles the kernels: machine code for the architectures named here, and PTX
# for all others, in the oldest version of PTX that the compiler's output is
# valid in. What both are compressed with, drivers know from CUDA 12.4 on.
#
# Says what each kernel takes of a multiprocessor.
#
#   kernels/compile.sh NVCC OUT_DIR    writes OUT_DIR/drex.fatbin, OUT_DIR/drex.ptx.fatbin
#
# The result depends on the compiler's version alone, not on where things lie.

set -eu
nvcc=$1
out=$2
here=$(dirname "$0")
# ptxas and fatbinary lie beside the program itself, not beside a link to it.
bin=$(dirname "$(readlink -f "$nvcc")")
archs="80 90 100"
flags="-O3 -std=c++17"

codes=""
for a in $archs; do
    codes="$codes -gencode arch=compute_$a,code=sm_$a"
done
# shellcheck disable=SC2086
"$nvcc" $flags -Xptxas -v --fatbin --compress-mode=size $codes -o "$out/drex.fatbin" "$here/drex.cu"

# shellcheck disable=SC2086
"$nvcc" $flags -arch=compute_75 -ptx -o "$out/drex.new.ptx" "$here/drex.cu"
# The names of static data have a hash of the source's place in them.
sed -e 's/^\.version .*/.version 8.3/' -e 's/_INTERNAL_[0-9a-f]*_7_drex_cu_[0-9a-f]*/_INTERNAL_drex_cu_/g' \
    "$out/drex.new.ptx" > "$out/drex.ptx"
rm "$out/drex.new.ptx"
"$bin/ptxas" -arch=sm_75 -o "$out/drex.check.cubin" "$out/drex.ptx"
rm "$out/drex.check.cubin"
"$bin/fatbinary" -64 --create="$out/drex.ptx.fatbin" --compress=true --compress-mode=size \
    --image3=kind=ptx,sm=75,file="$out/drex.ptx"
rm "$out/drex.ptx"
