// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask kernels`: compiles the CUDA kernels without a CUDA installation or a GPU.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{
    cache::{self, Cache, Key, sha256_file},
    cargo,
    fetch::Python,
    process,
};

#[derive(Args)]
pub struct Options {
    /// Compile, and compare with the committed artefacts instead of replacing them
    #[arg(long)]
    pub check: bool,
}

const IMAGES: [&str; 2] = ["drex.fatbin", "drex.ptx.fatbin"];
const SOURCES: [&str; 6] = [
    "args.h",
    "portable.h",
    "ramp.cu",
    "copy.cu",
    "drex.cu",
    "compile.sh",
];

/// Whether the artefacts are what the sources give.
pub fn run(options: &Options) -> Result<bool> {
    let cache = Cache::open()?;
    let kernels = cache::repo().join("kernels");
    let nvcc = nvcc(&cache)?;
    let _lock = cache.lock()?;
    let made = compile(&cache, &nvcc, &kernels)?;
    let prebuilt = kernels.join("prebuilt");
    let mut same = true;
    for image in IMAGES {
        let (new, old) = (made.path().join(image), prebuilt.join(image));
        let equal = fs::read(&new)? == fs::read(&old).unwrap_or_default();
        let size = fs::metadata(&new)?.len();
        let state = match (equal, options.check) {
            (true, _) => "same as committed",
            (false, true) => "DIFFERS from the committed one",
            (false, false) => "new",
        };
        println!("kernels/prebuilt/{image:16} {size:7} bytes  {state}");
        same &= equal;
        if !options.check {
            fs::create_dir_all(&prebuilt)?;
            fs::copy(&new, &old)?;
        }
    }
    let sums = sums(&kernels)?;
    let list = prebuilt.join("SHA256SUMS");
    if !options.check {
        fs::write(&list, sums)?;
        return Ok(true);
    }
    if fs::read_to_string(&list).unwrap_or_default() != sums {
        println!("kernels/prebuilt/SHA256SUMS DIFFERS: a source changed");
        same = false;
    }
    if !same {
        println!("run `cargo xtask kernels` and commit kernels/prebuilt");
    }
    Ok(same)
}

/// What `tools/gpu/kernels.sh` does on a machine with a GPU, on a driver without a device.
pub fn dry_run() -> Result<()> {
    let cache = Cache::open()?;
    let nvcc = nvcc(&cache)?;
    let cuda = nvcc
        .parent()
        .and_then(Path::parent)
        .context("nvcc lies nowhere")?;
    let library = cargo::build_library()?;
    // Whoever holds the lock may clear the others' temporary folders.
    let _lock = cache.lock()?;
    let out = cache.temp_dir()?;
    let mut command = Command::new(cache::repo().join("tools/gpu/kernels.sh"));
    command
        .arg("--dry-run")
        .env("CUDA_HOME", cuda)
        .env("OUT", out.path())
        .env(
            "DREX_LIB",
            library.parent().context("the library lies nowhere")?,
        );
    let log = cache.log("kernels-dry-run")?;
    process::logged(&mut command, "tools/gpu/kernels.sh --dry-run", &log, false)?;
    let json = fs::read_to_string(out.path().join("kernels.json"))?;
    let json: serde_json::Value = serde_json::from_str(&json)?;
    let n = json["results"].as_array().map_or(0, Vec::len);
    anyhow::ensure!(n > 10, "kernels.json has {n} results");
    Ok(())
}

/// sm_80, sm_90 and sm_100, and PTX for all others.
fn compile(cache: &Cache, nvcc: &Path, kernels: &Path) -> Result<cache::TempDir> {
    let out = cache.temp_dir()?;
    let log = cache.log("kernels")?;
    let mut command = Command::new("sh");
    command
        .arg(kernels.join("compile.sh"))
        .args([nvcc, out.path()]);
    process::logged(&mut command, "compiling the CUDA kernels", &log, false)?;
    resources(&fs::read_to_string(&log)?)?;
    Ok(out)
}

/// The most registers of a thread with which a multiprocessor holds as many threads as the kernel needs: 1280 for the
/// ramp, 1024 where it lists the greatest, 1536 for copies. Registers come in eights.
fn most_registers(kernel: &str) -> u32 {
    let threads = match kernel {
        _ if kernel.starts_with("drex_ramp_top_") => 1024,
        _ if kernel.starts_with("drex_ramp_") => 1280,
        _ => 1536,
    };
    65536 / threads / 8 * 8
}

/// Reads what the compiler said of each kernel: none keeps registers in memory, and none takes more than it may.
fn resources(log: &str) -> Result<()> {
    let mut kernel = None;
    let mut seen = 0;
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            kernel = rest.split_once('\'');
        }
        let Some((name, on)) = kernel else { continue };
        if let Some(spilled) = line.split_once(" bytes stack frame, ").map(|(_, s)| s) {
            let none = spilled == "0 bytes spill stores, 0 bytes spill loads";
            anyhow::ensure!(none, "{name}{on}: {spilled}");
        }
        if let Some((_, used)) = line.split_once("Used ") {
            let n: u32 = used
                .split_once(" registers")
                .and_then(|(n, _)| n.parse().ok())
                .with_context(|| format!("{name}: {line}"))?;
            let most = most_registers(name);
            anyhow::ensure!(n <= most, "{name}{on}: {n} registers, more than {most}");
            seen += 1;
        }
    }
    // Eight kernels on three architectures.
    anyhow::ensure!(
        seen == 24,
        "the compiler spoke of {seen} kernels, not of 24"
    );
    Ok(())
}

/// The folder of the pinned compiler and CUDA's headers.
pub fn cuda_home(cache: &Cache) -> Result<PathBuf> {
    let nvcc = nvcc(cache)?;
    let home = nvcc.parent().and_then(Path::parent);
    Ok(home.context("nvcc lies in no folder")?.to_owned())
}

/// The pinned compiler, from pip. Another version's output would be as good, but not the same.
fn nvcc(cache: &Cache) -> Result<PathBuf> {
    let requirements = cache::repo().join("kernels/requirements.txt");
    let key = Key::default().with(fs::read(&requirements)?).short();
    let dir = cache.path(format!("nvcc-{key}"));
    let nvcc = dir.join("nvidia/cu13/bin/nvcc");
    if process::is_executable(&nvcc) {
        return Ok(nvcc);
    }
    if cfg!(not(all(target_arch = "x86_64", target_os = "linux"))) {
        bail!("the pinned CUDA compiler is for x86-64 Linux; use another machine");
    }
    let lock = cache.lock()?;
    let python = Python::find(cache)?;
    let temp = cache.temp_dir()?;
    let mut command = python.pip();
    command
        .args([
            "install",
            "--no-deps",
            "--require-hashes",
            "--progress-bar",
            "off",
            "--target",
        ])
        .arg(temp.path().join("nvcc"))
        .arg("-r")
        .arg(&requirements);
    let log = cache.log("nvcc")?;
    process::logged(
        &mut command,
        "fetching the CUDA compiler (105 MB)",
        &log,
        false,
    )?;
    temp.publish("nvcc", &dir)?;
    drop(lock);
    if !process::is_executable(&nvcc) {
        bail!("{} is not there after its installation", nvcc.display());
    }
    Ok(nvcc)
}

fn sums(kernels: &Path) -> Result<String> {
    let images = IMAGES.map(|i| format!("prebuilt/{i}"));
    let names = SOURCES.iter().map(|s| (*s).to_owned()).chain(images);
    names
        .map(|name| {
            let sum = sha256_file(&kernels.join(&name)).with_context(|| name.clone())?;
            Ok(format!("{sum}  {name}\n"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_kernels_take() {
        let one = |registers: u32, spilled: u32| {
            format!(
                "ptxas info    : Compiling entry function 'drex_ramp_f32' for 'sm_90'\n\
                 ptxas info    : Function properties for drex_ramp_f32\n    0 bytes stack frame, \
                 {spilled} bytes spill stores, 0 bytes spill loads\n\
                 ptxas info    : Used {registers} registers, used 1 barriers, 84 bytes smem\n"
            )
        };
        assert!(resources(&one(48, 0).repeat(24)).is_ok());
        let said = |log: &str| resources(log).unwrap_err().to_string();
        assert!(said(&one(48, 0)).contains("of 1 kernels"));
        assert!(said(&one(49, 0)).contains("49 registers, more than 48"));
        assert!(said(&one(48, 4)).contains("4 bytes spill stores"));
    }
}
