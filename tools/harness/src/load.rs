// SPDX-License-Identifier: Apache-2.0
//! A load generator: one thread for all connections, no work on a token but noting when it came. Everything is parsed when
//! the load is over, since the server under test has the same two cores.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    ops::Range,
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::http::{Events, Parser, event_data, request};

/// A finished request.
pub struct Finished {
    /// Its place in the list of requests.
    pub job: usize,
    pub sent: Instant,
    pub ended: Instant,
    pub status: u16,
    body: Vec<u8>,
    events: Vec<(Instant, Range<usize>)>,
}

pub struct Outcome {
    /// In the order in which they ended.
    pub finished: Vec<Finished>,
    /// What the limits cut off in the middle.
    pub cut: Vec<Finished>,
    pub start: Instant,
    /// When a place first stayed empty because no request was left, or none was sent any more: until then the load was what it
    /// should be.
    pub drain: Instant,
    /// What this process itself used of a core, as a share.
    pub client_cpu: f64,
}

/// What a stream of llama-server's own `/completion` with `return_tokens` says.
#[derive(Clone, Default, Debug)]
pub struct Generation {
    pub tokens: Vec<i64>,
    /// When each token came.
    pub times: Vec<Instant>,
    pub text: String,
    /// Exits at all ramps up to and including each token, where the stream has `timings_per_token`.
    pub exits: Vec<u64>,
    /// The last event: timings and the like.
    pub last: Value,
}

struct Connection {
    job: usize,
    socket: TcpStream,
    parser: Parser,
    scanner: Events,
    events: Vec<(Instant, Range<usize>)>,
    sent: Instant,
}

/// When to stop, other than when all is done.
#[derive(Clone, Copy)]
pub struct Limits {
    /// The server said nothing for so long: an error.
    pub silence: Duration,
    /// Send no more requests after that.
    pub send: Duration,
    /// Give up on the requests that are still open.
    pub total: Duration,
}

impl Limits {
    /// Everything is to be answered, however long it takes.
    pub fn silence(silence: Duration) -> Limits {
        Limits {
            silence,
            send: Duration::MAX,
            total: Duration::MAX,
        }
    }
}

/// What a source of requests wants next.
pub enum Next {
    /// Sends a body. The number comes back as `Finished::job`.
    Send(usize, Vec<u8>),
    /// Nothing before this time since the start.
    At(Duration),
    /// Nothing before an answer has come.
    Busy,
    /// Nothing any more.
    End,
}

/// Decides when which request is sent.
pub trait Source {
    /// Asked until it has nothing to send now. `now` is the time since the start.
    fn next(&mut self, now: Duration) -> Result<Next>;
    /// Told of each answer when its first event has come.
    fn began(&mut self, _job: usize) {}
    /// Told of each answer as soon as it is whole.
    fn answered(&mut self, finished: &Finished) -> Result<()>;
}

/// A list of bodies, so many in flight.
struct List<'a> {
    bodies: &'a [Vec<u8>],
    next: usize,
    open: usize,
    concurrency: usize,
}

impl Source for List<'_> {
    fn next(&mut self, _: Duration) -> Result<Next> {
        if self.open >= self.concurrency {
            return Ok(Next::Busy);
        }
        let Some(body) = self.bodies.get(self.next) else {
            // A load that is smaller than the places counts as whole until its first answer.
            let none_came = self.next == self.open && self.open > 0;
            return Ok(if none_came { Next::Busy } else { Next::End });
        };
        self.next += 1;
        self.open += 1;
        Ok(Next::Send(self.next - 1, body.clone()))
    }

    fn answered(&mut self, _: &Finished) -> Result<()> {
        self.open -= 1;
        Ok(())
    }
}

/// Sends all the bodies to `path`, `concurrency` at a time.
pub fn closed_loop(
    addr: SocketAddr,
    path: &str,
    bodies: &[Vec<u8>],
    concurrency: usize,
    limits: Limits,
) -> Result<Outcome> {
    let mut list = List {
        bodies,
        next: 0,
        open: 0,
        concurrency,
    };
    drive(addr, path, &mut list, limits)
}

/// Sends to `path` what a source gives, until it ends and all is answered.
pub fn drive(
    addr: SocketAddr,
    path: &str,
    source: &mut dyn Source,
    limits: Limits,
) -> Result<Outcome> {
    const POLL: Duration = Duration::from_secs(1);
    let start = Instant::now();
    let cpu = cpu_seconds();
    let mut open: Vec<Connection> = Vec::new();
    let mut finished = Vec::new();
    let mut drain = None;
    let mut over = false;
    let mut buffer = vec![0; 1 << 16];
    let mut polls: Vec<libc::pollfd> = Vec::new();
    let mut last_news = Instant::now();
    loop {
        let mut wait = POLL;
        let mut ended = false;
        loop {
            if over {
                ended = true;
                break;
            }
            let late = start.elapsed() > limits.send;
            match source.next(start.elapsed())? {
                // It would be sent now: while nothing would, the load is whole.
                Next::Send(..) if late => over = true,
                Next::Send(job, body) => open.push(connect(addr, path, job, &body)?),
                Next::At(time) => {
                    wait = time.saturating_sub(start.elapsed()).min(POLL);
                    break;
                }
                Next::Busy => break,
                Next::End => {
                    ended = true;
                    break;
                }
            }
        }
        if ended && drain.is_none() {
            drain = Some(Instant::now());
        }
        if ended && open.is_empty() || start.elapsed() > limits.total {
            break;
        }
        polls.clear();
        polls.extend(open.iter().map(|c| libc::pollfd {
            fd: c.socket.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        }));
        // Rounded up: a poll that ends before its time would be asked again and again.
        let timeout = wait.as_micros().div_ceil(1000) as libc::c_int;
        // SAFETY: a list of that many entries, which lives through the call.
        let ready = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout) };
        if ready < 0 {
            let error = std::io::Error::last_os_error();
            if error.kind() != ErrorKind::Interrupted {
                return Err(error).context("poll");
            }
            continue;
        }
        if open.is_empty() {
            last_news = Instant::now();
        }
        if ready == 0 {
            if last_news.elapsed() > limits.silence {
                bail!(
                    "{} requests are open and the server said nothing for {} s",
                    open.len(),
                    limits.silence.as_secs()
                );
            }
            continue;
        }
        last_news = Instant::now();
        // Backwards, so that removing one moves only those that were looked at.
        for index in (0..open.len()).rev() {
            if polls[index].revents == 0 {
                continue;
            }
            let connection = &mut open[index];
            match connection.socket.read(&mut buffer) {
                Ok(0) => connection.parser.close()?,
                Ok(n) => {
                    let now = Instant::now();
                    connection.parser.feed(&buffer[..n])?;
                    let silent = connection.events.is_empty();
                    while let Some(range) = connection.scanner.next(&connection.parser.body) {
                        connection.events.push((now, range));
                    }
                    if silent && !connection.events.is_empty() {
                        source.began(connection.job);
                    }
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(e) => return Err(e).context("reading from the server"),
            }
            if connection.parser.done() {
                let answer = open.swap_remove(index).finish();
                source.answered(&answer)?;
                finished.push(answer);
            }
        }
    }
    let wall = start.elapsed().as_secs_f64();
    let client_cpu = (cpu_seconds() - cpu) / wall.max(1e-9);
    let drain = drain.unwrap_or_else(Instant::now);
    let cut = open.into_iter().map(Connection::finish).collect();
    Ok(Outcome {
        finished,
        cut,
        start,
        drain,
        client_cpu,
    })
}

impl Connection {
    fn finish(self) -> Finished {
        Finished {
            job: self.job,
            sent: self.sent,
            ended: Instant::now(),
            status: self.parser.status,
            body: self.parser.body,
            events: self.events,
        }
    }
}

fn connect(addr: SocketAddr, path: &str, job: usize, body: &[u8]) -> Result<Connection> {
    let sent = Instant::now();
    let mut socket = TcpStream::connect(addr).context("connecting to the server")?;
    socket.set_nodelay(true)?;
    // Requests are small: the socket's buffer takes them whole, so that only reading needs not to block.
    socket.write_all(&request("POST", path, Some(body)))?;
    socket.set_nonblocking(true)?;
    Ok(Connection {
        job,
        socket,
        parser: Parser::new(),
        scanner: Events::default(),
        events: Vec::new(),
        sent,
    })
}

fn cpu_seconds() -> f64 {
    // SAFETY: `rusage` is plain data that the call fills.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

impl Generation {
    /// Whether every token is there: the server leaves those out of a stream that end in the middle of a character.
    pub fn is_complete(&self) -> bool {
        self.last["timings"]["predicted_n"] == self.tokens.len()
    }
}

impl Finished {
    pub fn generation(&self) -> Result<Generation> {
        let out = self.partial()?;
        if out.last["stop"] != true {
            bail!("the stream has no last event");
        }
        Ok(out)
    }

    /// As far as it came.
    pub fn partial(&self) -> Result<Generation> {
        if self.status != 200 && self.status != 0 {
            bail!(
                "HTTP status {}: {}",
                self.status,
                String::from_utf8_lossy(&self.body)
            );
        }
        let mut out = Generation::default();
        for (time, range) in &self.events {
            let Some(data) =
                event_data(&self.body[range.clone()]).filter(|data| *data != b"[DONE]")
            else {
                continue;
            };
            let event: Value =
                serde_json::from_slice(data).context("an event of the stream is not JSON")?;
            if let Some(error) = event.get("error") {
                bail!("the stream ended with an error: {error}");
            }
            if let (Some(exits), false) = (
                event["timings"]["drex_exits"].as_array(),
                event["stop"] == true,
            ) {
                out.exits.push(exits.iter().filter_map(Value::as_u64).sum());
            }
            for token in event["tokens"].as_array().into_iter().flatten() {
                out.tokens.push(token.as_i64().context("not a token")?);
                out.times.push(*time);
            }
            out.text
                .push_str(event["content"].as_str().unwrap_or_default());
            out.last = event;
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// The load is whole until the first answer after the last moment to send.
    #[test]
    fn late_requests_are_not_sent_and_the_open_ones_count() -> Result<()> {
        const TAKES: Duration = Duration::from_millis(200);
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let addr = listener.local_addr()?;
        std::thread::spawn(move || {
            for socket in listener.incoming() {
                std::thread::spawn(move || -> Result<()> {
                    let mut socket = socket?;
                    let _ = socket.read(&mut [0; 4096])?;
                    std::thread::sleep(TAKES);
                    socket.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")?;
                    Ok(())
                });
            }
        });
        let limits = Limits {
            silence: Duration::from_secs(60),
            send: TAKES / 4,
            total: Duration::from_secs(60),
        };
        let bodies = vec![b"{}".to_vec(); 5];
        let outcome = closed_loop(addr, "/", &bodies, 2, limits)?;
        assert_eq!((outcome.finished.len(), outcome.cut.len()), (2, 0));
        assert!(outcome.drain - outcome.start >= TAKES);
        Ok(())
    }
}
