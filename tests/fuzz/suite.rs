// SPDX-License-Identifier: Apache-2.0

//! The short form of the fuzzing: the corpus, whatever was found once, and changes of both at random.
//! `cargo xtask gauntlet` is the long one, guided by coverage.

use std::path::{Path, PathBuf};

use drex_fuzz::{TARGETS, Target};

fn files(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(name);
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect();
    files.sort();
    assert!(files.len() >= 10, "{} has no corpus", folder.display());
    files
}

/// Runs a target, and says which bytes it was given if it fails.
fn run(target: Target, what: &str, bytes: &[u8]) {
    let failed = std::panic::catch_unwind(|| target(bytes)).is_err();
    assert!(!failed, "{what}: {bytes:?}");
}

fn short(name: &str, changes: u32) {
    let (_, target) = TARGETS.into_iter().find(|t| t.0 == name).unwrap();
    let files = files(name);
    for (path, bytes) in &files {
        run(target, &path.display().to_string(), bytes);
    }
    let mut rng = fastrand::Rng::with_seed(1);
    for i in 0..changes {
        let mut bytes = rng.choice(&files).unwrap().1.clone();
        for _ in 0..rng.u32(1..8) {
            match rng.u32(0..4) {
                0 if !bytes.is_empty() => {
                    let at = rng.usize(..bytes.len());
                    bytes[at] = rng.u8(..);
                }
                1 => bytes.insert(rng.usize(..=bytes.len()), rng.u8(..)),
                2 if !bytes.is_empty() => drop(bytes.remove(rng.usize(..bytes.len()))),
                _ => {
                    let other = &rng.choice(&files).unwrap().1;
                    let from = rng.usize(..=other.len());
                    bytes.truncate(rng.usize(..=bytes.len()));
                    bytes.extend_from_slice(&other[from..]);
                }
            }
        }
        run(target, &format!("change {i}"), &bytes);
    }
}

#[test]
fn engine() {
    short("engine", 20_000);
}

#[test]
fn pages() {
    short("pages", 20_000);
}

#[test]
fn texts() {
    short("texts", 5_000);
}
