// SPDX-License-Identifier: Apache-2.0

//! The libraries as a C program meets them: linked, loaded, and showing
//! nothing but drex.

#![cfg(target_os = "linux")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// What cargo built along with this test.
fn library(name: &str) -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let deps = exe.parent().unwrap();
    [deps.join(name), deps.parent().unwrap().join(name)]
        .into_iter()
        .find(|p| p.exists())
        .unwrap_or_else(|| panic!("no {name} beside {}", exe.display()))
}

fn scratch(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn run(command: &mut Command) -> String {
    let out = command.output().unwrap();
    assert!(
        out.status.success(),
        "{command:?}\n{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

fn compile(out: &Path, link: &[&str]) {
    compile_file(&root().join("tests/c/smoke.c"), "c99", out, link);
}

fn compile_file(source: &Path, standard: &str, out: &Path, link: &[&str]) {
    run(Command::new("cc")
        .arg(format!("-std={standard}"))
        .args(["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1"])
        .arg("-I")
        .arg(root().join("include"))
        .arg(source)
        .args(link)
        .arg("-o")
        .arg(out));
}

fn check(line: &str) {
    let expect = format!("drex {}: 32 tokens in ", env!("CARGO_PKG_VERSION"));
    assert!(line.starts_with(&expect), "{line}");
    print!("{line}");
}

#[test]
fn shared() {
    let dir = scratch("smoke-shared");
    // As an installation would lay it out: the name for linking, and the one
    // that the loader looks for.
    std::os::unix::fs::symlink(library("libdrex.so"), dir.join("libdrex.so")).unwrap();
    std::os::unix::fs::symlink(library("libdrex.so"), dir.join("libdrex.so.0")).unwrap();
    let exe = dir.join("smoke");
    compile(&exe, &["-L", dir.to_str().unwrap(), "-ldrex"]);
    check(&run(Command::new(&exe).env("LD_LIBRARY_PATH", &dir)));
}

#[test]
fn static_library() {
    let dir = scratch("smoke-static");
    let exe = dir.join("smoke");
    let lib = library("libdrex.a");
    let system = ["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl"];
    let mut link = vec![lib.to_str().unwrap()];
    link.extend(system);
    compile(&exe, &link);
    check(&run(&mut Command::new(&exe)));
}

#[test]
fn the_shared_library_exports_drex_and_nothing_else() {
    let out = run(Command::new("nm")
        .args(["-D", "--defined-only", "--format=posix"])
        .arg(library("libdrex.so")));
    let exported: BTreeSet<&str> = out.lines().filter_map(|l| l.split(' ').next()).collect();
    let header = std::fs::read_to_string(root().join("include/drex.h")).unwrap();
    let declared: BTreeSet<&str> = header
        .lines()
        .filter(|l| !l.starts_with("//") && !l.starts_with(" *") && !l.starts_with("typedef"))
        .filter_map(|l| l.split_once('(')?.0.split([' ', '*']).next_back())
        .filter(|name| name.starts_with("drex_"))
        .collect();
    assert_eq!(exported, declared);
    assert!(declared.len() >= 20);
}

#[test]
fn the_shared_library_has_a_soname() {
    let out = run(Command::new("readelf").arg("-d").arg(library("libdrex.so")));
    assert!(out.contains("[libdrex.so.0]"), "{out}");
}

/// The program text in the header's second chapter: from the line that begins so,
/// up to the end of the function of this name.
fn example(begins: &str, function: &str) -> String {
    let header = std::fs::read_to_string(root().join("include/drex.h")).unwrap();
    let lines = header
        .lines()
        .map(|l| l.strip_prefix(" *   ").unwrap_or(""));
    let mut text = String::new();
    for line in lines.skip_while(|l| !l.starts_with(begins)) {
        text.push_str(line);
        text.push('\n');
        if line == "}" && text.contains(function) {
            return text;
        }
    }
    panic!("{function} does not end: {text}");
}

fn link_shared(dir: &Path) -> [String; 3] {
    for name in ["libdrex.so", "libdrex.so.0"] {
        std::os::unix::fs::symlink(library("libdrex.so"), dir.join(name)).unwrap();
    }
    ["-L".into(), dir.to_str().unwrap().into(), "-ldrex".into()]
}

/// The loop of the header's second chapter is a program, but for what is the host's.
#[test]
fn the_headers_own_example_runs() {
    let text = example("#include", "int host_loop");
    assert!(text.lines().count() > 80, "{text}");
    let host = std::fs::read_to_string(root().join("tests/c/header_loop.c")).unwrap();
    let dir = scratch("header-example");
    let source = dir.join("loop.c");
    let policy = "#ifdef HOLD\n  config.policy = DREX_POLICY_HOLD;\n#endif\n  config.n_layers";
    let text = text.replacen("config.n_layers", policy, 1);
    std::fs::write(&source, text + &host).unwrap();
    let shared = link_shared(&dir);
    // As it is, where AUTO first learns what pays; and with a policy that lets
    // every sure row out, where the numbers are known.
    for (standard, define) in [("c99", ""), ("c11", "-DHOLD")] {
        let exe = dir.join(standard);
        let mut link: Vec<&str> = shared.iter().map(String::as_str).collect();
        link.extend(Some(define).filter(|d| !d.is_empty()));
        compile_file(&source, standard, &exe, &link);
        let out = run(Command::new(&exe).env("LD_LIBRARY_PATH", &dir));
        let numbers: Vec<u32> = out.split(' ').filter_map(|w| w.parse().ok()).collect();
        assert_eq!(numbers[0] + numbers[1], 18, "{out}");
        if !define.is_empty() {
            assert_eq!(out, "9 tokens at the ramp, 9 deep, 0 bytes wrong\n");
        }
    }
}

/// So is the one with drafts, whose tokens are the full model's.
#[test]
fn the_headers_example_with_drafts_runs() {
    let text = example("#include", "int host_loop")
        + &example("// The host's own, besides.", "static drex_status verified");
    let host = std::fs::read_to_string(root().join("tests/c/header_verify.c")).unwrap();
    let dir = scratch("header-verify");
    let source = dir.join("verify.c");
    std::fs::write(&source, text + &host).unwrap();
    let shared = link_shared(&dir);
    let link: Vec<&str> = shared.iter().map(String::as_str).collect();
    let exe = dir.join("verify");
    compile_file(&source, "c99", &exe, &link);
    let out = run(Command::new(&exe).env("LD_LIBRARY_PATH", &dir));
    assert_eq!(
        out, "0 wrong, 27 tokens, drafts, replaced, taken back\n",
        "{out}"
    );
}
