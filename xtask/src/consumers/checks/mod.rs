// SPDX-License-Identifier: Apache-2.0

//! The checks themselves.

mod cli;
mod cmake;
mod debian;
mod guide;
mod libraries;
mod programs;

use anyhow::Result;

use super::kit::Kit;

type Check = fn(&Kit) -> Result<()>;

pub const ALL: [(&str, Check); 18] = [
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

/// Only where the consumers are asked for: cargo-c is a quarter of an hour's compilation.
pub const SLOW: [(&str, Check); 1] = [("cargo cinstall, as the guide says", libraries::cargo_c)];

/// A program, and what it says when all is well.
#[derive(Clone, Copy, PartialEq)]
pub struct Program {
    pub source: &'static str,
    pub args: &'static [&'static str],
    says: &'static str,
}

impl Program {
    const fn new(source: &'static str, says: &'static str) -> Program {
        let args = &[];
        Program { source, args, says }
    }

    /// Its words, which begin with the version where it says that.
    pub fn says(&self, kit: &Kit) -> String {
        self.says.replace("VERSION", &kit.version)
    }
}

const SMOKE: Program = Program::new("tests/c/smoke.c", "drex VERSION: 32 tokens in ");
const OBSERVE: Program = Program::new(
    "tests/c/observe.c",
    "drex VERSION: 8 windows, 8 exits, 4 held",
);
const MINIMAL: Program = Program::new(
    "examples/minimal.c",
    "drex VERSION: 106 tokens in 51 windows",
);
const CPP11: Program = Program::new("tests/consumers/header.cpp", "drex VERSION: 1 token");
const CPP17: Program = Program::new(
    "bindings/cpp/tests/host.cpp",
    "drex VERSION: 30 tokens early, 15 deep",
);
const SKELETON: Program = Program::new(
    "tests/consumers/skeleton.cpp",
    "drex VERSION: 18 tokens at the ramp, all right, 0 holes, 0 requests left; seen",
);
const HOST: Program = Program {
    source: "examples/host.cpp",
    args: &[
        "-p",
        "The",
        "-p",
        "If the",
        "-n",
        "5",
        "-np",
        "2",
        "--fill",
        "verify",
        "--threshold",
        "0.4",
    ],
    says: "held at most ",
};
const BAD: Program = Program::new("tests/consumers/bad.c", "");
