// SPDX-License-Identifier: Apache-2.0
//! From the bytes of tokens to text that can be sent: whole characters only, and nothing of a stop string.

/// Holds back what may still become part of a character or of a stop string.
pub struct Text {
    stops: Vec<Vec<u8>>,
    /// What stopped it is part of the text.
    include: bool,
    waiting: Vec<u8>,
    stopped: bool,
}

impl Text {
    /// Empty stop strings are ignored: they would end every answer before its start.
    pub fn new(stops: &[String], include: bool) -> Self {
        let stops = stops
            .iter()
            .filter(|s| !s.is_empty())
            .map(|s| s.clone().into_bytes())
            .collect();
        Self {
            stops,
            include,
            waiting: Vec::new(),
            stopped: false,
        }
    }

    /// Whether a stop string was found; what follows it is dropped.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Adds a token's bytes; gives the text that is certain.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        if self.stopped {
            return String::new();
        }
        self.waiting.extend_from_slice(bytes);
        let found = self
            .stops
            .iter()
            .filter_map(|stop| {
                let at = self.waiting.windows(stop.len()).position(|w| w == stop)?;
                Some((at, stop.len()))
            })
            .min();
        if let Some((at, length)) = found {
            self.stopped = true;
            self.waiting
                .truncate(at + if self.include { length } else { 0 });
            return self.finish();
        }
        let held = self
            .stops
            .iter()
            .map(|stop| overlap(&self.waiting, stop))
            .max()
            .unwrap_or(0);
        let ready = self.waiting.len() - held.max(incomplete(&self.waiting));
        let text: Vec<u8> = self.waiting.drain(..ready).collect();
        String::from_utf8_lossy(&text).into_owned()
    }

    /// The rest, at the end. A character that is cut off becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.waiting)).into_owned()
    }
}

/// Bytes at the end of `text` that a stop string could begin with.
fn overlap(text: &[u8], stop: &[u8]) -> usize {
    (1..stop.len().min(text.len() + 1))
        .rev()
        .find(|&n| text.ends_with(&stop[..n]))
        .unwrap_or(0)
}

/// Bytes at the end of `text` that begin a character and lack its rest.
fn incomplete(text: &[u8]) -> usize {
    for back in 1..=text.len().min(3) {
        let tail = &text[text.len() - back..];
        if tail[0] & 0xc0 != 0x80 {
            let cut = std::str::from_utf8(tail)
                .is_err_and(|error| error.error_len().is_none() && error.valid_up_to() == 0);
            return if cut { back } else { 0 };
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&[u8]]) -> (Vec<String>, bool) {
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let mut text = Text::new(&stops, false);
        let mut out: Vec<String> = pieces.iter().map(|piece| text.push(piece)).collect();
        out.push(text.finish());
        (out, text.stopped())
    }

    #[test]
    fn characters_are_sent_whole() {
        let (out, _) = run(
            &[],
            &[
                "a€".as_bytes().split_at(2).0,
                "€".as_bytes().split_at(1).1,
                b"b",
            ],
        );
        assert_eq!(out, ["a", "€", "b", ""]);
        assert_eq!(run(&[], &[b"\xf0\x9f"]).0, ["", "\u{fffd}"]);
        assert_eq!(run(&[], &[b"\xff", b"x"]).0, ["\u{fffd}", "x", ""]);
    }

    #[test]
    fn stop_strings_across_tokens() {
        assert_eq!(
            run(&["END"], &[b"aE", b"N", b"Db"]),
            (vec!["a".into(), "".into(), "".into(), "".into()], true)
        );
        assert_eq!(
            run(&["END"], &[b"aE", b"N", b"X"]),
            (vec!["a".into(), "".into(), "ENX".into(), "".into()], false)
        );
        assert_eq!(run(&["cd", "b"], &[b"abcd"]).0[0], "a");
        assert_eq!(run(&[""], &[b"a"]), (vec!["a".into(), "".into()], false));
    }

    #[test]
    fn a_stop_string_can_be_part_of_the_text() {
        let mut text = Text::new(&["END".into(), "ENDING".into()], true);
        assert_eq!(text.push(b"aEN") + &text.push(b"Db"), "aEND");
        assert!(text.stopped());
    }

    #[test]
    fn any_cutting_gives_the_same_text() {
        let whole = "xé€😀 stosto stop rest".as_bytes();
        for size in 1..whole.len() {
            let pieces: Vec<&[u8]> = whole.chunks(size).collect();
            let (out, stopped) = run(&["stop"], &pieces);
            assert_eq!(
                (out.concat().as_str(), stopped),
                ("xé€😀 stosto ", true),
                "{size}"
            );
        }
    }
}
