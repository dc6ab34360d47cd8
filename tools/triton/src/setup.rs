// SPDX-License-Identifier: Apache-2.0
//! Gets the server and its client, lays out backend and model repository.

use std::{
    ffi::OsString,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result, ensure};
use drex_build::{
    cache::{self, Cache},
    cargo::{cargo, target_dir},
    fetch::Python,
    llama::Runtime,
    process,
    tools::Tools,
};

/// A file of the package index that is taken only as the one that drex was tested with.
struct Wheel {
    requirement: &'static str,
    file: &'static str,
    sha256: &'static str,
    title: &'static str,
}

/// Carries tritonserver 2.51.0 for a CPU.
const SERVER: Wheel = Wheel {
    requirement: "nvidia-pytriton==0.7.0",
    file: "nvidia_pytriton-0.7.0-py3-none-manylinux_2_35_x86_64.whl",
    sha256: "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df",
    title: "fetching Triton Inference Server (55 MB)",
};
/// What it needs besides is for pip to choose, since that depends on the version of Python.
const CLIENT: Wheel = Wheel {
    requirement: "tritonclient==2.73.0",
    file: "tritonclient-2.73.0-py3-none-any.whl",
    sha256: "1f5cec19b0568e037ec4d716ae702984b3ab93e35f72b8f72c5135374dd2be9a",
    title: "fetching Triton's Python client",
};
pub const MODEL: &str = "early_exit";

/// What names the server among packages.
pub fn server_pins() -> [&'static str; 2] {
    [SERVER.requirement, SERVER.sha256]
}

/// Everything that it takes to start a server.
pub struct Installed {
    pub server: PathBuf,
    pub client: PathBuf,
    /// The folder that has the folder of the backend.
    pub backends: PathBuf,
    pub python: Python,
    /// For model repositories; goes when this does.
    dir: tempdir::Dir,
    count: AtomicU32,
}

mod tempdir {
    use std::path::PathBuf;

    pub struct Dir(pub PathBuf);
    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

pub fn install(cache: &Cache, runtime: &Runtime) -> Result<Installed> {
    let python = Python::find(cache)?;
    let server = server(cache, &python)?;
    let client = client(cache, &python)?;
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let folder = target_dir()?.join("xtask-triton");
    sweep(&folder)?;
    let dir = folder.join(format!(
        "{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    ));
    fs::create_dir_all(&dir)?;
    let dir = tempdir::Dir(dir);
    let backends = dir.0.join("backends");
    backend(cache, runtime, &backends.join("drex"))?;
    Ok(Installed {
        server,
        client,
        backends,
        python,
        dir,
        count: AtomicU32::new(0),
    })
}

/// Removes what processes left that were ended before they could: their numbers are no process any more.
fn sweep(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let pid = name.split('-').next().unwrap_or_default();
        if pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists() {
            cache::remove(&path)?;
        }
    }
    Ok(())
}

impl Wheel {
    /// Into `dl` of the folder.
    fn fetch(&self, cache: &Cache, python: &Python, dir: &Path, log: &str) -> Result<PathBuf> {
        let mut command = python.pip();
        command
            .args([
                "download",
                "--no-deps",
                "--progress-bar",
                "off",
                "--only-binary",
                ":all:",
                "-d",
            ])
            .arg(dir.join("dl"))
            .arg(self.requirement);
        process::logged(&mut command, self.title, &cache.log(log)?, false).with_context(|| {
            format!(
                "cannot fetch {}; it is made for x86_64 Linux with glibc 2.35 or newer",
                self.file
            )
        })?;
        let wheel = dir.join("dl").join(self.file);
        let sum = cache::sha256_file(&wheel)?;
        ensure!(
            sum == self.sha256,
            "{} is not the file that drex was tested with:\n  sha256 expected {}\n  sha256 got      {sum}",
            self.file,
            self.sha256
        );
        Ok(wheel)
    }
}

fn server(cache: &Cache, python: &Python) -> Result<PathBuf> {
    let dir = cache.path(format!("triton-{}", &SERVER.sha256[..12]));
    let program = dir.join("pytriton/tritonserver/bin/tritonserver");
    let lock = cache.lock()?;
    if process::is_executable(&program) {
        return Ok(program);
    }
    let temp = cache.temp_dir()?;
    let wheel = SERVER.fetch(cache, python, temp.path(), "triton")?;
    let mut unpack = python.command();
    unpack
        .args(["-m", "zipfile", "-e"])
        .arg(&wheel)
        .arg(temp.path().join("server"));
    process::output(&mut unpack)?;
    let made = temp
        .path()
        .join("server/pytriton/tritonserver/bin/tritonserver");
    fs::set_permissions(&made, fs::Permissions::from_mode(0o755))?;
    cache::remove(&dir)?;
    temp.publish("server", &dir)?;
    drop(lock);
    Ok(program)
}

fn client(cache: &Cache, python: &Python) -> Result<PathBuf> {
    let dir = cache.path(format!("tritonclient-{}", &CLIENT.sha256[..12]));
    let _lock = cache.lock()?;
    if dir.join("tritonclient").is_dir() {
        return Ok(dir);
    }
    let temp = cache.temp_dir()?;
    let mut wheel = CLIENT
        .fetch(cache, python, temp.path(), "tritonclient")?
        .into_os_string();
    wheel.push("[grpc,http]");
    let mut command = python.pip();
    command
        .args(["install", "--progress-bar", "off", "--target"])
        .arg(temp.path().join("client"))
        .arg(wheel);
    process::logged(
        &mut command,
        "installing it and what it needs",
        &cache.log("tritonclient")?,
        true,
    )?;
    temp.publish("client", &dir)?;
    Ok(dir)
}

/// What the C functions over llama.cpp are made of.
const SHIM: [&str; 2] = [
    "integration/triton/shim/drex_llama.cpp",
    "integration/llama.cpp/tree/common/drex-exits.cpp",
];

/// The backend's folder as a user would lay it out: our library, the C functions over llama.cpp, and llama.cpp.
pub fn backend(cache: &Cache, runtime: &Runtime, dir: &Path) -> Result<()> {
    let mut build = cargo();
    build.args(["build", "--release", "--package", "drex-triton"]);
    ensure!(
        build.status().context("cannot run cargo")?.success(),
        "the backend does not build"
    );
    fs::create_dir_all(dir)?;
    for entry in fs::read_dir(&runtime.dir)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        // Under the names that the libraries need each other by; links are followed.
        let soname = name.ends_with(".so.0");
        if soname && (name.starts_with("libggml") || name == "libllama.so.0") {
            cache::copy_if_different(&path.canonicalize()?, &dir.join(&name))?;
        }
    }
    let library = "libtriton_drex.so";
    cache::copy_if_different(
        &target_dir()?.join("release").join(library),
        &dir.join(library),
    )?;
    let lock = cache.lock()?;
    let tools = Tools::find(cache, &lock)?;
    drop(lock);
    let mut rpath_link = OsString::from("-Wl,-rpath-link,");
    rpath_link.push(&runtime.dir);
    let mut command = Command::new(&tools.cxx);
    command
        .args([
            "-std=c++17",
            "-O2",
            "-Wall",
            "-shared",
            "-fPIC",
            "-fvisibility=hidden",
        ])
        .args(SHIM.map(|source| cache::repo().join(source)))
        .arg("-I")
        .arg(runtime.dir.join("include"))
        .arg("-I")
        .arg(cache::repo().join("integration/llama.cpp/tree/common"))
        .arg("-I")
        .arg(cache::repo().join("include"))
        .arg("-L")
        .arg(&runtime.dir)
        .args(["-lllama", "-lggml", "-lggml-base"])
        .arg(rpath_link)
        .args(["-Wl,-rpath,$ORIGIN", "-o"])
        .arg(dir.join("libdrex_llama.so.new"));
    process::logged(
        &mut command,
        "compiling drex_llama.cpp",
        &cache.log("triton-shim")?,
        false,
    )?;
    // Not written in place: a server may have the old one mapped.
    fs::rename(
        dir.join("libdrex_llama.so.new"),
        dir.join("libdrex_llama.so"),
    )?;
    Ok(())
}

/// Backend and an example model in a folder of the user's, which needs nothing of this clone or the cache from then on.
pub fn install_to(cache: &Cache, runtime: &Runtime, dir: &Path) -> Result<()> {
    backend(cache, runtime, &dir.join("backends/drex"))?;
    let version = dir.join("models").join(MODEL).join("1");
    fs::create_dir_all(&version)?;
    cache::copy_if_different(&cache::bundled_model()?, &version.join("model.gguf"))?;
    let config = version.join("../config.pbtxt");
    if !config.exists() {
        // What the user made of it stays.
        fs::write(config, "backend: \"drex\"\n")?;
    }
    Ok(())
}

impl Installed {
    /// A folder that goes when this does.
    pub fn scratch(&self) -> &Path {
        &self.dir.0
    }

    /// A new repository with the bundled model; `parameters` are those of config.pbtxt.
    pub fn repository(&self, parameters: &[(&str, &str)]) -> Result<PathBuf> {
        self.repository_of(&cache::bundled_model()?, parameters)
    }

    /// The same with another model.
    pub fn repository_of(&self, file: &Path, parameters: &[(&str, &str)]) -> Result<PathBuf> {
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        let dir = self.dir.0.join(format!("models-{count}"));
        self.model_of(file, &dir, MODEL, "", parameters)?;
        Ok(dir)
    }

    /// Adds a model to a repository.
    pub fn model(
        &self,
        repository: &Path,
        name: &str,
        more: &str,
        parameters: &[(&str, &str)],
    ) -> Result<()> {
        self.model_of(&cache::bundled_model()?, repository, name, more, parameters)
    }

    fn model_of(
        &self,
        model: &Path,
        repository: &Path,
        name: &str,
        more: &str,
        parameters: &[(&str, &str)],
    ) -> Result<()> {
        let version = repository.join(name).join("1");
        fs::create_dir_all(&version)?;
        let file = version.join("model.gguf");
        if !file.exists() {
            std::os::unix::fs::symlink(model, file)?;
        }
        let mut text = format!("backend: \"drex\"\n{more}");
        for (name, value) in parameters {
            text += &format!(
                "parameters {{ key: \"{name}\" value {{ string_value: \"{value}\" }} }}\n"
            );
        }
        fs::write(repository.join(name).join("config.pbtxt"), text)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_processes_that_are_gone_are_removed() {
        let temp = cache::TempDir::unlocked("triton-sweep").unwrap();
        let mut child = Command::new("true").spawn().unwrap();
        let gone = temp.path().join(format!("{}-0", child.id()));
        child.wait().unwrap();
        let own = temp.path().join(format!("{}-0", std::process::id()));
        let other = temp.path().join("notes");
        for dir in [&gone, &own, &other] {
            fs::create_dir_all(dir.join("models")).unwrap();
        }
        sweep(temp.path()).unwrap();
        assert!(!gone.exists() && own.exists() && other.exists());
        sweep(&temp.path().join("nowhere")).unwrap();
    }
}
