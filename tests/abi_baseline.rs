// SPDX-License-Identifier: Apache-2.0

//! The header held against the last release's, and programs built with older
//! and newer headers against this library.
//!
//! tests/abi/VERSION.txt has the symbols, struct layouts and numbers of a
//! release. On a release, add the new version's file:
//! `DREX_ABI_RECORD=1 cargo test --test abi_baseline`. It adds to what the file
//! has of this version, and takes nothing back. Until a version is out,
//! `DREX_ABI_RECORD=force` may.

#![cfg(target_os = "linux")]

mod headers;

use std::path::{Path, PathBuf};
use std::process::Command;

use drex::ffi::sizes::FIRST;
use headers::{Abi, Header};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn header() -> String {
    std::fs::read_to_string(root().join("include/drex.h")).unwrap()
}

fn scratch(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// The recorded releases, the oldest first.
fn releases() -> Vec<(PathBuf, Abi)> {
    let number = |p: &Path| -> Vec<u32> {
        let stem = p.file_stem().unwrap().to_str().unwrap();
        stem.split('.').map(|n| n.parse().unwrap()).collect()
    };
    let dir = std::fs::read_dir(root().join("tests/abi")).unwrap();
    let all = dir.map(|e| e.unwrap().path());
    let mut paths: Vec<PathBuf> = all
        .filter(|p| p.extension().is_some_and(|e| e == "txt"))
        .collect();
    paths.sort_by_key(|p| number(p));
    assert!(!paths.is_empty(), "no baseline");
    let read = |p: PathBuf| {
        let text = std::fs::read_to_string(&p).unwrap();
        (p, Abi::parse(&text))
    };
    paths.into_iter().map(read).collect()
}

/// Writes a version's file, unless that would change what it says already.
fn record(path: &Path, now: &Abi, force: bool) {
    let then = std::fs::read_to_string(path).unwrap_or_default();
    let wrong = Abi::parse(&then).broken_by(now);
    assert!(
        wrong.is_empty() || force,
        "{} says otherwise:\n{}\nIf this version is not out yet, DREX_ABI_RECORD=force overwrites it.",
        path.display(),
        wrong.join("\n")
    );
    std::fs::write(path, now.to_string()).unwrap();
}

fn abi_of(header: &str, name: &str) -> Abi {
    Header::parse(header).measure(header, &scratch(name))
}

#[test]
fn nothing_of_the_last_release_is_gone_or_changed() {
    let now = abi_of(&header(), "abi-now");
    if let Some(how) = std::env::var_os("DREX_ABI_RECORD") {
        let file = format!("tests/abi/{}.txt", env!("CARGO_PKG_VERSION"));
        record(&root().join(file), &now, how == "force");
    }
    let (path, then) = releases().pop().unwrap();
    let path = path.display();
    assert!(then.0.len() > 250, "{path} has {} lines", then.0.len());
    let wrong = then.broken_by(&now);
    assert!(
        wrong.is_empty(),
        "against {path}:\n{}\nThis breaks programs that exist. If it has to be, DREX_ABI_VERSION, the SONAME \
         and DREX_0 in packaging/libdrex.map go up together.",
        wrong.join("\n")
    );
}

/// (what is replaced, by what, what the check must say)
const BREAKING: &[(&str, &str, &str)] = &[
    (
        "drex_status drex_abandon(drex_engine *engine);",
        "",
        "symbol drex_abandon is gone",
    ),
    (
        "drex_status drex_abandon(drex_engine *engine);",
        "drex_status drex_abandon(const drex_engine *engine);",
        "symbol drex_abandon",
    ),
    (
        "uint32_t drex_abi_version(void);",
        "uint64_t drex_abi_version(void);",
        "symbol drex_abi_version",
    ),
    (
        "uint32_t capacity,\n                      drex_step *out",
        "drex_step *out,\n                      uint32_t capacity",
        "symbol drex_plan",
    ),
    (
        "  uint64_t token_deadline_ns;\n  // Pins",
        "  // Pins",
        "field drex_config.token_deadline_ns is gone",
    ),
    (
        "  uint32_t n_layers;\n  // Exit ramps, 1..",
        "  uint32_t layers;\n  // Exit ramps, 1..",
        "field drex_config.n_layers is gone",
    ),
    (
        "  uint64_t now_ns;\n} drex_plan_input;",
        "  uint32_t now_ns;\n} drex_plan_input;",
        "field drex_plan_input.now_ns",
    ),
    (
        "  int32_t token;\n  // In [0, 1]",
        "  uint32_t token;\n  // In [0, 1]",
        "field drex_verdict.token",
    ),
    (
        "  uint32_t slot;\n  // 0: the request's own row",
        "  uint32_t more;\n  uint32_t slot;\n  // 0: the request's own row",
        "field drex_row.slot",
    ),
    (
        "  uint32_t n_cells;\n} drex_page_copy;",
        "  uint32_t n_cells;\n  uint32_t more;\n} drex_page_copy;",
        "struct drex_page_copy",
    ),
    (
        "  uint32_t max_pass_rows;\n",
        "  uint16_t max_pass_rows;\n  uint16_t more;\n",
        "field drex_config.more lies within what older programs have",
    ),
    (
        "#define DREX_ERROR_CAPACITY 10",
        "#define DREX_ERROR_CAPACITY 11",
        "number DREX_ERROR_CAPACITY",
    ),
    (
        "#define DREX_POLICY_AUTO 8",
        "",
        "number DREX_POLICY_AUTO is gone",
    ),
    (
        "#define DREX_MAX_RAMPS 16",
        "#define DREX_MAX_RAMPS 32",
        "number DREX_MAX_RAMPS",
    ),
    (
        "typedef int32_t drex_status;",
        "typedef uint32_t drex_status;",
        "type drex_status",
    ),
    (
        "#define DREX_NO_SLOT UINT32_MAX",
        "#define DREX_NO_SLOT INT32_MAX",
        "number DREX_NO_SLOT",
    ),
    (
        "uint64_t misses[DREX_MAX_MISS_REASONS];",
        "uint64_t misses[4];",
        "field drex_stats.misses",
    ),
    (
        "#define DREX_FLUSH_REASONS 7",
        "#define DREX_FLUSH_REASONS 5",
        "number DREX_FLUSH_REASONS",
    ),
    (
        "typedef void (*drex_trace_sink)(void *user_data, const char *bytes, size_t n_bytes);",
        "typedef void (*drex_trace_sink)(const char *bytes, size_t n_bytes, void *user_data);",
        "type drex_trace_sink was void (*)(void *, const char *, size_t)",
    ),
    (
        "#define DREX_PAGES_STATS_INITIALIZER ",
        "#define DREX_PAGES_USED_INITIALIZER ",
        "macro DREX_PAGES_STATS_INITIALIZER is gone",
    ),
];

#[test]
fn each_breaking_change_is_found() {
    let original = header();
    let then = abi_of(&original, "abi-original");
    for (i, (from, to, words)) in BREAKING.iter().enumerate() {
        assert_eq!(original.matches(from).count(), 1, "{from}");
        let now = abi_of(&original.replace(from, to), &format!("abi-broken-{i}"));
        let wrong = then.broken_by(&now).join("\n");
        assert!(
            wrong.contains(words),
            "{from} -> {to}: \"{words}\" is not in: {wrong}"
        );
    }
}

#[test]
fn additions_are_no_breaking_changes() {
    let original = header();
    let then = abi_of(&original, "abi-before");
    let more = original
        .replace(
            "#define DREX_ERROR_MEMORY 14",
            "#define DREX_ERROR_MEMORY 14\n#define DREX_ERROR_MORE 15",
        )
        .replace(
            "drex_status drex_abandon(drex_engine *engine);",
            "drex_status drex_abandon(drex_engine *engine);\n\ndrex_status drex_more(void);",
        )
        .replace("#define DREX_MISS_REASONS 4", "#define DREX_MISS_REASONS 5")
        .replace("} drex_stats;", "  uint64_t more;\n} drex_stats;");
    let now = abi_of(&more, "abi-more");
    assert_eq!(now.0.len(), then.0.len() + 3);
    assert_eq!(then.broken_by(&now), Vec::<String>::new());
}

/// Compiles the smoke test with a header of another version, and runs it
/// against this library.
fn client(name: &str, header: &str, first_lines: &str) -> std::process::Output {
    let dir = scratch(name);
    std::fs::write(dir.join("drex.h"), header).unwrap();
    let smoke = std::fs::read_to_string(root().join("tests/c/smoke.c")).unwrap();
    let smoke = smoke.replacen("#include <string.h>\n", first_lines, 1);
    std::fs::write(dir.join("client.c"), smoke).unwrap();
    let exe = std::env::current_exe().unwrap();
    let deps = exe.parent().unwrap();
    let library = [deps, deps.parent().unwrap()]
        .map(|d| d.join("libdrex.so"))
        .into_iter()
        .find(|p| p.exists())
        .expect("no libdrex.so");
    for link in ["libdrex.so", "libdrex.so.0"] {
        std::os::unix::fs::symlink(&library, dir.join(link)).unwrap();
    }
    let program = dir.join("client");
    let out = Command::new("cc")
        .args(["-std=c99", "-Wall", "-Werror", "-I"])
        .arg(&dir)
        .arg(dir.join("client.c"))
        .arg("-L")
        .arg(&dir)
        .args(["-ldrex", "-o"])
        .arg(&program)
        .output()
        .expect("a C compiler is needed");
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    Command::new(program)
        .env("LD_LIBRARY_PATH", &dir)
        .output()
        .unwrap()
}

fn works(out: &std::process::Output) {
    let text = String::from_utf8_lossy(&out.stdout);
    let expect = format!("drex {}: 32 tokens in ", env!("CARGO_PKG_VERSION"));
    assert!(
        out.status.success() && text.starts_with(&expect),
        "{text}{}",
        String::from_utf8_lossy(&out.stderr)
    );
}

#[test]
fn recording_takes_nothing_back() {
    let path = scratch("abi-record").join("1.2.3.txt");
    let parse = |text: &str| Abi::parse(text);
    let read = || std::fs::read_to_string(&path).unwrap();
    record(&path, &parse("number A = 1\n"), false);
    record(&path, &parse("number A = 1\nnumber B = 2\n"), false);
    assert_eq!(read(), "number A = 1\nnumber B = 2\n");
    let changed = parse("number A = 7\nnumber B = 2\n");
    let refused = std::panic::catch_unwind(|| record(&path, &changed, false));
    assert!(refused.is_err());
    assert_eq!(read(), "number A = 1\nnumber B = 2\n");
    record(&path, &changed, true);
    assert_eq!(read(), "number A = 7\nnumber B = 2\n");
}

/// What the library takes for a struct's first size is what the first release
/// that has it says; a program may have been built with that.
#[test]
fn the_library_knows_the_first_size_of_every_struct() {
    let header = header();
    let parsed = Header::parse(&header);
    let mut sized: Vec<&str> = parsed.sized().collect();
    let releases = releases();
    for &(name, first) in FIRST {
        let size = releases.iter().find_map(|r| r.1.size(name));
        assert_eq!(size, Some((first as u64, true)), "{name}");
        sized.retain(|s| *s != name);
    }
    assert!(sized.is_empty(), "entry.rs does not have {sized:?}");
}

/// The header as the first program saw it: every struct with its first size.
#[test]
fn a_program_of_the_first_release_works() {
    let now = header();
    let measured = abi_of(&now, "abi-first");
    let mut old = now.clone();
    let mut lines = "#include <string.h>\n".to_owned();
    for &(name, first) in FIRST {
        if measured.size(name).unwrap().0 > first as u64 {
            old = Header::parse(&old).cut(&old, name, first, &scratch("abi-cut-first"));
        }
        lines += &format!("typedef char first_{name}[sizeof({name}) == {first} ? 1 : -1];\n");
    }
    works(&client("abi-old-client", &old, &lines));
}

/// Adds fields to every struct that may grow.
fn grown(original: &str) -> String {
    let mut new = original.to_owned();
    let parsed = Header::parse(original);
    let sized: Vec<&str> = parsed.sized().collect();
    assert!(sized.len() >= 12, "{sized:?}");
    for name in sized {
        let end = format!("}} {name};");
        assert_eq!(new.matches(&end).count(), 1);
        new = new.replace(&end, &format!("  uint64_t later[3];\n{end}"));
    }
    new
}

/// So that the program of the first release above is one when structs have
/// grown.
#[test]
fn a_struct_that_grew_is_cut_to_what_it_was() {
    let original = header();
    let mut text = grown(&original);
    let measured = abi_of(&text, "abi-grown");
    for &(name, _) in FIRST {
        let (size, _) = measured.size(name).unwrap();
        text = Header::parse(&text).cut(&text, name, size as usize - 24, &scratch("abi-cut"));
    }
    let (cut, then) = (abi_of(&text, "abi-cut"), abi_of(&original, "abi-uncut"));
    assert_eq!(cut.to_string(), then.to_string());
}

#[test]
fn a_program_with_larger_structs_works_until_it_uses_what_is_unknown_here() {
    let new = grown(&header());
    let lines = "#include <string.h>\n";
    works(&client("abi-new-client", &new, lines));

    // The same program, relying on a field that this library lacks, is told so.
    let ask = format!(
        "{lines}static drex_status create(drex_config *c, drex_engine **out) {{\n  \
         drex_status s;\n  c->later[2] = 1;\n  s = drex_create(c, out);\n  \
         fprintf(stderr, \"%s: %s\\n\", drex_status_name(s), drex_last_error());\n  return s;\n}}\n\
         #define drex_create create\n"
    );
    let out = client("abi-newer-asks", &new, &ask);
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success());
    for words in [
        "DREX_ERROR_STRUCT_SIZE: drex_create: config.size",
        "newer version",
    ] {
        assert!(text.contains(words), "{text}");
    }
}
