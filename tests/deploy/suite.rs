// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask test --deploy`: what packaging/deploy has, as far as it can be checked without a cluster and a daemon.

use std::{
    collections::{BTreeSet, HashSet},
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, ensure};
use drex_build::{
    cache::{self, Cache},
    fetch::Python,
    process,
    python::{Package, package},
};
use drex_harness::{
    families::{Families, Host, promised},
    suite,
};
use drex_triton_server::setup;
use serde_json::Value;

fn main() -> ExitCode {
    suite::plain("deploy", "Checks packaging/deploy", |run| {
        for (name, test) in TESTS {
            run.test(name, test);
        }
    })
}

type Test = (&'static str, fn() -> Result<()>);

const TESTS: [Test; 4] = [
    (
        "the Kubernetes manifests follow their schemas, and drain",
        manifests,
    ),
    ("the Compose file names what is there, and drains", compose),
    (
        "the Dockerfiles fetch packages and nothing else",
        dockerfiles,
    ),
    (
        "the dashboard shows metrics that both servers have",
        dashboard,
    ),
];

const VALIDATE: Package = Package {
    name: "kubernetes-validate",
    module: "kubernetes_validate",
    pinned: "kubernetes-validate==1.37.0",
    wide: "kubernetes-validate>=1.29",
};

/// Prints the documents of a YAML file as JSON; with a second argument, holds each against its schema first.
const READ: &str = "
import json, sys, yaml
documents = list(yaml.safe_load_all(open(sys.argv[1])))
if len(sys.argv) > 2:
    import kubernetes_validate
    for document in documents:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
print(json.dumps(documents))
";

fn folder() -> PathBuf {
    cache::repo().join("packaging/deploy")
}

fn yaml(path: &Path, schema: bool) -> Result<Vec<Value>> {
    let cache = Cache::open()?;
    let python = Python::find(&cache)?;
    let mut command = python.command();
    if let Some(at) = package(&cache, &python, &VALIDATE)? {
        command.env("PYTHONPATH", at);
    }
    command.args(["-c", READ]).arg(path);
    if schema {
        command.arg("schema");
    }
    let text = process::output(&mut command).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_str(&text)?)
}

/// The number after `--exit-timeout-secs=` among arguments; 0 where there is none.
fn exit_timeout(arguments: &Value) -> Result<u64> {
    let arguments = arguments.as_array().context("no arguments")?;
    let found = arguments
        .iter()
        .find_map(|a| a.as_str()?.strip_prefix("--exit-timeout-secs="));
    Ok(found.map_or(Ok(0), str::parse)?)
}

fn manifests() -> Result<()> {
    let mut count = 0;
    for name in ["triton", "llama-server"] {
        let path = folder().join(format!("kubernetes/{name}.yaml"));
        let documents = yaml(&path, true)?;
        let kinds: Vec<_> = documents.iter().map(|d| d["kind"].as_str()).collect();
        ensure!(
            kinds == ["Deployment", "Service", "PodDisruptionBudget"].map(Some),
            "{name}: {kinds:?}"
        );
        let spec = &documents[0]["spec"]["template"]["spec"];
        let container = &spec["containers"][0];
        let pause: u64 = container["lifecycle"]["preStop"]["exec"]["command"][1]
            .as_str()
            .context("no pause before the end")?
            .parse()?;
        let needed = pause + exit_timeout(&container["args"])?;
        let grace = spec["terminationGracePeriodSeconds"].as_u64();
        ensure!(
            grace > Some(needed),
            "{name}: {grace:?} s of grace, {needed} s are needed"
        );
        // The Service sends requests to ports that the container names.
        let ports = |value: &Value, name: &str| -> HashSet<String> {
            let all = value.as_array().into_iter().flatten();
            all.filter_map(|port| Some(port[name].as_str()?.to_owned()))
                .collect()
        };
        let wanted = ports(&documents[1]["spec"]["ports"], "targetPort");
        ensure!(
            !wanted.is_empty() && wanted.is_subset(&ports(&container["ports"], "name")),
            "{name}: {wanted:?}"
        );
        count += documents.len();
    }
    // The check sees what is wrong.
    let temp = cache::TempDir::unlocked("deploy")?;
    let good = fs::read_to_string(folder().join("kubernetes/triton.yaml"))?;
    for (from, to) in [
        ("replicas: 2", "replicas: two"),
        ("maxSurge: 1", "maxSurges: 1"),
    ] {
        let bad = temp.path().join("bad.yaml");
        ensure!(good.contains(from), "{from} is not there");
        fs::write(&bad, good.replace(from, to))?;
        ensure!(yaml(&bad, true).is_err(), "{to} is taken");
    }
    println!("        {count} documents");
    Ok(())
}

fn compose() -> Result<()> {
    let file = folder().join("compose.yaml");
    let documents = yaml(&file, false)?;
    let services = documents[0]["services"]
        .as_object()
        .context("no services")?;
    ensure!(services.len() == 2, "{services:?}");
    for (name, service) in services {
        let build = &service["build"];
        let context = folder().join(build["context"].as_str().context("no context")?);
        let dockerfile = context.join(build["dockerfile"].as_str().context("no dockerfile")?);
        ensure!(
            dockerfile.is_file() && context.join("Cargo.toml").is_file(),
            "{name}: {}",
            dockerfile.display()
        );
        let grace = service["stop_grace_period"].as_str().unwrap_or_default();
        let grace: u64 = grace.trim_end_matches('s').parse()?;
        let needed = exit_timeout(&service["command"])?;
        ensure!(
            grace > needed,
            "{name}: {grace} s of grace, {needed} s are needed"
        );
    }
    Ok(())
}

/// The instructions of a Dockerfile, each in one line.
fn instructions(text: &str) -> Vec<(String, String)> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let joined = lines.collect::<Vec<_>>().join("\n").replace("\\\n", " ");
    joined
        .lines()
        .filter_map(|line| {
            let (name, rest) = line.trim().split_once(' ')?;
            Some((name.to_owned(), rest.trim().to_owned()))
        })
        .collect()
}

fn dockerfiles() -> Result<()> {
    for name in ["triton", "llama-server"] {
        let path = folder().join(format!("{name}.Dockerfile"));
        let text = fs::read_to_string(&path)?;
        let (mut known, mut stages) = (HashSet::new(), HashSet::new());
        for (what, rest) in instructions(&text) {
            let first = rest.split(' ').next().unwrap_or_default();
            match what.as_str() {
                "ARG" => {
                    let (argument, value) =
                        first.split_once('=').context("an ARG without a value")?;
                    // An image by its name alone: where it comes from is for who builds.
                    ensure!(
                        !value
                            .split_once('/')
                            .is_some_and(|(host, _)| host.contains('.')),
                        "{name}: {rest}"
                    );
                    known.insert(format!("${{{argument}}}"));
                }
                "FROM" => {
                    ensure!(known.contains(first), "{name}: FROM {rest}");
                    let stage = rest.rsplit(' ').next().unwrap_or_default();
                    stages.insert(stage.to_owned());
                }
                "COPY" => {
                    if let Some(stage) = first.strip_prefix("--from=") {
                        ensure!(stages.contains(stage), "{name}: COPY {rest}");
                    }
                }
                "RUN" => {
                    for word in ["curl", "wget", "git clone", "http"] {
                        ensure!(!rest.contains(word), "{name}: RUN {rest}");
                    }
                }
                other => ensure!(
                    [
                        "WORKDIR",
                        "ENV",
                        "USER",
                        "EXPOSE",
                        "HEALTHCHECK",
                        "ENTRYPOINT",
                        "CMD"
                    ]
                    .contains(&other),
                    "{name}: {other} {rest}"
                ),
            }
        }
        ensure!(stages.contains(name), "{name}: {stages:?}");
        ensure!(
            folder()
                .join(format!("{name}.Dockerfile.dockerignore"))
                .is_file(),
            "{name} sends the target folder along"
        );
    }
    // The server is the one that the tests run.
    let text = fs::read_to_string(folder().join("triton.Dockerfile"))?;
    for pinned in setup::server_pins() {
        ensure!(
            text.contains(pinned),
            "{pinned} is not in triton.Dockerfile"
        );
    }
    Ok(())
}

/// Words of PromQL that name something: metrics, labels, functions.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| !word.is_empty())
}

/// The words in each pair of brackets after a text, such as those of `by (le, layer)`.
fn bracketed<'a>(query: &'a str, before: &str, close: char) -> Vec<&'a str> {
    let parts = query.split(before).skip(1);
    parts
        .flat_map(|part| words(part.split(close).next().unwrap_or_default()))
        .collect()
}

/// What is wrong with a query, for a host with these families.
fn faults(query: &str, families: &Families) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut labels = BTreeSet::from(["job".to_owned()]);
    let mut used = 0;
    for name in words(query).filter(|word| word.starts_with("drex_")) {
        used += 1;
        // A histogram's samples have names of their own.
        let family = families.get(name).or_else(|| {
            let base = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|end| name.strip_suffix(end))?;
            families
                .get(base)
                .filter(|family| family.kind == "histogram")
        });
        let Some(family) = family else {
            wrong.push(format!("there is no {name}"));
            continue;
        };
        labels.extend(family.labels.iter().flatten().cloned());
        if name.ends_with("_bucket") {
            labels.insert("le".into());
        }
        let rated = query.contains(&format!("rate({name}{{"));
        if rated == (family.kind == "gauge") {
            wrong.push(format!("{name} is a {}", family.kind));
        }
        if !query.contains(&format!("{name}{{job=~\"$job\"")) {
            wrong.push(format!("{name} is not that of the chosen jobs"));
        }
    }
    for label in bracketed(query, "by (", ')') {
        if !labels.contains(label) {
            wrong.push(format!("no metric in it has the label {label}"));
        }
    }
    if used == 0 {
        wrong.push("it has no metric".into());
    }
    if query.matches('(').count() != query.matches(')').count() {
        wrong.push("a bracket is not closed".into());
    }
    wrong
}

fn dashboard() -> Result<()> {
    let path = folder().join("grafana/drex.json");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let dashboard: Value = serde_json::from_str(&text)?;
    for field in ["title", "uid", "description", "timezone", "refresh"] {
        ensure!(
            dashboard[field].is_string(),
            "{field}: {}",
            dashboard[field]
        );
    }
    ensure!(
        dashboard["schemaVersion"].as_u64() >= Some(36),
        "{}",
        dashboard["schemaVersion"]
    );
    ensure!(
        dashboard["time"]["from"].is_string() && dashboard["time"]["to"].is_string(),
        "no time"
    );
    // The data source is asked for, not written down.
    let variables = dashboard["templating"]["list"]
        .as_array()
        .context("no variables")?;
    let names: Vec<_> = variables
        .iter()
        .filter_map(|v| v["name"].as_str())
        .collect();
    ensure!(names == ["datasource", "job"], "{names:?}");
    let hosts = [promised(Host::LlamaServer)?, promised(Host::Triton)?];
    let job = variables[1]["query"]["query"].as_str().unwrap_or_default();
    ensure!(job.contains("label_values(drex_build_info, job)"), "{job}");

    let panels = dashboard["panels"].as_array().context("no panels")?;
    let mut ids = HashSet::new();
    let mut taken: Vec<[u64; 4]> = Vec::new();
    let mut used = BTreeSet::new();
    for panel in panels {
        let title = panel["title"].as_str().context("a panel without a title")?;
        ensure!(
            panel["id"].as_u64().is_some_and(|id| ids.insert(id)),
            "{title}: id {}",
            panel["id"]
        );
        let at = |name: &str| {
            panel["gridPos"][name]
                .as_u64()
                .with_context(|| format!("{title}: no {name}"))
        };
        let place = [at("x")?, at("y")?, at("w")?, at("h")?];
        let [x, y, w, h] = place;
        ensure!(w > 0 && h > 0 && x + w <= 24, "{title}: {place:?}");
        let over = taken
            .iter()
            .find(|[a, b, c, d]| x < a + c && *a < x + w && y < b + d && *b < y + h);
        ensure!(over.is_none(), "{title}: {place:?} lies over {over:?}");
        taken.push(place);
        if panel["type"] == "row" {
            continue;
        }
        ensure!(
            ["stat", "timeseries"]
                .map(Value::from)
                .contains(&panel["type"]),
            "{title}: {}",
            panel["type"]
        );
        let targets = panel["targets"].as_array().context("no targets")?;
        ensure!(!targets.is_empty(), "{title} shows nothing");
        let mut letters = HashSet::new();
        for target in targets {
            ensure!(
                target["datasource"]["uid"] == "${datasource}",
                "{title}: {target}"
            );
            ensure!(
                target["refId"].as_str().is_some_and(|r| letters.insert(r)),
                "{title}: {target}"
            );
            let query = target["expr"].as_str().context("no query")?;
            for families in &hosts {
                let wrong = faults(query, families);
                ensure!(wrong.is_empty(), "{title}: {query}: {}", wrong.join("; "));
            }
            used.extend(
                words(query)
                    .filter(|w| w.starts_with("drex_"))
                    .map(str::to_owned),
            );
        }
    }
    // The check sees what is wrong.
    for query in [
        "sum(drex_held_row{job=~\"$job\"})",
        "sum(drex_held_rows_bucket{job=~\"$job\"})",
        "sum(drex_ready_rows{job=~\"$job\"})",
        "sum(drex_tokens_total{job=~\"$job\"})",
        "sum(rate(drex_held_rows{job=~\"$job\"}[1m]))",
        "sum by (reason) (drex_held_rows{job=~\"$job\"})",
        "sum(drex_held_rows)",
        "sum(up{job=~\"$job\"})",
        "sum(drex_held_rows{job=~\"$job\"}",
    ] {
        ensure!(!faults(query, &hosts[0]).is_empty(), "{query} is taken");
    }
    println!("        {} panels, {} metrics", panels.len(), used.len());
    Ok(())
}
