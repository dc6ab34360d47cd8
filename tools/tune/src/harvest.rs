// SPDX-License-Identifier: Apache-2.0

//! States of texts, in a folder that a later run goes on with.

use std::{
    ffi::OsString,
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use drex_build::process::Progress;
use fs4::fs_std::FileExt;

use crate::{
    engine::{Engine, Info, Line, input, list},
    states::{ROW_BYTES, States, fnv, layer_file},
};

/// Changes with what the engine makes of a text.
const FORMAT: &str = "2";

/// Tokens of one text at most.
pub const CHUNK: u32 = 512;

pub enum Source {
    /// Questions that the model answers.
    Prompts(Vec<String>),
    /// Texts as they are.
    Lines(Vec<Line>),
}

impl Source {
    fn parts(&self) -> &[String] {
        match self {
            Source::Prompts(all) | Source::Lines(all) => all,
        }
    }

    /// Where texts from `next` on end that are expected to have so many tokens.
    fn enough(&self, next: usize, tokens: usize, mean: usize) -> usize {
        let mut left = tokens;
        let parts = &self.parts()[next..];
        let n = parts.iter().take_while(|part| {
            let more = left > 0;
            left = left.saturating_sub(match self {
                Source::Prompts(_) => mean,
                // Behind the line's number and that of its given tokens.
                Source::Lines(_) => part.split(' ').count().saturating_sub(2),
            });
            more
        });
        next + n.count()
    }
}

pub struct Harvest<'a> {
    engine: &'a Engine,
    source: &'a Source,
    layers: &'a [u32],
    width: usize,
    dir: PathBuf,
    /// Names all that the states depend on.
    pub key: String,
}

impl<'a> Harvest<'a> {
    /// Another model, text or set of layers has a folder of its own below `work`.
    pub fn new(
        engine: &'a Engine,
        info: &Info,
        work: &Path,
        layers: &'a [u32],
        source: &'a Source,
    ) -> Harvest<'a> {
        let kind = match source {
            Source::Prompts(_) => "prompts",
            Source::Lines(_) => "lines",
        };
        let numbers = list(layers);
        let head = [FORMAT, kind, &info.hash, &numbers];
        let all = head
            .into_iter()
            .chain(source.parts().iter().map(String::as_str));
        let key = format!("{:016x}", fingerprint(all));
        Harvest {
            engine,
            source,
            layers,
            width: info.embedding_length as usize,
            dir: work.join(format!("states-{key}")),
            key,
        }
    }

    /// At least so many states, or all that there are, and where each text ends in them.
    pub fn run(&self, tokens: usize, what: &str) -> Result<(States, Vec<usize>)> {
        fs::create_dir_all(&self.dir).with_context(|| format!("making {}", self.dir.display()))?;
        let lock = fs::File::create(self.dir.join("lock"))?;
        ensure!(
            FileExt::try_lock_exclusive(&lock)?,
            "another run harvests into {}",
            self.dir.display()
        );
        let mut done = self.resume()?;
        let mut rows: usize = done.iter().map(|d| d.1).sum();
        let (began, before) = (Instant::now(), rows);
        let mut log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log())?;
        let mut progress = Progress::new(what);
        let parts = self.source.parts();
        // Answers end in another order than they begin in: what was under way when a run was interrupted is left out.
        let mut next = done.iter().map(|d| d.0 + 1).max().unwrap_or(0);
        while rows < tokens && next < parts.len() {
            // As many as may be needed, so that few are run in vain.
            let mean = if done.is_empty() {
                // Of a whole answer: what is missing then is asked for in a second call.
                192
            } else {
                rows.div_ceil(done.len()).max(1)
            };
            let to = self.source.enough(next, tokens - rows, mean);
            let mut on_line = |line: &str| -> Result<()> {
                let (id, n) = line
                    .split_once(' ')
                    .context("the engine's answer is short")?;
                let n: usize = n.parse()?;
                writeln!(log, "{id} {n}")?;
                done.push((id.parse()?, n));
                rows += n;
                let rate = (rows - before) as f64 / began.elapsed().as_secs_f64();
                let left = tokens.saturating_sub(rows) as f64 / rate.max(1e-9);
                progress.update(&format!(
                    "{rows} of {tokens} tokens, {} left",
                    duration(left)
                ));
                Ok(())
            };
            let mut args = self.args();
            match self.source {
                Source::Lines(all) => {
                    let lines = numbered(&all[next..to], next);
                    self.engine
                        .run("harvest", &args, input(&lines), &mut on_line)?;
                }
                Source::Prompts(all) => {
                    let text: String = all[..to].iter().flat_map(|p| [p.as_str(), "\0"]).collect();
                    args.extend(["--skip".into(), next.to_string().into()]);
                    self.engine
                        .run("write", &args, text.into_bytes(), &mut on_line)?;
                }
            }
            next = to;
        }
        progress.finish(&format!("{rows} tokens"));
        let mut states = States::open(&self.dir, self.width)?;
        ensure!(
            states.rows.len() == rows,
            "{} has {} rows, {rows} were expected",
            self.dir.display(),
            states.rows.len()
        );
        let mut ends: Vec<usize> = done
            .iter()
            .scan(0, |sum, d| {
                *sum += d.1;
                Some(*sum)
            })
            .collect();
        // An earlier run may have wanted more.
        let few = ends.iter().position(|&end| end >= tokens);
        ends.truncate(few.map_or(ends.len(), |at| at + 1));
        states.rows.truncate(ends.last().copied().unwrap_or(0));
        Ok((states, ends))
    }

    fn args(&self) -> Vec<OsString> {
        vec![
            "--layers".into(),
            list(self.layers).into(),
            "--chunk".into(),
            CHUNK.to_string().into(),
            "--out".into(),
            self.dir.clone().into(),
        ]
    }

    /// Names the texts that are done, and how many rows each has.
    fn log(&self) -> PathBuf {
        self.dir.join("done.txt")
    }

    /// What is there already. Rows of texts that were cut short are taken off.
    fn resume(&self) -> Result<Vec<(usize, usize)>> {
        let text = fs::read_to_string(self.log()).unwrap_or_default();
        let mut done = Vec::new();
        // A line that was cut short has no end.
        for line in text
            .split_inclusive('\n')
            .filter_map(|l| l.strip_suffix('\n'))
        {
            let (id, n) = line
                .split_once(' ')
                .with_context(|| format!("{} has the line {line:?}", self.log().display()))?;
            done.push((id.parse()?, n.parse()?));
        }
        if !text.is_empty() && !text.ends_with('\n') {
            let whole = text.rfind('\n').map_or(0, |at| at + 1);
            fs::write(self.log(), &text[..whole])?;
        }
        let rows: usize = done.iter().map(|d: &(usize, usize)| d.1).sum();
        let mut files = vec![("rows.bin".to_owned(), ROW_BYTES)];
        files.push(("final.f16".into(), 2 * self.width));
        files.extend(self.layers.iter().map(|&l| (layer_file(l), 2 * self.width)));
        for (name, row) in files {
            let path = self.dir.join(&name);
            let Ok(file) = fs::OpenOptions::new().write(true).open(&path) else {
                ensure!(rows == 0, "{} is missing", path.display());
                continue;
            };
            let (has, need) = (file.metadata()?.len(), (rows * row) as u64);
            ensure!(
                has >= need,
                "{} has {has} bytes, {need} were expected",
                path.display()
            );
            file.set_len(need)?;
        }
        Ok(done)
    }
}

/// The lines with other numbers, from `first` on.
fn numbered(lines: &[Line], first: usize) -> Vec<Line> {
    let tokens = lines.iter().filter_map(|l| l.split_once(' '));
    tokens
        .zip(first..)
        .map(|((_, rest), i)| format!("{i} {rest}"))
        .collect()
}

/// Of texts, each with its end.
fn fingerprint<'a>(parts: impl Iterator<Item = &'a str>) -> u64 {
    fnv(parts.flat_map(|p| p.bytes().chain([0])))
}

pub fn duration(seconds: f64) -> String {
    match seconds {
        s if !s.is_finite() => "?".into(),
        s if s < 90.0 => format!("{s:.0} s"),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_have_ends() {
        assert_ne!(
            fingerprint(["a", "b"].into_iter()),
            fingerprint(["ab"].into_iter())
        );
        assert_ne!(
            fingerprint(["a", ""].into_iter()),
            fingerprint(["a"].into_iter())
        );
    }

    #[test]
    fn as_many_texts_as_there_are_tokens_wanted() {
        let lines = Source::Lines(["0 1 5 6 7", "1 1 5 6", "2 1 5"].map(String::from).into());
        assert_eq!(lines.enough(0, 3, 100), 1);
        assert_eq!(lines.enough(0, 4, 100), 2);
        assert_eq!(lines.enough(1, 9, 100), 3);
        let prompts = Source::Prompts(vec!["a".into(); 9]);
        assert_eq!(prompts.enough(2, 250, 100), 5);
    }

    #[test]
    fn lines_are_numbered_anew() {
        let lines = ["7 1 5 6".to_owned(), "3 2 8 9".to_owned()];
        assert_eq!(numbered(&lines, 4), ["4 1 5 6", "5 2 8 9"]);
    }

    #[test]
    fn times_are_rounded() {
        assert_eq!(duration(89.0), "89 s");
        assert_eq!(duration(600.0), "10 min");
        assert_eq!(duration(7200.0), "2.0 h");
        assert_eq!(duration(f64::INFINITY), "?");
    }
}
