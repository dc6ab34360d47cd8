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

pub const EXAMPLE: &str = "Example: cargo xtask serve -- --port 8080 -np 8 -c 4096";

/// Returns only if the server cannot be run.
pub fn run(source: Option<&Path>, args: Vec<OsString>) -> Result<()> {
    let cache = Cache::open()?;
    let llama = Llama::open(&cache, source)?;
    let runtime = llama.ensure_one(Kind::Patched)?;
    let in_env = |name: &str| std::env::var_os(name).is_some();
    let args = completed(args, in_env, cache::bundled_model)?;
    // exec, so that signals and the exit status are the server's own.
    let error = std::process::Command::new(runtime.server())
        .args(args)
        .exec();
    Err(error).with_context(|| format!("cannot run {}", runtime.server().display()))
}

/// Arguments of llama-server with a model and a policy, where neither they nor the environment name any.
pub fn completed(
    mut args: Vec<OsString>,
    in_env: impl Fn(&str) -> bool,
    bundled: impl FnOnce() -> Result<PathBuf>,
) -> Result<Vec<OsString>> {
    const MODELS: [&str; 11] = [
        "-m",
        "--model",
        "-mu",
        "--model-url",
        "-hf",
        "-hfr",
        "--hf-repo",
        "--models-dir",
        "--models-preset",
        "-dr",
        "--docker-repo",
    ];
    const VARIABLES: [&str; 6] = [
        "LLAMA_ARG_MODEL",
        "LLAMA_ARG_MODEL_URL",
        "LLAMA_ARG_HF_REPO",
        "LLAMA_ARG_DOCKER_REPO",
        "LLAMA_ARG_MODELS_DIR",
        "LLAMA_ARG_MODELS_PRESET",
    ];
    let has = |test: &dyn Fn(&str) -> bool| {
        args.iter()
            .any(|a| test(a.to_string_lossy().split('=').next().unwrap_or_default()))
    };
    if has(&|a| matches!(a, "-h" | "--help" | "--usage" | "--version")) {
        return Ok(args);
    }
    let names_model = has(&|a| MODELS.contains(&a)) || VARIABLES.iter().any(|name| in_env(name));
    let named = ["--drex", "--drex-policy"];
    let named_by = ["LLAMA_ARG_DREX", "LLAMA_ARG_DREX_POLICY"];
    let names_policy = has(&|a| named.contains(&a)) || named_by.iter().any(|name| in_env(name));
    if !names_model {
        args.extend(["-m".into(), bundled()?.into()]);
    }
    if !names_policy {
        args.extend(["--drex".into(), "on".into()]);
    }
    Ok(args)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(args: &str, variable: &str) -> String {
        let args = args.split_whitespace().map(OsString::from).collect();
        let all = completed(args, |name| name == variable, || Ok("bundled.gguf".into())).unwrap();
        let all: Vec<_> = all.iter().map(|a| a.to_string_lossy()).collect();
        all.join(" ")
    }

    #[test]
    fn a_model_and_a_policy_unless_they_are_named() {
        assert_eq!(of("", ""), "-m bundled.gguf --drex on");
        assert_eq!(of("", "LLAMA_ARG_DREX_POLICY"), "-m bundled.gguf");
        assert_eq!(of("", "LLAMA_ARG_DREX"), "-m bundled.gguf");
        assert_eq!(of("--drex off", ""), "--drex off -m bundled.gguf");
        assert_eq!(of("", "LLAMA_ARG_MODEL"), "--drex on");
        assert_eq!(of("-dr x", ""), "-dr x --drex on");
        assert_eq!(of("--version", ""), "--version");
        assert_eq!(
            of("-hf=a/b --drex-threshold 0.8", ""),
            "-hf=a/b --drex-threshold 0.8 --drex on"
        );
        assert_eq!(
            of("--model=x --drex-policy=off", ""),
            "--model=x --drex-policy=off"
        );
    }
}
