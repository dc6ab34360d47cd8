// SPDX-License-Identifier: Apache-2.0
//! A llama-server as a child process.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use drex_build::{cache, llama::Runtime, process};

use crate::client::Client;

/// Names the program that a server is.
pub trait Program {
    fn program(&self) -> PathBuf;

    /// Variables that the program's environment has besides.
    fn env(&self) -> &[(&'static str, &'static str)] {
        &[]
    }
}

impl Program for PathBuf {
    fn program(&self) -> PathBuf {
        self.clone()
    }
}

impl Program for Runtime {
    fn program(&self) -> PathBuf {
        self.server()
    }

    fn env(&self) -> &[(&'static str, &'static str)] {
        Runtime::env(self)
    }
}

/// Where servers' logs go: the target folder of the clone that this was built in.
fn logs() -> PathBuf {
    cache::repo().join("target/xtask-servers")
}

/// Killed when it is dropped, and by the kernel when xtask ends in whatever way.
///
/// To be started from a thread that lives as long as the server is needed: what the kernel watches is the thread.
pub struct Server {
    child: Child,
    pub client: Client,
    log: PathBuf,
}

impl Server {
    /// Starts a server on a free port and waits until it is healthy.
    pub fn start<I, S>(program: &impl Program, args: I) -> Result<Server>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let (env, program) = (program.env(), program.program());
        let args: Vec<OsString> = args.into_iter().map(|a| a.as_ref().to_owned()).collect();
        // Somebody else may take the port between our looking for it and the server's opening it.
        let mut attempt = 0;
        loop {
            attempt += 1;
            match Server::try_start(&program, env, &args) {
                Err(error) if attempt < 3 && format!("{error:#}").contains("couldn't bind") => {}
                other => return other,
            }
        }
    }

    fn try_start(
        program: &Path,
        env: &[(&'static str, &'static str)],
        args: &[OsString],
    ) -> Result<Server> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let logs = logs();
        fs::create_dir_all(&logs)?;
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let log = logs.join(format!("{}-{count}.log", std::process::id()));
        let file = File::create(&log)?;
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
            .local_addr()?
            .port();
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, port));

        let mut command = Command::new(program);
        command.envs(env.iter().copied()).args(args).args([
            "--host",
            "127.0.0.1",
            "--port",
            &port.to_string(),
        ]);
        process::spin_briefly(&mut command);
        // Settings of somebody's shell must not change what is measured or tested.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("LLAMA_ARG_")
                || text.starts_with("LLAMA_LOG_")
                || text == "LD_LIBRARY_PATH"
            {
                command.env_remove(&name);
            }
        }
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        let parent = std::process::id();
        // SAFETY: between fork and exec only calls that are safe there.
        unsafe {
            command.pre_exec(move || {
                if cfg!(target_os = "linux") {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    // Had the parent ended before that call, no signal would come.
                    if libc::getppid() as u32 != parent {
                        libc::_exit(1);
                    }
                }
                Ok(())
            });
        }
        let child = command
            .spawn()
            .with_context(|| format!("cannot run {}", program.display()))?;
        let mut server = Server {
            child,
            client: Client { addr },
            log,
        };
        server.wait_for_health(Duration::from_secs(120))?;
        Ok(server)
    }

    fn wait_for_health(&mut self, limit: Duration) -> Result<()> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                // A wrong option is followed by its help.
                let last = self.last_lines(32);
                bail!("the server ended at once ({status}); its last lines:\n  {last}");
            }
            let answer = self
                .client
                .call("GET", "/health", None, Duration::from_secs(1));
            if answer.is_ok_and(|answer| answer.status == 200) {
                return Ok(());
            }
            if start.elapsed() > limit {
                let last = self.last_lines(12);
                bail!(
                    "the server is not healthy after {} s; its last lines:\n  {last}",
                    limit.as_secs()
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything that the server printed so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// What the server printed last, for an error's text.
    pub fn last_lines(&self, n: usize) -> String {
        process::tail(&self.log, n).unwrap_or_default().join("\n  ")
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Asks it to end (SIGTERM) and waits; an error if it takes longer than `limit`.
    pub fn stop(mut self, limit: Duration) -> Result<ExitStatus> {
        // SAFETY: a signal to a child that was not waited for, so that the number is still its own.
        unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGTERM) };
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if start.elapsed() > limit {
                bail!(
                    "the server did not end within {} s of SIGTERM",
                    limit.as_secs()
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
