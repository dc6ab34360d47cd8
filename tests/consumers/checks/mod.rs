// SPDX-License-Identifier: Apache-2.0

//! The checks themselves.

mod cli;
mod cmake;
mod debian;
mod guide;
mod libraries;
mod programs;

use drex_harness::suite;

use crate::kit::Kit;

type Check = suite::Test<Kit>;

pub const ALL: [Check; 19] = [
    ("what the libraries export", libraries::exports),
    (
        "what cargo-c's library is built like exports",
        libraries::as_cargo_c,
    ),
    (
        "cargo xtask install, its options and its errors",
        cli::install,
    ),
    (
        "make and pkg-config, as the guide says",
        guide::make_pkgconfig,
    ),
    ("CMake, as the guide says", guide::cmake),
    ("CMake refuses what it cannot serve", cmake::refuses),
    ("CMake's version ranges", cmake::ranges),
    ("a compiler alone, as the guide says", guide::plain_cc),
    ("static, as the guide says", guide::static_library),
    ("the build tree, as the guide says", guide::build_tree),
    (
        "the examples, as they and docs/port.md say",
        guide::examples,
    ),
    ("C++, as bindings/README.md says", guide::skeleton),
    ("parts of C programs, as their pages say", guide::fragments),
    ("C99 to C++17, gcc and clang", programs::matrix),
    ("what a C program sees of an engine", programs::observed),
    ("ASan and UBSan", programs::sanitizers),
    ("valgrind", programs::valgrind),
    (
        "Debian packages, installed by dpkg, as the guide says",
        debian::installed,
    ),
    ("Debian packages' metadata", debian::metadata),
];

pub const CARGO_C: Check = ("cargo cinstall, as the guide says", libraries::cargo_c);
