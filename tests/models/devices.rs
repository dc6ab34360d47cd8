// SPDX-License-Identifier: Apache-2.0

//! Early exit where layers, cache or head lie on several devices: RPC servers on loopback stand for them.
//!
//! Everything computes on this machine's CPU with the exact libggml-cpu, so that tokens must be those of the unpatched
//! engine on the CPU alone, wherever the layers lie.

use std::{
    collections::{HashMap, hash_map::Entry},
    path::PathBuf,
};

use anyhow::{Context, Result, ensure};
use drex_build::{
    Source,
    cache::{self, Cache, Lock},
    llama::Kind,
};
use drex_harness::{generate::generate, load::Generation, suite::Run};

use crate::{Build, builds, remote::Remote, start, streams, tiny};

struct Case {
    name: &'static str,
    servers: usize,
    args: &'static [&'static str],
    /// One of the tiny models instead of the bundled one.
    tiny: Option<&'static str>,
    /// Why fill `copy` is refused.
    no_copy: Option<&'static str>,
}

const ELSEWHERE: &str = "needs the KV cache of all layers in the memory of the host";

const CASES: [Case; 9] = [
    Case {
        name: "all layers on an RPC server",
        servers: 1,
        args: &["-ngl", "99"],
        tiny: None,
        no_copy: Some(ELSEWHERE),
    },
    Case {
        name: "layers split over two RPC servers",
        servers: 2,
        args: &["-ngl", "99", "--split-mode", "layer"],
        tiny: None,
        no_copy: Some(ELSEWHERE),
    },
    Case {
        name: "layers split over two RPC servers, a unified cache",
        servers: 2,
        args: &["-ngl", "99", "-ts", "3,1", "--kv-unified"],
        tiny: None,
        no_copy: Some(ELSEWHERE),
    },
    Case {
        name: "the last 6 layers and the head on an RPC server",
        servers: 1,
        args: &["-ngl", "7"],
        tiny: None,
        no_copy: Some(ELSEWHERE),
    },
    Case {
        name: "as --fit places them",
        servers: 2,
        args: &["--fit", "on"],
        tiny: None,
        no_copy: Some(ELSEWHERE),
    },
    Case {
        name: "the head on the host",
        servers: 1,
        args: &["-ngl", "99", "-ot", "output.weight=CPU"],
        tiny: None,
        no_copy: Some(ELSEWHERE),
    },
    Case {
        name: "the cache on the host",
        servers: 1,
        args: &["-ngl", "99", "--no-kv-offload"],
        tiny: None,
        no_copy: None,
    },
    Case {
        name: "experts on the host",
        servers: 1,
        args: &["-ngl", "99", "--cpu-moe"],
        tiny: Some("qwen3moe"),
        no_copy: Some(ELSEWHERE),
    },
    Case {
        name: "sliding windows on two RPC servers and the host",
        servers: 2,
        args: &["-ngl", "6", "-b", "64", "-ub", "64"],
        tiny: Some("gemma3"),
        no_copy: Some(tiny::WINDOWS),
    },
];

struct Kit {
    patched: Build,
    /// Where models are, and what the unpatched engine on the CPU answers.
    models: HashMap<Option<&'static str>, (PathBuf, Vec<Generation>)>,
    cache: Cache,
    _machine: Lock,
}

impl Kit {
    fn build(source: &Source) -> Result<Kit> {
        let cache = Cache::open()?;
        let [reference, patched] = builds(&cache, source, Kind::PatchedRpc)?;
        let folder = tiny::ensure(&cache)?;
        let machine = cache.lock_machine()?;
        let mut models = HashMap::new();
        for case in &CASES {
            if let Entry::Vacant(entry) = models.entry(case.tiny) {
                let model = match case.tiny {
                    Some(name) => tiny::path(&folder, tiny::find(name)?),
                    None => cache::bundled_model()?,
                };
                let server = start(&reference, &model, 1, &["-t", "1", "-b", "64", "-ub", "64"])?;
                let answers = generate(server.client, &streams::requests(""), 1)?;
                entry.insert((model, answers));
            }
        }
        Ok(Kit {
            models,
            patched,
            cache,
            _machine: machine,
        })
    }
}

pub fn tests(source: &Source, run: &mut Run) {
    let (mut passed, mut tokens) = (0, 0);
    let mut kit = None;
    for case in &CASES {
        run.tell(&format!("devices: {}", case.name), || {
            if kit.is_none() {
                kit = Some(Kit::build(source)?);
            }
            let (text, n) = try_case(case, kit.as_ref().context("no builds")?)?;
            passed += 1;
            tokens += n;
            Ok(text)
        });
    }
    run.say(&format!(
        "{passed} layouts of devices, {tokens} tokens compared"
    ));
}

fn try_case(case: &Case, kit: &Kit) -> Result<(String, usize)> {
    let mut remotes = Vec::new();
    for i in 0..case.servers {
        let log = kit.cache.log(&format!("rpc-{i}"))?;
        remotes.push(Remote::start(&kit.patched.runtime, &log)?);
    }
    let addrs: Vec<_> = remotes.iter().map(Remote::addr).collect();
    let addrs = addrs.join(",");
    let (model, answers) = &kit.models[&case.tiny];
    let ([first, second], threshold) = match case.tiny {
        Some(name) => (tiny::find(name)?.ramps, "0.05"),
        None => ([4, 8], "0.3"),
    };
    let layers = format!("{first},{second}");
    let serve = |slots: usize, policy: &str| {
        let devices = ["-t", "1", "--rpc", &addrs];
        let exits = ["--drex-policy", policy, "--drex-exit-layers", &layers];
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
    let fills = &all[usize::from(case.no_copy.is_some())..];
    let server = serve(streams::slots(fills), "hold")?;
    let found = streams::compare(answers, &server, fills, case.no_copy, streams::ACCEPTED)?;
    let text = format!(
        "exits after layers {layers}; verify as unpatched ({} of {} drafts accepted), {} in company as alone, {} tokens; {ours:.1} KiB a token to and fro, \
         {stock:.1} without early exit{}",
        found.accepted,
        found.drafts,
        fills.join(", "),
        found.tokens,
        match case.no_copy {
            Some(why) => format!("; copy refused: {why}"),
            None => String::new(),
        },
    );
    Ok((text, found.tokens))
}
