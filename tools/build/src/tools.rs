// SPDX-License-Identifier: Apache-2.0

//! cmake, ninja and the C++ compiler.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{
    cache::{self, Cache, Key, Lock},
    fetch::Python,
    process,
};

/// What is installed where the system has none. The wide requirements are for a Python that the pinned ones left behind.
const PINNED: [&str; 2] = ["cmake==4.1.2", "ninja==1.13.0"];
const WIDE: [&str; 2] = ["cmake>=3.19,<5", "ninja>=1.10"];
const MIN_CMAKE: (u32, u32) = (3, 19);
const MIN_NINJA: (u32, u32) = (1, 10);

pub struct Tools {
    pub cmake: PathBuf,
    pub ninja: PathBuf,
    pub cxx: PathBuf,
    /// Changes whenever objects that were compiled before are of no use any more.
    pub fingerprint: String,
}

impl Tools {
    pub fn find(cache: &Cache, lock: &Lock) -> Result<Tools> {
        let cxx = compiler()?;
        let mut cmake = recent("cmake", MIN_CMAKE);
        let mut ninja = recent("ninja", MIN_NINJA);
        if cmake.is_none() || ninja.is_none() {
            let dir = installed(cache, lock)?;
            cmake = cmake.or_else(|| in_wheel(&dir, "cmake"));
            ninja = ninja.or_else(|| in_wheel(&dir, "ninja"));
        }
        let fingerprint = fingerprint(&cxx)?;
        Ok(Tools {
            cmake: cmake.context("cmake was installed but is not where its package puts it")?,
            ninja: ninja.context("ninja was installed but is not where its package puts it")?,
            cxx,
            fingerprint,
        })
    }
}

fn compiler() -> Result<PathBuf> {
    let found = match env::var("CXX") {
        Ok(name) if !name.is_empty() => {
            if Path::new(&name).is_absolute() {
                Some(name.into())
            } else {
                process::find_program(&name)
            }
        }
        _ => ["c++", "g++", "clang++"]
            .iter()
            .find_map(|name| process::find_program(name)),
    };
    found.context("no C++ compiler on PATH (Debian, Ubuntu: apt-get install g++); CXX can name one")
}

/// More arguments for llama.cpp's configuration, such as -DGGML_NATIVE=OFF for a build that other processors run.
pub const CMAKE_ARGS: &str = "DREX_CMAKE_ARGS";

/// The builds use -march=native, so that a cache that moves to another processor must not be believed.
fn fingerprint(cxx: &Path) -> Result<String> {
    let version = process::output(Command::new(cxx).arg("--version"))?;
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpu
        .lines()
        .find(|l| l.starts_with("flags") || l.starts_with("Features"))
        .unwrap_or_default();
    let cc = env::var("CC").unwrap_or_default();
    let env_flags = ["CFLAGS", "CXXFLAGS", "LDFLAGS"]
        .map(|name| env::var(name).unwrap_or_default())
        .join("|");
    let env_flags = match env::var(CMAKE_ARGS) {
        Ok(more) => format!("{env_flags}|{more}"),
        Err(_) => env_flags,
    };
    Ok(Key::default()
        .with(version.lines().next().unwrap_or_default())
        .with(flags)
        .with(cc)
        .with(env_flags)
        .short())
}

fn recent(name: &str, min: (u32, u32)) -> Option<PathBuf> {
    let program = process::find_program(name)?;
    let text = process::output(Command::new(&program).arg("--version")).ok()?;
    (version(&text)? >= min).then_some(program)
}

/// `cmake version 3.28.3` and `1.11.1` alike.
fn version(text: &str) -> Option<(u32, u32)> {
    let word = text
        .lines()
        .next()?
        .split_whitespace()
        .find(|w| w.starts_with(|c: char| c.is_ascii_digit()))?;
    let mut parts = word.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn installed(cache: &Cache, _lock: &Lock) -> Result<PathBuf> {
    let dir = cache.path("build-tools");
    // The folder appears whole, so that its being there and its programs running is all there is to check.
    let works = |name| {
        in_wheel(&dir, name)
            .is_some_and(|p| process::output(Command::new(p).arg("--version")).is_ok())
    };
    if works("cmake") && works("ninja") {
        return Ok(dir);
    }
    let python = Python::find(cache)?;
    let log = cache.log("build-tools")?;
    let temp = cache.temp_dir()?;
    let install = |requirements: [&str; 2], target: &str| {
        let mut command = python.wheels(&temp.path().join(target));
        command.args(requirements);
        process::logged(&mut command, "installing cmake and ninja", &log, false)
    };
    let mut target = "pinned";
    if install(PINNED, target).is_err() {
        target = "wide";
        install(WIDE, target).context(
            "cannot install cmake and ninja with pip; install them yourself \
             (Debian, Ubuntu: apt-get install cmake ninja-build) or see to pip's network",
        )?;
    }
    temp.publish(target, &dir)?;
    if !works("cmake") || !works("ninja") {
        cache::remove(&dir)?;
        bail!(
            "cmake and ninja were installed with pip but do not run; install them with the system's package manager"
        );
    }
    Ok(dir)
}

/// The real programs, not the Python scripts of the same names beside them: those need the folder on Python's path.
fn in_wheel(dir: &Path, name: &str) -> Option<PathBuf> {
    let places = [
        dir.join(name).join("data/bin").join(name),
        dir.join("bin").join(name),
    ];
    places
        .into_iter()
        .find(|path| process::is_executable(path) && !is_script(path))
}

fn is_script(path: &Path) -> bool {
    use std::io::Read;
    let mut start = [0; 2];
    fs::File::open(path)
        .and_then(|mut f| f.read_exact(&mut start))
        .is_ok()
        && &start == b"#!"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_versions() {
        assert_eq!(
            version("cmake version 3.28.3\n\nCMake suite"),
            Some((3, 28))
        );
        assert_eq!(version("1.11.1.git.kitware"), Some((1, 11)));
        assert_eq!(version("nothing"), None);
    }
}
