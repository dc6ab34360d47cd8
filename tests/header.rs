// SPDX-License-Identifier: Apache-2.0

//! The committed header is the one that the source gives, and every language
//! that we promise compiles it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The parts of the header behind its chapters, in its order. Each is a module of
/// src/ffi, whose first line is the part's title.
const PARTS: [&str; 14] = [
    "status", "engine", "kv", "requests", "plan", "ramp", "verify", "complete", "arena", "graphs",
    "learn", "stats", "observe", "pages",
];

fn source(part: &str) -> String {
    let path = root().join(format!("src/ffi/{part}.rs"));
    std::fs::read_to_string(path).unwrap()
}

fn generate() -> String {
    let mut config = cbindgen::Config::from_file(root().join("cbindgen.toml")).unwrap();
    config.header = config.header.map(|h| h.trim().to_owned());
    config.after_includes = config.after_includes.map(|text| {
        text.replace("@MAJOR@", env!("CARGO_PKG_VERSION_MAJOR"))
            .replace("@MINOR@", env!("CARGO_PKG_VERSION_MINOR"))
            .replace("@PATCH@", env!("CARGO_PKG_VERSION_PATCH"))
    });
    let mut builder = cbindgen::Builder::new().with_config(config);
    for name in PARTS {
        builder = builder.with_src(root().join(format!("src/ffi/{name}.rs")));
    }
    let mut out = Vec::new();
    builder.generate().unwrap().write(&mut out);
    arrange(&String::from_utf8(out).unwrap())
}

/// Prefixes of the constants that a type's values are.
const VALUES: [(&str, &[&str]); 11] = [
    ("drex_status", &["DREX_OK", "DREX_ERROR_"]),
    ("drex_policy", &["DREX_POLICY_"]),
    ("drex_metric", &["DREX_METRIC_"]),
    ("drex_fill_mode", &["DREX_FILL_"]),
    ("drex_dtype", &["DREX_DTYPE_"]),
    ("drex_device", &["DREX_DEVICE_"]),
    ("drex_request_state", &["DREX_REQUEST_"]),
    ("drex_flush_reason", &["DREX_FLUSH_"]),
    ("drex_miss_reason", &["DREX_MISS_"]),
    ("drex_decision", &["DREX_DECISION_"]),
    ("drex_log_level", &["DREX_LOG_"]),
];

/// The type that a constant is a value of.
fn owner_of(name: &str) -> Option<&'static str> {
    let mut types = VALUES.iter();
    let found = types.find(|t| t.1.iter().any(|p| name.starts_with(p)));
    found.map(|t| t.0)
}

/// The item that a block of the header declares.
fn name_of(block: &str) -> Option<&str> {
    let code = block.lines().find(|l| !l.trim_start().starts_with("//"))?;
    let word = |s: &'_ str| -> usize {
        let end = s.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        end.unwrap_or(s.len())
    };
    let rest = if let Some(rest) = code.strip_prefix("#define ") {
        rest
    } else if let Some(rest) = code.strip_prefix("typedef struct ") {
        rest
    } else if let Some(rest) = code.strip_prefix("typedef ") {
        match rest.split_once("(*") {
            Some((_, rest)) => rest,
            None => rest.split(' ').next_back()?,
        }
    } else {
        code.split('(').next()?.split([' ', '*']).next_back()?
    };
    let name = &rest[..word(rest)];
    let ours = name.starts_with("drex_") || name.starts_with("DREX_");
    (ours && name != "DREX_H" && !name.ends_with("_INITIALIZER")).then_some(name)
}

/// The public items of a part, as they stand in its source.
fn items(source: &str) -> impl Iterator<Item = &str> {
    let starts = [
        "type ",
        "struct ",
        "const ",
        "extern \"C\" fn ",
        "unsafe extern \"C\" fn ",
    ];
    source.lines().filter_map(move |l| {
        let rest = l.strip_prefix("pub ")?;
        let rest = starts.iter().find_map(|s| rest.strip_prefix(s))?;
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        Some(&rest[..end.unwrap_or(rest.len())])
    })
}

/// cbindgen puts all types before all constants and all functions. A reader wants
/// them by part: a type, its values and its calls, as they stand in the sources.
fn arrange(header: &str) -> String {
    const OPEN: &str = "#ifdef __cplusplus\nextern \"C\" {\n#endif // __cplusplus";
    const CLOSE: &str = "#ifdef __cplusplus\n}  // extern \"C\"\n#endif  // __cplusplus";
    // The types have names of their own; "struct" is noise in the uses.
    let plain = |block: &str| -> String {
        let lines = block.trim_start_matches('\n').lines().map(|l| {
            match l.starts_with("typedef") || l.starts_with("//") {
                true => l.to_owned(),
                false => l.replace("struct drex_", "drex_"),
            }
        });
        lines.collect::<Vec<_>>().join("\n")
    };
    let (body, tail) = header.split_at(header.find(CLOSE).unwrap());
    let blocks: Vec<String> = body.split("\n\n").map(plain).collect();
    let first = blocks
        .iter()
        .position(|b| name_of(b).is_some_and(|name| !name.starts_with("DREX_VERSION_")));
    let (head, rest) = blocks.split_at(first.unwrap());
    let mut left: Vec<&String> = rest
        .iter()
        .filter(|b| !b.is_empty() && *b != OPEN)
        .collect();
    let mut out = format!("{}\n\n{OPEN}\n\n", head.join("\n\n"));
    for part in PARTS {
        let text = source(part);
        let title = text.lines().find_map(|l| l.strip_prefix("//! ")).unwrap();
        let title = title.split(". ").next().unwrap();
        out += &format!("/* {:-<77}\n * {title}\n */\n\n", "");
        let mut after_constant = false;
        for item in items(&text) {
            // What cbindgen leaves out is not for C.
            let Some(at) = left.iter().position(|b| name_of(b) == Some(item)) else {
                continue;
            };
            let block = left.remove(at);
            let constant = block.lines().last().unwrap().starts_with("#define");
            if after_constant && constant {
                out.pop();
            }
            after_constant = constant;
            out += block;
            out += "\n\n";
        }
    }
    assert!(left.is_empty(), "of no part: {left:?}");
    format!("{out}{}\n", tail.trim_end())
}

#[test]
fn the_committed_header_is_current() {
    let path = root().join("include/drex.h");
    let fresh = generate();
    if std::env::var_os("DREX_BLESS").is_some() {
        std::fs::write(&path, &fresh).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap();
    if let Some((n, (a, b))) = committed
        .lines()
        .zip(fresh.lines())
        .enumerate()
        .find(|(_, (a, b))| a != b)
    {
        panic!(
            "include/drex.h is stale from line {} on:\n  committed: {a}\n  generated: {b}\n\
             refresh it with: DREX_BLESS=1 cargo test --test header",
            n + 1
        );
    }
    assert!(
        committed == fresh,
        "include/drex.h is stale: refresh it with: DREX_BLESS=1 cargo test --test header"
    );
}

/// What the draft of the interface promised, and hosts were written against.
#[test]
fn the_numbers_stay() {
    let header = generate();
    for line in [
        "#define DREX_OK 0",
        "#define DREX_ERROR_NULL_ARGUMENT 1",
        "#define DREX_ERROR_PANIC 13",
        "#define DREX_POLICY_ART 7",
        "#define DREX_METRIC_DEFAULT UINT32_MAX",
        "#define DREX_DTYPE_BF16 2",
        "#define DREX_REQUEST_HELD 3",
        "#define DREX_FLUSH_STAY 5",
        "#define DREX_DECISION_GONE 3",
    ] {
        assert_eq!(header.lines().filter(|l| *l == line).count(), 1, "{line}");
    }
}

#[test]
fn every_name_in_the_header_is_drex() {
    for line in generate().lines() {
        if let Some(name) = line.strip_prefix("#define ") {
            assert!(name.starts_with("DREX_"), "{line}");
        }
    }
}

const USE: &str = r#"
#include "drex.h"

int use_it(void);
int use_it(void) {
  drex_config config = DREX_CONFIG_INITIALIZER;
  drex_kv_layer layer = DREX_KV_LAYER_INITIALIZER;
  drex_request_config request = DREX_REQUEST_CONFIG_INITIALIZER;
  drex_request_info info = DREX_REQUEST_INFO_INITIALIZER;
  drex_plan_input input = DREX_PLAN_INPUT_INITIALIZER;
  drex_step step = DREX_STEP_INITIALIZER;
  drex_logits logits = DREX_LOGITS_INITIALIZER;
  drex_completion completion = DREX_COMPLETION_INITIALIZER;
  drex_observation observation = DREX_OBSERVATION_INITIALIZER;
  drex_stats stats = DREX_STATS_INITIALIZER;
  drex_arena arena = DREX_ARENA_INITIALIZER;
  drex_pages_config pages = DREX_PAGES_CONFIG_INITIALIZER;
  drex_pages_stats used = DREX_PAGES_STATS_INITIALIZER;
  drex_engine *engine = NULL;
  drex_status status = drex_create(&config, &engine);
  return (int)(status + (drex_status)(layer.size + request.size + info.size +
               input.size + step.size + logits.size + completion.size +
               observation.size + stats.size + arena.size + pages.size +
               used.size));
}
"#;

#[test]
fn every_initializer_is_compiled() {
    let header = generate();
    let defines = header.lines().filter_map(|l| l.strip_prefix("#define "));
    let names = defines.filter_map(|l| l.split(' ').next());
    let all: Vec<&str> = names.filter(|n| n.ends_with("_INITIALIZER")).collect();
    assert_eq!(all.len(), 13);
    for name in all {
        assert!(USE.contains(&format!("= {name};")), "{name}");
    }
}

/// The items that a release has: "symbol drex_plan", "field drex_row.slot".
fn released(text: &str) -> BTreeSet<&str> {
    text.lines()
        .filter_map(|l| l.split_once(" = "))
        .map(|l| l.0)
        .collect()
}

/// What the oldest release does not have must say when it came.
#[test]
fn what_is_younger_says_so() {
    let oldest = std::fs::read_to_string(root().join("tests/abi/0.1.0.txt")).unwrap();
    let header = generate();
    assert_eq!(undated(&header, &released(&oldest)), Vec::<String>::new());
    // And is found where it does not.
    for gone in [
        "symbol drex_replan",
        "type drex_trace_sink",
        "struct drex_arena",
        "field drex_config.n_top",
        "number DREX_DEVICE_CUDA",
        "number DREX_MAX_TOP",
    ] {
        let mut less = released(&oldest);
        assert!(less.remove(gone), "{gone}");
        assert_eq!(undated(&header, &less), [gone.to_owned()]);
    }
    let told = header.replacen(
        "\ndrex_status drex_replan",
        "\n// Since 0.2.\ndrex_status drex_replan",
        1,
    );
    let mut less = released(&oldest);
    less.remove("symbol drex_replan");
    assert_eq!(undated(&told, &less), Vec::<String>::new());
}

/// Items beyond those of the oldest release that do not say their version.
fn undated(header: &str, oldest: &BTreeSet<&str>) -> Vec<String> {
    let mut wrong = Vec::new();
    let (mut since, mut owner) = (None, "");
    for line in header.lines() {
        let code = line.trim_start();
        if let Some(comment) = code.strip_prefix("//") {
            since = comment.trim().strip_prefix("Since ").or(since);
            continue;
        }
        if code.is_empty() || code.starts_with('*') {
            since = None;
            continue;
        }
        let name = |s: &'static str, rest: &str| {
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            Some(format!("{s} {}", &rest[..end.unwrap_or(rest.len())]))
        };
        let before_call = || code.split('(').next()?.split([' ', '*']).next_back();
        let item = if let Some(rest) = code.strip_prefix("#define ") {
            // What is no constant is not a release's number either.
            name("number", rest).filter(|_| rest.contains(' ') && !rest.contains("_INITIALIZER"))
        } else if let Some(rest) = code.strip_prefix("typedef struct ") {
            owner = rest.strip_suffix(" {").unwrap_or("");
            name("struct", rest).filter(|_| !owner.is_empty())
        } else if code.starts_with('}') {
            owner = "";
            None
        } else if !owner.is_empty() {
            let field = code.split([';', '[']).next().unwrap_or("");
            let field = field.split([' ', '*']).next_back().unwrap_or("");
            Some(format!("field {owner}.{field}"))
        } else if let Some(rest) = code.strip_prefix("typedef ") {
            match rest.split_once("(*") {
                Some((_, rest)) => name("type", rest),
                None => name("type", rest.split(' ').next_back().unwrap_or("")),
            }
        } else {
            before_call()
                .filter(|n| n.starts_with("drex_"))
                .and_then(|n| name("symbol", n))
        };
        // Fields are as old as their struct, values as their type.
        let of = |i: &str| match i.split_once(' ')? {
            ("field", name) => Some(format!("struct {}", name.split('.').next()?)),
            ("number", name) => Some(format!("type {}", owner_of(name)?)),
            _ => None,
        };
        if let Some(item) = item.filter(|i| !i.contains("DREX_VERSION_"))
            && !oldest.contains(item.as_str())
            && of(&item).is_none_or(|o| oldest.contains(o.as_str()))
            && since.is_none()
        {
            wrong.push(item);
        }
        since = None;
    }
    wrong
}

#[test]
fn every_field_and_function_is_explained_in_short_lines() {
    let header = generate();
    let (mut owner, mut before) = ("", "");
    for line in header.lines() {
        assert!(line.len() <= 100, "{} characters: {line}", line.len());
        if let Some(name) = line.strip_prefix("typedef struct ") {
            owner = name.strip_suffix(" {").unwrap_or("");
        }
        let field = !owner.is_empty() && line.starts_with("  ") && line.ends_with(';');
        let item = field || line.starts_with("drex_status drex_") || line.starts_with("typedef");
        if item && !line.ends_with(" drex_engine;") && !line.ends_with(" drex_pages;") {
            assert!(before.trim_start().starts_with("//"), "{owner}: {line}");
        }
        if line.starts_with('}') {
            owner = "";
        }
        before = line;
    }
}

fn compile(compiler: &str, standard: &str, extension: &str) {
    let dir = tempdir(&format!("header-{standard}"));
    let source = dir.join(format!("use.{extension}"));
    std::fs::write(&source, USE).unwrap();
    let out = Command::new(compiler)
        .arg(format!("-std={standard}"))
        .args(["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"])
        .arg("-I")
        .arg(root().join("include"))
        .arg(&source)
        .output()
        .expect("a C and C++ compiler is needed");
    assert!(
        out.status.success(),
        "{compiler} -std={standard}:\n{}",
        String::from_utf8_lossy(&out.stderr)
    );
}

fn tempdir(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

#[test]
fn compiles_as_c99() {
    compile("cc", "c99", "c");
}

#[test]
fn compiles_as_c11() {
    compile("cc", "c11", "c");
}

#[test]
fn compiles_as_cpp11() {
    compile("c++", "c++11", "cpp");
}

#[test]
fn compiles_as_cpp17() {
    compile("c++", "c++17", "cpp");
}
