// SPDX-License-Identifier: Apache-2.0
//! A blocking client: single requests, and event streams that can be dropped (which cancels them).

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{
    http::{Events, Parser, event_data, request},
    metrics::Metrics,
};

/// How long the server may stay silent. Generous: under load on two cores a test must not fail for slowness.
pub const TIMEOUT: Duration = Duration::from_secs(120);

#[derive(Clone, Copy)]
pub struct Client {
    pub addr: SocketAddr,
}

pub struct Response {
    pub status: u16,
    pub body: Vec<u8>,
}

impl Response {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body).with_context(|| format!("not JSON: {}", self.text()))
    }

    /// Fails unless the status is 2xx.
    pub fn ok(self) -> Result<Response> {
        if self.status / 100 != 2 {
            bail!("HTTP status {}: {}", self.status, self.text());
        }
        Ok(self)
    }
}

impl Client {
    fn send(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        timeout: Duration,
    ) -> Result<TcpStream> {
        let body = body.map(serde_json::to_vec).transpose()?;
        let mut stream = TcpStream::connect_timeout(&self.addr, timeout)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        stream.write_all(&request(method, path, body.as_deref()))?;
        Ok(stream)
    }

    pub fn call(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        timeout: Duration,
    ) -> Result<Response> {
        let exchange = || -> Result<Response> {
            let mut stream = self.send(method, path, body, timeout)?;
            let mut parser = Parser::new();
            let mut buffer = [0; 1 << 14];
            while !parser.done() {
                match stream.read(&mut buffer)? {
                    0 => parser.close()?,
                    n => parser.feed(&buffer[..n])?,
                }
            }
            Ok(Response {
                status: parser.status,
                body: parser.body,
            })
        };
        exchange().with_context(|| format!("{method} {path}"))
    }

    pub fn get(&self, path: &str) -> Result<Response> {
        self.call("GET", path, None, TIMEOUT)
    }

    pub fn post(&self, path: &str, body: &Value) -> Result<Response> {
        self.call("POST", path, Some(body), TIMEOUT)
    }

    /// A request that answers with an event stream. Drop it to go away in the middle.
    pub fn stream(&self, path: &str, body: &Value) -> Result<Stream> {
        let socket = self
            .send("POST", path, Some(body), TIMEOUT)
            .with_context(|| format!("POST {path}"))?;
        Ok(Stream {
            socket,
            parser: Parser::new(),
            events: Events::default(),
        })
    }

    /// The token ids of a text as the server would see it in a prompt.
    pub fn tokenize(&self, text: &str) -> Result<Vec<i64>> {
        let body = serde_json::json!({"content": text, "add_special": true});
        let answer = self.post("/tokenize", &body)?.ok()?.json()?;
        answer["tokens"]
            .as_array()
            .context("no tokens")?
            .iter()
            .map(|t| t.as_i64().context("not a token"))
            .collect()
    }

    /// The server's counters, under their names with labels as they stand there.
    pub fn metrics(&self) -> Result<Metrics> {
        Ok(Metrics::parse(&self.get("/metrics")?.ok()?.text()))
    }
}

pub struct Stream {
    socket: TcpStream,
    parser: Parser,
    events: Events,
}

impl Stream {
    fn next_event(&mut self) -> Result<Option<Value>> {
        let mut buffer = [0; 1 << 14];
        loop {
            while self.parser.status / 100 == 2 {
                let Some(range) = self.events.next(&self.parser.body) else {
                    break;
                };
                match event_data(&self.parser.body[range]) {
                    None | Some(b"[DONE]") => {}
                    Some(data) => return Ok(Some(serde_json::from_slice(data)?)),
                }
            }
            if self.parser.done() {
                if self.parser.status / 100 != 2 {
                    bail!(
                        "HTTP status {}: {}",
                        self.parser.status,
                        String::from_utf8_lossy(&self.parser.body)
                    );
                }
                return Ok(None);
            }
            match self.socket.read(&mut buffer)? {
                0 => self.parser.close()?,
                n => self.parser.feed(&buffer[..n])?,
            }
        }
    }
}

impl Iterator for Stream {
    type Item = Result<Value>;

    fn next(&mut self) -> Option<Result<Value>> {
        self.next_event().transpose()
    }
}
