// SPDX-License-Identifier: Apache-2.0

//! Runs a suite's tests one after the other: they want the whole machine, and share what takes long to set up.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    time::Instant,
};

use anyhow::{Result, anyhow};
use clap::{Args, Command, FromArgMatches};

/// The tests that a suite is asked for, in the words of cargo's own tests.
#[derive(Args, Clone, Default)]
pub struct Choice {
    /// Only the tests whose names contain one of these
    #[arg(value_name = "TEXT")]
    texts: Vec<String>,
    /// Name the tests, and run none
    #[arg(long)]
    list: bool,
    /// Accepted: output is never captured
    #[arg(long, hide = true)]
    nocapture: bool,
    /// Accepted: tests run one after the other
    #[arg(long, hide = true)]
    test_threads: Option<u32>,
}

impl Choice {
    /// Whether a test with this name is to be run or named.
    pub fn wants(&self, name: &str) -> bool {
        self.texts.is_empty() || self.texts.iter().any(|text| name.contains(text.as_str()))
    }
}

/// A suite at work.
pub struct Run<'a> {
    choice: &'a Choice,
    passed: usize,
    failed: usize,
    left_out: usize,
}

/// A name, and a function of what the suite's tests share. The error that a test returns says why it failed.
pub type Test<K> = (&'static str, fn(&K) -> Result<()>);

impl Run<'_> {
    /// Runs the tests that are wanted. If there are any, first makes what they share, and returns it.
    ///
    /// Making it counts as a test of this title; where texts choose tests, only if it fails.
    pub fn tests<K>(
        &mut self,
        title: &str,
        make: impl FnOnce() -> Result<K>,
        tests: &[Test<K>],
    ) -> Option<K> {
        let wanted: Vec<_> = tests
            .iter()
            .filter(|(name, _)| self.choice.wants(name))
            .collect();
        self.left_out += tests.len() - wanted.len();
        if self.choice.list {
            wanted.iter().for_each(|(name, _)| println!("{name}: test"));
            return None;
        }
        if wanted.is_empty() {
            return None;
        }
        let mut made = None;
        self.one(title, || {
            made = Some(make()?);
            Ok(nothing(()))
        });
        let kit = made?;
        self.passed -= usize::from(!self.choice.texts.is_empty());
        for (name, test) in wanted {
            self.one(name, || test(&kit).map(nothing));
        }
        Some(kit)
    }

    /// Runs a test if it is wanted.
    pub fn test(&mut self, name: &str, test: impl FnOnce() -> Result<()>) {
        self.tell(name, || test().map(nothing));
    }

    /// Runs a test if it is wanted. The text that it returns stands in its line.
    pub fn tell(&mut self, name: &str, test: impl FnOnce() -> Result<String>) {
        if !self.choice.wants(name) {
            self.left_out += 1;
        } else if self.choice.list {
            println!("{name}: test");
        } else {
            self.one(name, test);
        }
    }

    /// Runs a test and says how it went. A panic is the failure of this test only.
    fn one(&mut self, name: &str, test: impl FnOnce() -> Result<String>) {
        let start = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(test)).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            Err(anyhow!("panicked: {}", text.unwrap_or_default()))
        });
        let seconds = start.elapsed().as_secs_f64();
        match result {
            Ok(found) => {
                self.passed += 1;
                let found = if found.is_empty() {
                    found
                } else {
                    format!(": {found}")
                };
                println!("ok      {name}{found} ({seconds:.1} s)");
            }
            Err(error) => {
                self.failed += 1;
                println!("FAILED  {name} ({seconds:.1} s)");
                for line in format!("{error:#}").lines() {
                    println!("        {line}");
                }
            }
        }
    }

    /// Says what several tests have found together, unless they were only named.
    pub fn say(&self, found: &str) {
        if !self.choice.list {
            println!("{found}");
        }
    }

    /// Adds tests that somebody else ran and counted.
    pub fn add(&mut self, passed: usize) {
        self.passed += passed;
    }
}

/// The `main` of a suite that has no options of its own.
pub fn plain(name: &'static str, about: &'static str, tests: impl FnOnce(&mut Run)) -> ExitCode {
    let matches = Choice::augment_args(Command::new(name))
        .about(about)
        .get_matches();
    let choice = Choice::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    main(&choice, tests)
}

/// A test that says no more than that it passed.
fn nothing((): ()) -> String {
    String::new()
}

/// A suite's `main`: runs `tests` and prints their count in the form of cargo's own tests. A run of no test is a failure.
pub fn main(choice: &Choice, tests: impl FnOnce(&mut Run)) -> ExitCode {
    let start = Instant::now();
    let mut run = Run {
        choice,
        passed: 0,
        failed: 0,
        left_out: 0,
    };
    tests(&mut run);
    if choice.list {
        return ExitCode::SUCCESS;
    }
    if run.passed + run.failed == 0 {
        run.failed = 1;
        println!("FAILED  no test was chosen");
    }
    let ok = run.failed == 0;
    println!(
        "\ntest result: {}. {} passed; {} failed; 0 ignored; 0 measured; {} filtered out; finished in {:.2}s\n",
        if ok { "ok" } else { "FAILED" },
        run.passed,
        run.failed,
        run.left_out,
        start.elapsed().as_secs_f64()
    );
    if ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
