// SPDX-License-Identifier: Apache-2.0

//! The programs that are built against an installation.

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

    /// Its words, which begin with drex's version where it says that.
    pub fn says(&self, version: &str) -> String {
        self.says.replace("VERSION", version)
    }
}

pub const SMOKE: Program = Program::new("tests/c/smoke.c", "drex VERSION: 32 tokens in ");
pub const OBSERVE: Program = Program::new(
    "tests/c/observe.c",
    "drex VERSION: 8 windows, 8 exits, 4 held",
);
pub const MINIMAL: Program = Program::new(
    "examples/minimal.c",
    "drex VERSION: 106 tokens in 51 windows",
);
pub const VERIFY: Program = Program::new(
    "examples/verify.cpp",
    "30 drafts, 24 accepted; the full model's output",
);
pub const FRAGMENTS: Program = Program::new(
    "tests/consumers/fragments.c",
    "drex VERSION: 1 step, 1 exit, traced",
);
pub const CPP11: Program = Program::new("tests/consumers/header.cpp", "drex VERSION: 1 token");
pub const CPP17: Program = Program::new(
    "bindings/cpp/tests/host.cpp",
    "drex VERSION: 30 tokens early, 15 deep",
);
pub const SKELETON: Program = Program::new(
    "tests/consumers/skeleton.cpp",
    "drex VERSION: 18 tokens at the ramp, all right, 0 holes, 0 requests left; seen",
);
pub const HOST: Program = Program {
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
pub const BAD: Program = Program::new("tests/consumers/bad.c", "");
