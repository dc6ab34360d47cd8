// SPDX-License-Identifier: Apache-2.0

//! Puts the compiled CUDA kernels where `src/device/cuda/image.rs` includes
//! them: made by nvcc where there is one, else the committed ones, which must
//! belong to the sources. Nothing of CUDA is needed to build.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use sha2::{Digest, Sha256};

const IMAGES: [&str; 2] = ["drex.fatbin", "drex.ptx.fatbin"];

pub fn place() {
    let kernels = Path::new("kernels");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    println!("cargo::rerun-if-env-changed=DREX_NVCC");
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    for name in [
        "args.h",
        "portable.h",
        "ramp.cu",
        "copy.cu",
        "drex.cu",
        "compile.sh",
    ] {
        println!("cargo::rerun-if-changed=kernels/{name}");
    }
    println!("cargo::rerun-if-changed=kernels/prebuilt");
    if let Some(nvcc) = nvcc() {
        let status = Command::new("sh")
            .arg(kernels.join("compile.sh"))
            .args([&nvcc, &out])
            .status();
        if status.is_ok_and(|s| s.success()) {
            return;
        }
        println!(
            "cargo::warning={} does not compile the CUDA kernels; the committed ones are used",
            nvcc.display()
        );
    }
    if let Err(text) = check(kernels) {
        panic!("{text}; run `cargo xtask kernels` to make kernels/prebuilt anew");
    }
    for image in IMAGES {
        fs::copy(kernels.join("prebuilt").join(image), out.join(image))
            .unwrap_or_else(|e| panic!("kernels/prebuilt/{image}: {e}"));
    }
}

/// DREX_NVCC names it, or is empty: none. Else as CUDA installs it.
fn nvcc() -> Option<PathBuf> {
    if let Some(named) = env::var_os("DREX_NVCC") {
        return (!named.is_empty()).then(|| named.into());
    }
    let mut places: Vec<PathBuf> = Vec::new();
    places.extend(env::var_os("CUDA_HOME").map(|d| PathBuf::from(d).join("bin")));
    places.extend(env::var_os("PATH").iter().flat_map(env::split_paths));
    places.push("/usr/local/cuda/bin".into());
    places
        .into_iter()
        .map(|dir| dir.join("nvcc"))
        .find(|p| p.is_file())
}

/// Compares with the list that was written when the images were made.
fn check(kernels: &Path) -> Result<(), String> {
    let list = kernels.join("prebuilt/SHA256SUMS");
    let text = fs::read_to_string(&list).map_err(|e| format!("{}: {e}", list.display()))?;
    for line in text.lines() {
        let (sum, name) = line
            .split_once("  ")
            .ok_or_else(|| format!("{}: no such line: {line}", list.display()))?;
        let path = kernels.join(name);
        let bytes = fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let found: String = Sha256::digest(&bytes)
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        if found != sum {
            return Err(format!(
                "{} is not what the compiled kernels were made from or with",
                path.display()
            ));
        }
    }
    Ok(())
}
