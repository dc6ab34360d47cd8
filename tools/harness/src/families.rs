// SPDX-License-Identifier: Apache-2.0

//! Families of metrics: those of a text, against those of the table in docs/observability.md.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use anyhow::{Context, Result, bail, ensure};
use drex_build::cache;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Host {
    Library,
    LlamaServer,
    Triton,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Family {
    pub kind: String,
    /// Without a histogram's `le`. None: the family has no sample.
    pub labels: Option<BTreeSet<String>>,
}

/// By name.
pub type Families = BTreeMap<String, Family>;

/// What the table promises of a host.
pub fn promised(host: Host) -> Result<Families> {
    let path = cache::repo().join("docs/observability.md");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    of_table(&text, host)
}

fn of_table(text: &str, host: Host) -> Result<Families> {
    let mut all = Families::new();
    for line in text.lines().filter(|line| line.starts_with("| `drex_")) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, name, kind, labels, place, _, _] = cells[..] else {
            continue;
        };
        let is_there = match place {
            "all" => true,
            "servers" => host != Host::Library,
            "library" => host == Host::Library,
            _ => bail!("{place:?} is no place for {name}"),
        };
        if is_there {
            let labels = labels.split(',').map(|l| l.trim().trim_matches('`'));
            let family = Family {
                kind: kind.to_owned(),
                labels: Some(
                    labels
                        .filter(|l| !l.is_empty())
                        .map(str::to_owned)
                        .collect(),
                ),
            };
            let twice = all.insert(name.trim_matches('`').to_owned(), family);
            ensure!(twice.is_none(), "{name} is in the table twice");
        }
    }
    ensure!(!all.is_empty(), "no table of metrics");
    Ok(all)
}

/// The families of a text whose names begin with `drex_`.
pub fn of_text(text: &str) -> Result<Families> {
    let mut all = Families::new();
    for line in text.lines() {
        if let Some(about) = line.strip_prefix("# TYPE drex_") {
            let (name, kind) = about
                .split_once(' ')
                .context("a TYPE line without a type")?;
            let family = Family {
                kind: kind.to_owned(),
                labels: None,
            };
            let twice = all.insert(format!("drex_{name}"), family);
            ensure!(twice.is_none(), "drex_{name} is there twice");
        } else if line.starts_with("drex_") {
            let end = line.find(['{', ' ']).context("a sample without a value")?;
            let (name, rest) = line.split_at(end);
            let family = ["", "_bucket", "_sum", "_count"]
                .iter()
                .find_map(|suffix| name.strip_suffix(suffix).filter(|n| all.contains_key(*n)))
                .with_context(|| format!("{name} has no TYPE line before it"))?;
            let mut labels = names_of_labels(rest);
            labels.remove("le");
            let known = &mut all.get_mut(family).context("found above")?.labels;
            ensure!(
                known.as_ref().is_none_or(|known| *known == labels),
                "samples of {family} have different labels: {known:?}, {labels:?}"
            );
            *known = Some(labels);
        }
    }
    Ok(all)
}

/// Of `{a="1",b="2"} 3`; a quote within a value has a backslash before it.
fn names_of_labels(text: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut rest = text;
    while let Some((name, after)) = rest.split_once("=\"") {
        names.insert(name.trim_start_matches(['{', ',']).to_owned());
        let mut escaped = false;
        let end = after.find(|c| {
            let is_end = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            is_end
        });
        rest = end.map_or("", |end| &after[end + 1..]);
    }
    names
}

/// What is missing, too much or otherwise, a line each. `own`: labels that a host adds to those of a family.
pub fn differences(
    promised: &Families,
    found: &Families,
    own: impl Fn(&str) -> BTreeSet<String>,
) -> Vec<String> {
    let mut out = Vec::new();
    for (name, family) in promised {
        match found.get(name) {
            None => out.push(format!("{name} is missing")),
            Some(other) if other.kind != family.kind => out.push(format!(
                "{name} is a {}, and in the table a {}",
                other.kind, family.kind
            )),
            Some(Family {
                labels: Some(labels),
                ..
            }) => {
                let mut wanted = family.labels.clone().unwrap_or_default();
                wanted.extend(own(name));
                if *labels != wanted {
                    out.push(format!("{name} has the labels {labels:?}, not {wanted:?}"));
                }
            }
            Some(_) => {}
        }
    }
    let more = found.keys().filter(|name| !promised.contains_key(*name));
    out.extend(more.map(|name| format!("{name} is not in the table")));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "| name | type | labels | where | meaning |\n|---|---|---|---|---|\n\
        | `drex_a_total` | counter | `ramp`, `layer` | all | a |\n\
        | `drex_b_seconds` | histogram | | servers | b |\n\
        | `drex_c` | gauge | | library | c |\n";

    const TEXT: &str = "# TYPE other gauge\nother{x=\"1\"} 1\n\
        # HELP drex_a_total A\n# TYPE drex_a_total counter\ndrex_a_total{model=\"a\\\",b=\\\"\",ramp=\"0\",layer=\"4\"} 3\n\
        # TYPE drex_b_seconds histogram\ndrex_b_seconds_bucket{model=\"m\",le=\"+Inf\"} 3\ndrex_b_seconds_sum{model=\"m\"} 0.5\n";

    #[test]
    fn every_difference_is_found() {
        let of = |host| of_table(TABLE, host).unwrap();
        assert_eq!(of(Host::Library).len(), 2);
        assert_eq!(of(Host::Triton).len(), 2);
        assert!(of_table("| `drex_a` | gauge | | here | a |", Host::Triton).is_err());
        let model = |_: &str| BTreeSet::from(["model".to_owned()]);
        let check = |host, text: &str| differences(&of(host), &of_text(text).unwrap(), model);
        assert_eq!(check(Host::LlamaServer, TEXT), [""; 0]);
        assert_eq!(
            check(Host::Library, TEXT),
            ["drex_c is missing", "drex_b_seconds is not in the table"]
        );
        assert_eq!(
            check(
                Host::Triton,
                &TEXT.replace("a_total counter", "a_total gauge")
            ),
            ["drex_a_total is a gauge, and in the table a counter"]
        );
        assert_eq!(
            check(Host::Triton, &TEXT.replace("layer", "reason")),
            [
                "drex_a_total has the labels {\"model\", \"ramp\", \"reason\"}, not {\"layer\", \"model\", \"ramp\"}"
            ]
        );
        // A family without samples has no labels to compare.
        let bare = "# TYPE drex_a_total counter\n# TYPE drex_b_seconds histogram\n";
        assert_eq!(check(Host::Triton, bare), [""; 0]);
        assert!(of_text("drex_a 1\n").is_err());
        let unlike = "# TYPE drex_c gauge\ndrex_c 1\ndrex_c{a=\"1\"} 1\n";
        assert!(of_text(unlike).is_err());
    }
}
