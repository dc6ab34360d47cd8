// SPDX-License-Identifier: Apache-2.0

fn main() {
    cxx_build::bridge("src/main.rs")
        .file("src/toy.cpp")
        .std("c++17")
        .flag_if_supported("-Wall")
        .flag_if_supported("-Wextra")
        .compile("drex_cxx_example");
    for file in ["main.rs", "toy.cpp", "toy.hpp"] {
        println!("cargo:rerun-if-changed=src/{file}");
    }
}
