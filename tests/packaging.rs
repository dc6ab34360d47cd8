// SPDX-License-Identifier: Apache-2.0

//! Facts that are written down twice are the same: the library's symbols in the
//! version script and in the C++ layer, the headers in cargo-c's list, the
//! oldest Rust in the guide.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

type Version = Vec<u32>;

fn version(text: &str) -> Version {
    text.split('.').map(|n| n.parse().unwrap()).collect()
}

/// The functions that the header declares, each with the release that first had
/// it; what none had so far comes with this version.
fn symbols() -> BTreeMap<String, Version> {
    let mut releases: Vec<(Version, String)> = std::fs::read_dir(root().join("tests/abi"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .map(|p| {
            (
                version(p.file_stem().unwrap().to_str().unwrap()),
                std::fs::read_to_string(p).unwrap(),
            )
        })
        .collect();
    releases.sort();
    let mut found = BTreeMap::new();
    for (version, text) in &releases {
        for name in text
            .lines()
            .filter_map(|l| l.strip_prefix("symbol ")?.split(' ').next())
        {
            found
                .entry(name.to_owned())
                .or_insert_with(|| version.clone());
        }
    }
    for name in declared() {
        found
            .entry(name)
            .or_insert_with(|| version(env!("CARGO_PKG_VERSION")));
    }
    assert!(found.len() > 40, "{found:?}");
    found
}

fn declared() -> BTreeSet<String> {
    read("include/drex.h")
        .lines()
        .filter(|l| !l.starts_with("//") && !l.starts_with(" *") && !l.starts_with("typedef"))
        .filter_map(|l| l.split_once('(')?.0.split([' ', '*']).next_back())
        .filter(|name| name.starts_with("drex_"))
        .map(str::to_owned)
        .collect()
}

/// What packaging/libdrex.map must be for these symbols, without its comments:
/// a node for each release that added some, each on top of the one before.
fn map_of(symbols: &BTreeMap<String, Version>) -> String {
    let releases: BTreeSet<&Version> = symbols.values().collect();
    let (mut out, mut below) = (String::new(), String::new());
    for release in releases {
        let first = below.is_empty();
        let node = match first {
            true => format!("DREX_{}", drex::ffi::DREX_ABI_VERSION - 1),
            false => format!("DREX_{}.{}", release[0], release[1]),
        };
        out += &format!("{node} {{\n  global:\n");
        for (name, _) in symbols.iter().filter(|(_, since)| *since == release) {
            out += &format!("    {name};\n");
        }
        out += if first { "  local:\n    *;\n};\n" } else { "" };
        out += &if first {
            String::new()
        } else {
            format!("}} {below};\n")
        };
        below = node;
    }
    out
}

#[test]
fn the_version_script_lists_each_symbol_where_it_was_first_released() {
    let map = read("packaging/libdrex.map");
    let plain: String = map
        .lines()
        .filter(|l| !l.starts_with('#'))
        .map(|l| format!("{l}\n"))
        .collect();
    assert_eq!(plain, map_of(&symbols()));
    // And of symbols to come.
    let v = |text| version(text);
    let some = BTreeMap::from([
        ("a".to_owned(), v("0.1.0")),
        ("b".to_owned(), v("0.10.0")),
        ("c".to_owned(), v("0.2.0")),
    ]);
    assert_eq!(
        map_of(&some),
        "DREX_0 {\n  global:\n    a;\n  local:\n    *;\n};\nDREX_0.2 {\n  global:\n    c;\n} DREX_0;\n\
         DREX_0.10 {\n  global:\n    b;\n} DREX_0.2;\n"
    );
}

fn headers_of_cpp() -> Vec<PathBuf> {
    let dir = root().join("bindings/cpp/include");
    let mut found = vec![dir.join("drex.hpp")];
    let detail = std::fs::read_dir(dir.join("drex/detail")).unwrap();
    found.extend(detail.map(|e| e.unwrap().path()));
    found
}

#[test]
fn the_cpp_layer_has_every_function() {
    let text: String = headers_of_cpp()
        .iter()
        .map(|p| std::fs::read_to_string(p).unwrap())
        .collect();
    // Calls, not words in comments.
    let code: String = text
        .lines()
        .map(|l| l.split("//").next().unwrap())
        .collect();
    let missing: Vec<String> = symbols()
        .into_keys()
        .filter(|name| !code.contains(&format!("{name}(")))
        .collect();
    assert!(missing.is_empty(), "drex.hpp does not call {missing:?}");
}

/// Names before the first parenthesis of what a class declares for everybody.
fn methods_of(class: &str) -> BTreeSet<String> {
    let text = read(&format!("bindings/cpp/include/drex/detail/{class}.hpp"));
    let (_, public) = text.split_once("\n public:\n").unwrap();
    let (public, _) = public.split_once("\n private:\n").unwrap();
    public
        .lines()
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split("//").next()?.split_once('('))
        .filter_map(|(before, _)| before.rsplit([' ', '*', '&']).next())
        // Not constructors, destructors and assignments.
        .filter(|name| !name.contains(class) && !name.starts_with("operator"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_page_of_bindings_has_every_method_of_the_cpp_layer() {
    let page = read("bindings/README.md");
    for class in ["engine", "step", "pages"] {
        let head = format!("| of `drex::{class}`");
        let (_, table) = page.split_once(&head).unwrap();
        let (table, _) = table.split_once("\n\n").unwrap();
        let listed: BTreeSet<String> = table
            .lines()
            .filter_map(|row| row.strip_prefix("| `")?.split(" | ").next())
            .flat_map(|cell| cell.split('`'))
            .filter_map(|call| Some(call.split_once('(')?.0.to_owned()))
            .collect();
        assert_eq!(listed, methods_of(class), "{class}");
    }
}

/// cargo-c installs what Cargo.toml names.
#[test]
fn cargo_c_is_told_of_every_header() {
    let manifest = read("Cargo.toml");
    let told: Vec<(String, String)> = manifest
        .lines()
        .filter_map(|l| l.trim().strip_prefix("{ from = \"")?.strip_suffix("\" },"))
        .map(|l| l.split_once("\", to = \"").unwrap())
        .map(|(from, to)| (from.to_owned(), to.to_owned()))
        .collect();
    let mut headers = headers_of_cpp();
    headers.push(root().join("include/drex.h"));
    for header in headers {
        let file = header
            .strip_prefix(root())
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        let (folder, name) = file.rsplit_once('/').unwrap();
        let to = folder
            .split_once("include")
            .unwrap()
            .1
            .trim_start_matches('/');
        let any = format!("{folder}/*.{}", name.rsplit_once('.').unwrap().1);
        let hit = told
            .iter()
            .any(|(from, at)| (*from == file || *from == any) && at == to);
        assert!(hit, "{file} is to go to \"{to}\"; Cargo.toml has {told:?}");
    }
}

#[test]
fn the_guide_names_the_oldest_rust_that_builds_this() {
    let oldest = env!("CARGO_PKG_RUST_VERSION");
    assert_eq!(oldest.split('.').count(), 2, "{oldest}");
    let guide = read("docs/install.md");
    assert!(
        guide.contains(&format!("Rust ({oldest} or newer)")),
        "{oldest}"
    );
}

/// What a package's build gives the library to build on: crates with their features.
fn built_on(package: &str) -> BTreeSet<(String, String)> {
    let mut cargo = std::process::Command::new(env!("CARGO"));
    cargo
        .current_dir(root())
        .args(["tree", "--offline", "--prefix", "none"]);
    let args = [
        "--edges",
        "normal",
        "--format",
        "{p}|{f}",
        "--package",
        package,
    ];
    let out = cargo.args(args).output().unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8_lossy(&out.stdout)
        .lines()
        .filter_map(|line| line.trim_end_matches(" (*)").split_once('|'))
        .map(|(name, features)| (name.to_owned(), features.to_owned()))
        .collect()
}

/// A command that builds the library on other features than the last one did builds it
/// anew: its files have one name.
#[test]
fn sim_and_triton_build_the_library_on_the_same_features() {
    let library = built_on("drex");
    assert!(library.len() > 5, "{library:?}");
    for package in ["drex-sim", "drex-triton"] {
        let other = built_on(package);
        for found in &library {
            assert!(other.contains(found), "{package} has no {found:?}");
        }
    }
}
