// SPDX-License-Identifier: Apache-2.0

//! The command line: what is wrong with it is said before anything runs, with the status 2 that the help promises.

use std::process::{Command, Output};

fn sim(args: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_drex-sim"));
    command.args(args.split_whitespace()).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn wrong_usage_has_a_sentence_and_the_status_2() {
    for (args, sentence) in [
        ("--p 2", "--p is 2; expected 0 to 1"),
        ("--tokens 3", "--tokens is 3"),
        ("--policies often", "--policies: "),
        ("--priorities 5", "expected PRIORITY:SHARE"),
        ("--length 9,3", "--length is [9, 3]"),
        (
            "--ramps 20",
            "--ramps has 20; expected increasing numbers in 1..15",
        ),
        ("--layers 1", "--layers is 1; expected at least 2"),
        ("--p 0.1,0.2", "--p has 2 values"),
        (
            "--plot grid.png",
            "--plot is grid.png; expected a name that ends in .svg",
        ),
        // Options without effect.
        ("--grid --p 0.2", "--p has no effect with --grid"),
        (
            "--grid --policies off",
            "--policies has no effect with --grid",
        ),
        ("--scale --seed 2", "--seed has no effect with --scale"),
        (
            "--threshold 0.5",
            "--threshold has no effect without --replay",
        ),
        ("--markdown a.md", "--markdown has no effect without --grid"),
        (
            "--load 0.5",
            "--load has no effect without --workload poisson or bursty",
        ),
        (
            "--workload poisson --burst-period 2",
            "--burst-period has no effect without --workload bursty",
        ),
        (
            "--accept 0.9",
            "--accept has no effect without --fill verify",
        ),
        (
            "--max-pending 3",
            "--max-pending has no effect without --fill postfill or verify",
        ),
        (
            "--replay x --profile memory",
            "--profile has no effect with --replay",
        ),
        (
            "--replay x --requests 4",
            "--requests has no effect with --replay and without --workload",
        ),
        ("--p-period 3", "--p-period has no effect without --p-drift"),
    ] {
        let output = sim(args);
        assert_eq!(output.status.code(), Some(2), "{args}: {}", said(&output));
        assert!(
            said(&output).contains(sentence),
            "{args}: {}",
            said(&output)
        );
        assert!(output.stdout.is_empty(), "{args} has run");
    }
}

#[test]
fn what_fails_has_the_status_1() {
    let output = sim("--replay /nowhere/x");
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("/nowhere/x"), "{}", said(&output));
}

/// Few layers, and no ramp that anybody gave.
#[test]
fn a_small_model_has_a_ramp() {
    for layers in [2, 3, 4] {
        let output = sim(&format!(
            "--layers {layers} --tokens 200 --policies off,auto"
        ));
        assert!(output.status.success(), "{layers}: {}", said(&output));
    }
}
