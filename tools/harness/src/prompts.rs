// SPDX-License-Identifier: Apache-2.0

//! Prompts for the bundled model.

/// Prompts in the manner of the bundled model's training text; `i` makes each a different one.
pub fn prompt(i: usize) -> String {
    const STARTS: [&str; 8] = [
        "Returns the",
        "# Examples\n\nBasic usage:\n\n```\nlet x =",
        "A closure can",
        "impl Display for",
        "The borrow checker ensures that",
        "fn main() {\n    let mut v = vec![",
        "An iterator over the",
        "This function will panic if",
    ];
    format!("{} {i}", STARTS[i % STARTS.len()])
}
