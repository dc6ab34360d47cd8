// SPDX-License-Identifier: Apache-2.0

//! An RPC server on this machine, and a counter of what goes to it and comes back.

use std::{
    fs::File,
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use drex_build::{llama::Runtime, process};

/// Ends when it is dropped.
pub struct Remote {
    child: Child,
    addr: SocketAddr,
    sent: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
}

impl Remote {
    pub fn start(runtime: &Runtime, log: &Path) -> Result<Remote> {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let behind = free.local_addr()?;
        drop(free);
        let log = File::create(log)?;
        let mut command = Command::new(runtime.rpc_server());
        process::spin_briefly(&mut command)
            .envs(runtime.env().iter().copied())
            .args(["-H", "127.0.0.1", "-t", "1", "-p"])
            .arg(behind.port().to_string())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = command.spawn().context("cannot run the RPC server")?;
        let front = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let mut remote = Remote {
            child,
            addr: front.local_addr()?,
            sent: Arc::default(),
            received: Arc::default(),
        };
        let start = Instant::now();
        while TcpStream::connect(behind).is_err() {
            ensure!(
                remote.child.try_wait()?.is_none() && start.elapsed() < Duration::from_secs(20),
                "the RPC server does not listen on {behind}"
            );
            thread::sleep(Duration::from_millis(10));
        }
        let (sent, received) = (remote.sent.clone(), remote.received.clone());
        thread::spawn(move || {
            for stream in front.incoming().flatten() {
                let Ok(server) = TcpStream::connect(behind) else {
                    return;
                };
                forward(&stream, &server, &sent);
                forward(&server, &stream, &received);
            }
        });
        Ok(remote)
    }

    /// For `--rpc`.
    pub fn addr(&self) -> String {
        self.addr.to_string()
    }

    /// Bytes to the server and back since the last call, which count anew.
    pub fn traffic(&self) -> (u64, u64) {
        (
            self.sent.swap(0, Ordering::Relaxed),
            self.received.swap(0, Ordering::Relaxed),
        )
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Copies until one side ends, on a thread of its own.
fn forward(from: &TcpStream, to: &TcpStream, bytes: &Arc<AtomicU64>) {
    let (Ok(mut from), Ok(mut to)) = (from.try_clone(), to.try_clone()) else {
        return;
    };
    let _ = from.set_nodelay(true);
    let bytes = bytes.clone();
    thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            bytes.fetch_add(n as u64, Ordering::Relaxed);
            if to.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
        let _ = from.shutdown(Shutdown::Both);
    });
}
