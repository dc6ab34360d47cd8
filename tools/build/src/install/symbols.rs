// SPDX-License-Identifier: Apache-2.0

//! Which version each symbol came with.

use std::{collections::BTreeMap, fs};

use anyhow::{Context, Result, ensure};

use crate::cache::repo;

/// An exported function: its node in packaging/libdrex.map, and the release that first had it.
#[derive(Debug, PartialEq)]
pub struct Symbol {
    pub node: String,
    pub since: String,
}

pub fn all() -> Result<BTreeMap<String, Symbol>> {
    let since = first_releases()?;
    let now = super::version()?;
    let map = fs::read_to_string(repo().join("packaging/libdrex.map"))?;
    let symbols = nodes(&map)?.into_iter().map(|(name, node)| {
        // What no release has yet comes with the one that is being made.
        let since = since.get(&name).unwrap_or(&now).clone();
        (name, Symbol { node, since })
    });
    Ok(symbols.collect())
}

/// The node of each symbol in a version script like ours, without patterns.
fn nodes(map: &str) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    let (mut node, mut global) = (None, false);
    for line in map.lines().map(str::trim) {
        if let Some(name) = line.strip_suffix(" {") {
            node = Some(name.to_owned());
        } else if line == "global:" || line == "local:" {
            global = line == "global:";
        } else if let (Some(name), true) =
            (line.strip_suffix(';'), global && !line.starts_with('}'))
        {
            let node = node.clone().context("a symbol outside of every node")?;
            let twice = found.insert(name.to_owned(), node).is_some();
            ensure!(!twice, "libdrex.map lists {name} twice");
        } else if line.starts_with('}') {
            (node, global) = (None, false);
        }
    }
    ensure!(!found.is_empty(), "libdrex.map lists nothing");
    Ok(found)
}

/// From tests/abi, which has a file for each release.
fn first_releases() -> Result<BTreeMap<String, String>> {
    let mut releases = vec![];
    for entry in fs::read_dir(repo().join("tests/abi"))? {
        let path = entry?.path();
        let version = path.file_stem().and_then(|s| s.to_str());
        let version = version.context("tests/abi: a file without a version")?;
        let numbers: Vec<u32> = version
            .split('.')
            .map(str::parse)
            .collect::<Result<_, _>>()
            .with_context(|| format!("tests/abi: {version} is no version"))?;
        releases.push((numbers, version.to_owned(), fs::read_to_string(&path)?));
    }
    releases.sort();
    let mut first = BTreeMap::new();
    for (_, version, text) in releases {
        for line in text.lines() {
            let name = line
                .strip_prefix("symbol ")
                .and_then(|l| l.split(' ').next());
            if let Some(name) = name {
                first
                    .entry(name.to_owned())
                    .or_insert_with(|| version.clone());
            }
        }
    }
    Ok(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_nodes() {
        let map = "# A {\nA_0 {\n  global:\n    a;\n    b;\n  local:\n    *;\n};\nA_0.2 {\n  global:\n    c;\n} A_0;\n";
        let found = nodes(map).unwrap();
        let pairs: Vec<_> = found
            .iter()
            .map(|(s, n)| (s.as_str(), n.as_str()))
            .collect();
        assert_eq!(pairs, [("a", "A_0"), ("b", "A_0"), ("c", "A_0.2")]);
        assert!(nodes(&map.replace("c;", "a;")).is_err());
    }
}
