// SPDX-License-Identifier: Apache-2.0

//! Early exit where layers, cache or head lie on several devices: RPC servers on loopback stand for them.
//!
//! Everything computes on this machine's CPU with the exact libggml-cpu, so that tokens must be those of the unpatched
//! engine on the CPU alone, wherever the layers lie.

mod remote;

use std::{path::Path, time::Instant};

use anyhow::{Result, ensure};

use crate::{
    Source,
    architectures::{models, streams},
    cache::{self, Cache},
    llama::{Kind, Llama, Runtime},
    load::Generation,
    server::Server,
    server_tests::{Build, EXACT, generate},
};

use remote::Remote;

pub type One<'a> = dyn FnMut(&str, Result<()>, Instant) + 'a;

struct Case {
    name: &'static str,
    servers: usize,
    args: &'static [&'static str],
    /// The tiny mixture of experts instead of the bundled model.
    experts: bool,
    /// K and V of all layers are in the host's memory.
    copy: bool,
}

const CASES: [Case; 7] = [
    Case {
        name: "all layers on an RPC server",
        servers: 1,
        args: &["-ngl", "99"],
        experts: false,
        copy: false,
    },
    Case {
        name: "layers split over two RPC servers",
        servers: 2,
        args: &["-ngl", "99", "--split-mode", "layer"],
        experts: false,
        copy: false,
    },
    Case {
        name: "layers split over two RPC servers, a unified cache",
        servers: 2,
        args: &["-ngl", "99", "-ts", "3,1", "--kv-unified"],
        experts: false,
        copy: false,
    },
    Case {
        name: "the last 6 layers and the head on an RPC server",
        servers: 1,
        args: &["-ngl", "7"],
        experts: false,
        copy: false,
    },
    Case {
        name: "the head on the host",
        servers: 1,
        args: &["-ngl", "99", "-ot", "output.weight=CPU"],
        experts: false,
        copy: false,
    },
    Case {
        name: "the cache on the host",
        servers: 1,
        args: &["-ngl", "99", "--no-kv-offload"],
        experts: false,
        copy: true,
    },
    Case {
        name: "experts on the host",
        servers: 1,
        args: &["-ngl", "99", "--cpu-moe"],
        experts: true,
        copy: false,
    },
];

const NO_COPY: &str = "needs the KV cache of all layers in the memory of the host";

pub fn run(source: &Source, one: &mut One) -> Result<()> {
    let cache = Cache::open()?;
    let llama = Llama::open(&cache, source.llama_src.as_deref())?;
    let mut runtimes = llama.ensure(&[Kind::ReferenceExact, Kind::PatchedRpc])?;
    let patched = runtimes.remove(1);
    let reference = (runtimes.remove(0), Vec::new());
    let bundled = cache::bundled_model()?;
    let experts = models::ensure(&cache)?.join("qwen3moe.gguf");
    let _machine = cache.lock_machine()?;

    let mut answers = Vec::new();
    for model in [&bundled, &experts] {
        let server = start(&reference, model, 1, &[])?;
        answers.push(generate(server.client, &streams::requests(""), 1)?);
    }
    let (mut passed, mut tokens) = (0, 0);
    for case in &CASES {
        let start = Instant::now();
        let (model, answers) = if case.experts {
            (&experts, &answers[1])
        } else {
            (&bundled, &answers[0])
        };
        match try_case(case, &cache, &patched, model, answers) {
            Ok((text, n)) => {
                passed += 1;
                tokens += n;
                one(&format!("{}: {text}", case.name), Ok(()), start);
            }
            Err(error) => one(case.name, Err(error), start),
        }
    }
    println!("{passed} layouts of devices, {tokens} tokens compared");
    Ok(())
}

fn start(build: &Build, model: &Path, slots: usize, args: &[String]) -> Result<Server> {
    let (np, ctx) = (slots.to_string(), (slots * 512).to_string());
    let model = model.to_string_lossy();
    let common = ["-m", &model, "-np", &np, "-c", &ctx, "-t", "1", "-fa", "on"];
    let flags = [&common[..], &["--cache-ram", "0", "--no-webui"], EXACT].concat();
    Server::start(
        &build.0,
        flags
            .into_iter()
            .map(str::to_owned)
            .chain(args.iter().cloned()),
    )
}

fn try_case(
    case: &Case,
    cache: &Cache,
    runtime: &Runtime,
    model: &Path,
    answers: &[Generation],
) -> Result<(String, usize)> {
    let mut remotes = Vec::new();
    for i in 0..case.servers {
        remotes.push(Remote::start(runtime, &cache.log(&format!("rpc-{i}"))?)?);
    }
    let addrs: Vec<_> = remotes.iter().map(Remote::addr).collect();
    let build = (runtime.clone(), Vec::new());
    let layers = if case.experts { "2,5" } else { "4,8" };
    let common = ["--rpc", &addrs.join(",")].map(str::to_owned);
    let common: Vec<_> = common
        .into_iter()
        .chain(case.args.iter().map(|&a| a.to_owned()))
        .collect();
    let per_token = |policy: &str| -> Result<f64> {
        let args = ["--drex-policy", policy, "--drex-exit-layers", layers];
        let fill = ["--drex-fill", "verify", "--drex-threshold", "0.3"];
        let args = args.into_iter().chain(fill).map(str::to_owned);
        let args: Vec<_> = common.iter().cloned().chain(args).collect();
        let server = start(&build, model, 1, &args)?;
        let _ = remotes.iter().map(Remote::traffic).count();
        let got = generate(server.client, &streams::requests("")[1..2], 1)?;
        let bytes: u64 = remotes
            .iter()
            .map(Remote::traffic)
            .map(|(a, b)| a + b)
            .sum();
        Ok(bytes as f64 / got[0].tokens.len() as f64 / 1024.0)
    };
    let (stock, ours) = (per_token("off")?, per_token("hold")?);

    let fills: &[&str] = if case.copy {
        &["copy", "propagate", "postfill"]
    } else {
        &["propagate", "postfill"]
    };
    let exits = ["--drex-policy", "hold", "--drex-exit-layers", layers];
    let fill = ["--drex-fill", "verify", "--drex-threshold"];
    let threshold = if case.experts { "0.05" } else { "0.3" };
    let args = exits.into_iter().chain(fill).chain([threshold]);
    let args: Vec<_> = common
        .iter()
        .cloned()
        .chain(args.map(str::to_owned))
        .collect();
    let server = start(&build, model, streams::slots(fills), &args)?;
    let no_copy = (!case.copy).then_some(NO_COPY);
    let found = streams::compare(answers, &server, fills, no_copy)?;
    let traffic: u64 = remotes.iter().map(|r| r.traffic().0).sum();
    ensure!(traffic > 0, "nothing went to the RPC servers");
    Ok((
        format!(
            "verify as unpatched ({} of {} drafts accepted), {} in company as alone, {} tokens; {ours:.1} KiB a token to and from, {stock:.1} without early exit{}",
            found.accepted,
            found.drafts,
            fills.join(", "),
            found.tokens,
            if case.copy { "" } else { "; copy refused" },
        ),
        found.tokens,
    ))
}
