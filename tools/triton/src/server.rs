// SPDX-License-Identifier: Apache-2.0
//! A running Triton Inference Server, and clients that send requests to it.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::Write,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use drex_build::{cache, process};
use drex_harness::{client::Client, metrics::Metrics};
use serde_json::{Value, json};

use crate::setup::{Installed, MODEL};

/// A server, killed when it is dropped and by the kernel when xtask ends.
pub struct Triton {
    child: Child,
    pub http: Client,
    grpc: SocketAddr,
    metrics: Client,
    log: PathBuf,
}

/// How long a value at /metrics may be another one. Generous: clients take seconds to start on a machine that is busy.
const SILENCE: Duration = Duration::from_secs(30);

/// What a server is started with.
pub struct Start<'a> {
    /// The folder that has the folder of the backend.
    pub backends: &'a Path,
    pub repository: &'a Path,
    /// 0: free ones.
    pub port: u16,
    pub args: &'a [&'a str],
    /// A library that comes before all others.
    pub preload: Option<&'a Path>,
}

impl Triton {
    pub fn start(
        installed: &Installed,
        repository: PathBuf,
        port: u16,
        args: &[&str],
    ) -> Result<Triton> {
        Triton::start_with(
            installed,
            &Start {
                backends: &installed.backends,
                repository: &repository,
                port,
                args,
                preload: None,
            },
        )
    }

    pub fn start_with(installed: &Installed, start: &Start) -> Result<Triton> {
        let port = start.port;
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
        let folder = start
            .repository
            .parent()
            .context("a repository has a folder")?;
        let log = folder.join("server.log");
        let file = File::options().create(true).append(true).open(&log)?;
        let mut command = Command::new(&installed.server);
        command
            .arg(joined("--backend-directory=", start.backends))
            .arg(joined("--model-repository=", start.repository))
            .args(["http", "grpc", "metrics"].map(|what| format!("--{what}-address=127.0.0.1")))
            .args([
                format!("--http-port={}", ports[0]),
                format!("--grpc-port={}", ports[1]),
            ])
            .arg(format!("--metrics-port={}", ports[2]))
            .args(["--model-control-mode=explicit", "--load-model=*"])
            .args(start.args)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        if let Some(library) = start.preload {
            command.env("LD_PRELOAD", library);
        }
        let has_metrics = !start.args.contains(&"--allow-metrics=false");
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
        let begin = Instant::now();
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
            if ok(&server.http, "/v2/health/live")
                && (!has_metrics || ok(&server.metrics, "/metrics"))
            {
                return Ok(server);
            }
            ensure!(
                begin.elapsed() < Duration::from_secs(60),
                "tritonserver is not live after 60 s:\n{}",
                server.last_words()?
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn last_words(&self) -> Result<String> {
        Ok(process::tail(&self.log, 200)?.join("\n"))
    }

    pub fn log(&self) -> &Path {
        &self.log
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
        let mut job = json!({"url": self.grpc.to_string(), "http": self.http.addr.to_string(), "model": MODEL,
            "requests": requests});
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
        writeln!(stdin, "{job}")?;
        Ok(Streams { child, stdin })
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
                start.elapsed() < SILENCE,
                "{name} is {value:?} at /metrics after {} s",
                SILENCE.as_secs()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until /metrics has nothing of this name, as after the last model is unloaded.
    pub fn gone(&self, name: &str) -> Result<()> {
        let start = Instant::now();
        while Metrics::parse(&self.metrics()?).get(name).is_some() {
            ensure!(
                start.elapsed() < Duration::from_secs(10),
                "{name} is still at /metrics after 10 s"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    pub fn wait(mut self) -> Result<ExitStatus> {
        Ok(self.child.wait()?)
    }

    /// SIGTERM; the exit status and how long it took. A server that a signal ends, such as abort()'s, is an error.
    pub fn stop(mut self, limit: Duration) -> Result<(ExitStatus, Duration)> {
        // SAFETY: a signal to a child that was not waited for, so that the number is still its own.
        unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGTERM) };
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                let time = start.elapsed();
                ensure!(
                    status.signal().is_none(),
                    "tritonserver ended with {status} {time:?} after SIGTERM:\n{}",
                    self.last_words()?
                );
                return Ok((status, time));
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
pub struct Streams {
    child: Child,
    stdin: ChildStdin,
}

impl Streams {
    pub fn finish(mut self) -> Result<Vec<Value>> {
        drop(self.stdin);
        let mut text = String::new();
        std::io::Read::read_to_string(self.child.stdout.as_mut().context("no stdout")?, &mut text)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "the client failed ({status})");
        serde_json::from_str(&text).context("the client printed no JSON")
    }

    /// For the requests with `cancel_on_line`.
    pub fn cancel(&mut self) -> Result<()> {
        writeln!(self.stdin)?;
        Ok(())
    }

    /// As a client does that crashes.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

fn joined(option: &str, path: &Path) -> OsString {
    let mut text = OsString::from(option);
    text.push(path);
    text
}
