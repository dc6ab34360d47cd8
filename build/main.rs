// SPDX-License-Identifier: Apache-2.0

use std::env;

mod kernels;
mod symbols;

fn main() {
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=packaging/libdrex.map");
    if env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libdrex.so.0");
        if env::var_os("CARGO_FEATURE_CAPI").is_some() {
            symbols::versions();
        }
    }
    kernels::place();
}
