// SPDX-License-Identifier: Apache-2.0

//! The folders of `src/core`, and the files beside them, import in one direction:
//! no two of them need each other, neither directly nor through others. The same
//! holds within each folder.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The modules that each module imports, by the folder that holds both.
type Imports = BTreeMap<String, BTreeMap<String, BTreeSet<String>>>;

/// Every Rust file below `folder`, with its module's path from there.
fn files(folder: &Path, at: &[String], found: &mut Vec<(Vec<String>, String)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let mut module = at.to_vec();
        let name = path.file_stem().unwrap().to_str().unwrap();
        if name != "mod" {
            module.push(name.to_string());
        }
        if path.is_dir() {
            files(&path, &module, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push((module, std::fs::read_to_string(&path).unwrap()));
        }
    }
}

/// The path or the tree of paths with which `text` begins.
fn tree(text: &str) -> &str {
    let mut depth = 0;
    let end = text.find(|c: char| {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        depth == 0 && !(c.is_alphanumeric() || matches!(c, '_' | ':' | '}'))
    });
    &text[..end.unwrap_or(text.len())]
}

/// The paths of a tree: `a::{b, c::d}` is `a::b` and `a::c::d`.
fn paths(tree: &str) -> Vec<Vec<String>> {
    let Some((head, list)) = tree.split_once('{') else {
        let names = tree.split("::").map(str::trim);
        return vec![names.map(String::from).collect()];
    };
    let list = &list[..list.rfind('}').unwrap()];
    let mut depth = 0;
    let branches = list.split(|c: char| {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        depth == 0 && c == ','
    });
    branches
        .filter(|b| !b.trim().is_empty())
        .flat_map(|b| paths(&format!("{head}{}", b.trim())))
        .collect()
}

/// Every path into `src/core` that the module `at` writes, from there.
fn written(at: &[String], text: &str) -> Vec<Vec<String>> {
    let code: Vec<&str> = text
        .lines()
        .filter(|l| !l.trim_start().starts_with("//"))
        .collect();
    let code = code.join("\n");
    let mut found = Vec::new();
    for (i, root) in code.match_indices("crate::core::") {
        found.extend(paths(tree(&code[i + root.len()..])));
    }
    for (i, _) in code.match_indices("super::") {
        if code[..i].ends_with("super::") {
            continue;
        }
        let path = code[i..].trim_start_matches("super::");
        let up = (code.len() - i - path.len()) / "super::".len();
        let above = &at[..at.len().saturating_sub(up)];
        for path in paths(tree(path)) {
            found.push([above, &path].concat());
        }
    }
    found
}

fn imports() -> Imports {
    let core = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/core");
    let mut all = Vec::new();
    files(&core, &[], &mut all);
    let mut imports = Imports::new();
    for (module, text) in &all {
        for path in written(module, text) {
            let same = module.iter().zip(&path).take_while(|(a, b)| a == b).count();
            // A module and those within it are one.
            let (Some(from), Some(to)) = (module.get(same), path.get(same)) else {
                continue;
            };
            let folder = imports.entry(module[..same].join("/")).or_default();
            folder.entry(from.clone()).or_default().insert(to.clone());
        }
    }
    imports
}

/// The modules that import in a circle, or that import one that does.
fn circles(mut imports: BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
    loop {
        let with: BTreeSet<String> = imports.keys().cloned().collect();
        for to in imports.values_mut() {
            to.retain(|m| with.contains(m));
        }
        imports.retain(|_, to| !to.is_empty());
        if imports.len() == with.len() {
            break;
        }
    }
    let line = |(from, to): (&String, &BTreeSet<String>)| format!("{from} -> {to:?}");
    imports.iter().map(line).collect()
}

#[test]
fn no_folder_of_the_core_imports_in_a_circle() {
    let imports = imports();
    let top = &imports[""];
    for (from, to) in [("scheduler", "rows"), ("config", "error")] {
        assert!(top[from].contains(to), "{from} is not seen to import {to}");
    }
    for (folder, imports) in imports {
        let found = circles(imports);
        assert!(found.is_empty(), "src/core/{folder}: {found:#?}");
    }
}

#[test]
fn circles_are_found_and_nothing_else() {
    let of = |list: &[(&str, &[&str])]| {
        let set = |to: &[&str]| to.iter().map(|s| s.to_string()).collect();
        circles(list.iter().map(|(f, t)| (f.to_string(), set(t))).collect())
    };
    assert!(of(&[("a", &["b", "c"]), ("b", &["c"])]).is_empty());
    let found = of(&[("a", &["b"]), ("b", &["c"]), ("c", &["a", "d"])]);
    assert_eq!(found.len(), 3, "{found:?}");
}

#[test]
fn every_way_to_write_an_import_is_read() {
    let at = |path: &str| -> Vec<String> { path.split("::").map(String::from).collect() };
    let text = "\
use crate::core::{NONE, memory, rows::{
    queue::Entry,
    *,
}};
use super::{a, b};
/// See [`crate::core::no`].
use super::super::c;
fn f(x: crate::core::d::Y<crate::core::e::Z>) {}
";
    let found: BTreeSet<String> = written(&at("m::n::o"), text)
        .iter()
        .map(|p| p.join("::"))
        .collect();
    let expect = [
        "NONE",
        "memory",
        "rows::queue::Entry",
        "rows::*",
        "m::n::a",
        "m::n::b",
        "m::c",
        "d::Y",
        "e::Z",
    ];
    assert_eq!(found, expect.map(String::from).into());
}
