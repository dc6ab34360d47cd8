// SPDX-License-Identifier: Apache-2.0
//! As much of HTTP/1.1 and of server-sent events as a client of one local server needs, made to be fed with whatever
//! arrives: the load generator has one thread for all of its connections, and must leave the cores to the server.

use std::ops::Range;

use anyhow::{Context, Result, bail};

pub fn request(method: &str, path: &str, body: Option<&[u8]>) -> Vec<u8> {
    let mut out = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
    if let Some(body) = body {
        out.push_str(&format!(
            "Content-Type: application/json\r\nContent-Length: {}\r\n",
            body.len()
        ));
    }
    out.push_str("\r\n");
    let mut out = out.into_bytes();
    out.extend(body.unwrap_or_default());
    out
}

enum State {
    Head,
    ChunkSize,
    Chunk(usize),
    /// The line end that follows a chunk's bytes.
    ChunkEnd,
    Trailer,
    Length(usize),
    UntilClose,
    Done,
}

/// Takes a response apart as it arrives.
pub struct Parser {
    state: State,
    pending: Vec<u8>,
    pub status: u16,
    pub body: Vec<u8>,
}

impl Default for Parser {
    fn default() -> Parser {
        Parser::new()
    }
}

impl Parser {
    pub fn new() -> Parser {
        Parser {
            state: State::Head,
            pending: Vec::new(),
            status: 0,
            body: Vec::new(),
        }
    }

    pub fn done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// The connection was closed: fine where that is what ends the body.
    pub fn close(&mut self) -> Result<()> {
        match self.state {
            State::UntilClose | State::Done => {
                self.state = State::Done;
                Ok(())
            }
            _ => bail!("the server closed the connection in the middle of a response"),
        }
    }

    pub fn feed(&mut self, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() {
            match self.state {
                State::Done => bail!("bytes after the end of a response"),
                State::UntilClose => {
                    self.body.extend_from_slice(data);
                    data = &[];
                }
                State::Length(left) | State::Chunk(left) => {
                    let n = left.min(data.len());
                    self.body.extend_from_slice(&data[..n]);
                    data = &data[n..];
                    let chunked = matches!(self.state, State::Chunk(_));
                    self.state = match (chunked, left - n) {
                        (true, 0) => State::ChunkEnd,
                        (true, left) => State::Chunk(left),
                        (false, 0) => State::Done,
                        (false, left) => State::Length(left),
                    };
                }
                State::Head => {
                    // Byte by byte would parse anew for each; a head comes in one or two pieces.
                    let before = self.pending.len();
                    self.pending.extend_from_slice(data);
                    match self.head()? {
                        Some(length) => data = &data[length - before..],
                        None => return Ok(()),
                    }
                }
                State::ChunkSize | State::ChunkEnd | State::Trailer => {
                    let Some(end) = data.iter().position(|b| *b == b'\n') else {
                        self.pending.extend_from_slice(data);
                        if self.pending.len() > 1 << 16 {
                            bail!("a line of a response has no end");
                        }
                        return Ok(());
                    };
                    self.pending.extend_from_slice(&data[..end]);
                    data = &data[end + 1..];
                    self.line()?;
                }
            }
        }
        Ok(())
    }

    fn line(&mut self) -> Result<()> {
        let line = self.pending.strip_suffix(b"\r").unwrap_or(&self.pending);
        self.state = match self.state {
            State::ChunkSize => {
                let text = std::str::from_utf8(line)?
                    .split(';')
                    .next()
                    .unwrap_or_default()
                    .trim();
                match usize::from_str_radix(text, 16)
                    .with_context(|| format!("not a chunk size: {text:?}"))?
                {
                    0 => State::Trailer,
                    n => State::Chunk(n),
                }
            }
            State::ChunkEnd if line.is_empty() => State::ChunkSize,
            State::ChunkEnd => bail!("a chunk is longer than it says"),
            _ if line.is_empty() => State::Done,
            _ => State::Trailer,
        };
        self.pending.clear();
        Ok(())
    }

    /// Parses the head in `pending`; returns its length once it is complete.
    fn head(&mut self) -> Result<Option<usize>> {
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut response = httparse::Response::new(&mut headers);
        let httparse::Status::Complete(length) = response
            .parse(&self.pending)
            .context("not an HTTP response")?
        else {
            return Ok(None);
        };
        self.status = response.code.context("no status")?;
        let mut state = State::UntilClose;
        for header in response.headers.iter() {
            let value = String::from_utf8_lossy(header.value);
            if header.name.eq_ignore_ascii_case("transfer-encoding")
                && value.eq_ignore_ascii_case("chunked")
            {
                state = State::ChunkSize;
                break;
            }
            if header.name.eq_ignore_ascii_case("content-length") {
                let n = value.trim().parse().context("not a content length")?;
                state = if n == 0 {
                    State::Done
                } else {
                    State::Length(n)
                };
            }
        }
        self.state = state;
        self.pending.clear();
        Ok(Some(length))
    }
}

/// Finds the events of an event stream in a body that grows.
#[derive(Default)]
pub struct Events {
    at: usize,
}

impl Events {
    /// The next whole event's bytes.
    pub fn next(&mut self, body: &[u8]) -> Option<Range<usize>> {
        let rest = &body[self.at..];
        let end = rest.windows(2).position(|pair| pair == b"\n\n")?;
        let range = self.at..self.at + end;
        self.at += end + 2;
        Some(range)
    }
}

/// The data of one event, or none for comments (pings).
pub fn event_data(event: &[u8]) -> Option<&[u8]> {
    event
        .split(|b| *b == b'\n')
        .find_map(|line| line.strip_prefix(b"data:"))
        .map(|data| data.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNKED: &[u8] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
        9\r\ndata: 1\n\n\r\n12;x=y\r\ndata: {\"a\":2}\n\n: \n\r\n1\r\n\n\r\n0\r\n\r\n";

    #[test]
    fn any_split_gives_the_same() -> Result<()> {
        for size in 1..CHUNKED.len() {
            let mut parser = Parser::new();
            for part in CHUNKED.chunks(size) {
                assert!(!parser.done());
                parser.feed(part)?;
            }
            assert!(parser.done());
            assert_eq!(parser.status, 200);
            let mut events = Events::default();
            let mut data = Vec::new();
            while let Some(range) = events.next(&parser.body) {
                data.extend(event_data(&parser.body[range]).map(<[u8]>::to_vec));
            }
            assert_eq!(data, [b"1".to_vec(), b"{\"a\":2}".to_vec()]);
        }
        Ok(())
    }

    #[test]
    fn lengths_and_closes() -> Result<()> {
        let mut parser = Parser::new();
        parser.feed(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno")?;
        assert!(parser.done());
        assert_eq!(
            (parser.status, parser.body.as_slice()),
            (404, b"no".as_slice())
        );
        let mut parser = Parser::new();
        parser.feed(b"HTTP/1.1 200 OK\r\n\r\nall")?;
        assert!(!parser.done());
        parser.close()?;
        assert_eq!(parser.body, b"all");
        let mut parser = Parser::new();
        parser.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nall")?;
        assert!(parser.close().is_err());
        Ok(())
    }
}
