// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask serve`: llama-server with early exit, on the bundled model unless told otherwise.

use std::{
    ffi::OsString,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{
    cache::{self, Cache},
    llama::{Kind, Llama},
};

pub const EXAMPLE: &str =
    "Example: cargo xtask serve -- --port 8080 -np 8 -c 4096 --drex-threshold 0.8";

/// Returns only if the server cannot be run.
pub fn run(source: Option<&Path>, args: Vec<OsString>) -> Result<()> {
    let cache = Cache::open()?;
    let llama = Llama::open(&cache, source)?;
    let runtime = llama.ensure_one(Kind::Patched)?;
    let policy = std::env::var_os("LLAMA_ARG_DREX_POLICY").is_some();
    let args = completed(args, policy, cache::bundled_model)?;
    // exec, so that signals and the exit status are the server's own.
    let error = std::process::Command::new(runtime.server())
        .args(args)
        .exec();
    Err(error).with_context(|| format!("cannot run {}", runtime.server().display()))
}

/// Arguments of llama-server with a model and a policy, where they name none. `has_policy`: the environment does.
pub fn completed(
    mut args: Vec<OsString>,
    has_policy: bool,
    bundled: impl FnOnce() -> Result<PathBuf>,
) -> Result<Vec<OsString>> {
    const MODELS: [&str; 9] = [
        "-m",
        "--model",
        "-mu",
        "--model-url",
        "-hf",
        "-hfr",
        "--hf-repo",
        "--models-dir",
        "--models-preset",
    ];
    let has = |test: &dyn Fn(&str) -> bool| {
        args.iter()
            .any(|a| test(a.to_string_lossy().split('=').next().unwrap_or_default()))
    };
    if has(&|a| matches!(a, "-h" | "--help" | "--usage" | "--version")) {
        return Ok(args);
    }
    let names_model = has(&|a| MODELS.contains(&a));
    let names_policy = has_policy || has(&|a| a == "--drex-policy");
    if !names_model {
        args.extend(["-m".into(), bundled()?.into()]);
    }
    if !names_policy {
        args.extend(["--drex-policy".into(), "auto".into()]);
    }
    Ok(args)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(args: &str, has_policy: bool) -> String {
        let args = args.split_whitespace().map(OsString::from).collect();
        let all = completed(args, has_policy, || Ok("bundled.gguf".into())).unwrap();
        let all: Vec<_> = all.iter().map(|a| a.to_string_lossy()).collect();
        all.join(" ")
    }

    #[test]
    fn a_model_and_a_policy_unless_they_are_named() {
        assert_eq!(of("", false), "-m bundled.gguf --drex-policy auto");
        assert_eq!(of("", true), "-m bundled.gguf");
        assert_eq!(of("--version", false), "--version");
        assert_eq!(
            of("-hf=a/b --drex-threshold 0.8", false),
            "-hf=a/b --drex-threshold 0.8 --drex-policy auto"
        );
        assert_eq!(
            of("--model=x --drex-policy=off", false),
            "--model=x --drex-policy=off"
        );
    }
}
