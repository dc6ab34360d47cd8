// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask test --deploy`: what packaging/deploy has, as far as it can be checked without a cluster and a daemon.

use std::{
    collections::HashSet,
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
use drex_harness::suite;
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

const TESTS: [Test; 3] = [
    (
        "the Kubernetes manifests follow their schemas, and drain",
        manifests,
    ),
    ("the Compose file names what is there, and drains", compose),
    (
        "the Dockerfiles fetch packages and nothing else",
        dockerfiles,
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
