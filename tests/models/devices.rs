// SPDX-License-Identifier: Apache-2.0

//! Early exit where layers, cache or head lie on several devices: RPC servers on loopback stand for them.
//!
//! Everything computes on this machine's CPU with the exact libggml-cpu, so that tokens must be those of the unpatched
//! engine on the CPU alone, wherever the layers lie.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use drex_build::{
    Source,
    cache::{self, Cache, Lock},
    llama::Kind,
};
use drex_harness::{generate::generate, load::Generation, suite::Run};

use crate::{Build, builds, remote::Remote, start, streams, tiny, wanted};

struct Case {
    name: &'static str,
    servers: usize,
    args: &'static [&'static str],
    /// The tiny mixture of experts instead of the bundled model.
    experts: bool,
    /// K and V of all layers are in the host's memory.
    copy: bool,
}

const CASES: [Case; 8] = [
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
        name: "as --fit places them",
        servers: 2,
        args: &["--fit", "on"],
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

struct Kit {
    patched: Build,
    /// The bundled model and the mixture of experts, and what the unpatched engine on the CPU answers.
    models: [(PathBuf, Vec<Generation>); 2],
    cache: Cache,
    _machine: Lock,
}

impl Kit {
    fn build(source: &Source) -> Result<Kit> {
        let cache = Cache::open()?;
        let [reference, patched] = builds(&cache, source, Kind::PatchedRpc)?;
        let experts = tiny::ensure(&cache)?.join("qwen3moe.gguf");
        let machine = cache.lock_machine()?;
        let answered = |model: PathBuf| -> Result<_> {
            let server = start(&reference, &model, 1, &["-t", "1"])?;
            let answers = generate(server.client, &streams::requests(""), 1)?;
            Ok((model, answers))
        };
        Ok(Kit {
            models: [answered(cache::bundled_model()?)?, answered(experts)?],
            patched,
            cache,
            _machine: machine,
        })
    }
}

pub fn tests(source: &Source, run: &mut Run) {
    let (mut passed, mut tokens) = (0, 0);
    let mut kit = None;
    for (case, name) in wanted(run, &CASES, |case| format!("devices: {}", case.name)) {
        run.tell(&name, || {
            if kit.is_none() {
                kit = Some(Kit::build(source)?);
            }
            let (text, n) = try_case(case, kit.as_ref().context("no builds")?)?;
            passed += 1;
            tokens += n;
            Ok(text)
        });
    }
    println!("{passed} layouts of devices, {tokens} tokens compared");
}

fn try_case(case: &Case, kit: &Kit) -> Result<(String, usize)> {
    let mut remotes = Vec::new();
    for i in 0..case.servers {
        let log = kit.cache.log(&format!("rpc-{i}"))?;
        remotes.push(Remote::start(&kit.patched.runtime, &log)?);
    }
    let addrs: Vec<_> = remotes.iter().map(Remote::addr).collect();
    let addrs = addrs.join(",");
    let (model, answers) = &kit.models[usize::from(case.experts)];
    let (layers, threshold) = if case.experts {
        ("2,5", "0.05")
    } else {
        ("4,8", "0.3")
    };
    let serve = |slots: usize, policy: &str| {
        let devices = ["-t", "1", "--rpc", &addrs];
        let exits = ["--drex-policy", policy, "--drex-exit-layers", layers];
        let fill = ["--drex-fill", "verify", "--drex-threshold", threshold];
        start(
            &kit.patched,
            model,
            slots,
            &[&devices[..], case.args, &exits, &fill].concat(),
        )
    };

    // Traffic of one short request.
    let per_token = |policy: &str| -> Result<f64> {
        let server = serve(1, policy)?;
        for remote in &remotes {
            remote.traffic();
        }
        let got = generate(server.client, &streams::requests("")[1..2], 1)?;
        let bytes: u64 = remotes
            .iter()
            .map(Remote::traffic)
            .map(|(a, b)| a + b)
            .sum();
        Ok(bytes as f64 / got[0].tokens.len() as f64 / 1024.0)
    };
    let (stock, ours) = (per_token("off")?, per_token("hold")?);
    ensure!(stock > 0.0, "nothing goes to the RPC servers");

    let all: [&str; 3] = ["copy", "propagate", "postfill"];
    let fills = &all[usize::from(!case.copy)..];
    let server = serve(streams::slots(fills), "hold")?;
    let no_copy = (!case.copy).then_some(NO_COPY);
    let found = streams::compare(answers, &server, fills, no_copy)?;
    let text = format!(
        "verify as unpatched ({} of {} drafts accepted), {} in company as alone, {} tokens; {ours:.1} KiB a token to and fro, \
         {stock:.1} without early exit{}",
        found.accepted,
        found.drafts,
        fills.join(", "),
        found.tokens,
        if case.copy { "" } else { "; copy refused" },
    );
    Ok((text, found.tokens))
}
