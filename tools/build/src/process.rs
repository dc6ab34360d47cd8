// SPDX-License-Identifier: Apache-2.0
//! Running other programs: with a log file, with progress, and with their last words when they fail.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, IsTerminal, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio, Termination},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// What a tool's `main` does: its work, and a sentence where that fails. A reader that goes away (`cargo xtask demo | head`)
/// ends it quietly, as it does any other filter.
pub fn main<R: Termination>(work: impl FnOnce() -> Result<R>) -> ExitCode {
    // SAFETY: sets a signal's disposition to its default before any thread exists.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    match work() {
        Ok(done) => done.report(),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Standard output of a short command, trimmed.
pub fn output(command: &mut Command) -> Result<String> {
    let out = command
        .output()
        .with_context(|| format!("cannot run {}", describe(command)))?;
    if !out.status.success() {
        bail!(
            "{} failed ({}): {}",
            describe(command),
            out.status,
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

pub fn describe(command: &Command) -> String {
    let program = Path::new(command.get_program())
        .file_name()
        .unwrap_or_default();
    let mut text = program.to_string_lossy().into_owned();
    for arg in command.get_args().take(4) {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
    }
    if command.get_args().len() > 4 {
        text.push_str(" ...");
    }
    text
}

/// Runs a command with both outputs in a log file. `title` is shown, with the progress of ninja's `[n/m]` lines.
pub fn logged(command: &mut Command, title: &str, log: &Path, append: bool) -> Result<()> {
    let mut file = File::options()
        .create(true)
        .write(true)
        .append(append)
        .truncate(!append)
        .open(log)
        .with_context(|| format!("cannot write {}", log.display()))?;
    writeln!(file, "$ {command:?}")?;
    // One channel for both outputs keeps their order. A socket pair, since std's pipe is newer than our oldest Rust.
    let (reader, writer) = UnixStream::pair()?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(OwnedFd::from(writer.try_clone()?))
        .stderr(OwnedFd::from(writer))
        .spawn()
        .with_context(|| format!("cannot run {}", describe(command)))?;
    // The command value keeps copies of the writing end, which would keep the loop below from ever ending.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut progress = Progress::new(title);
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line)? == 0 {
            break;
        }
        file.write_all(&line)?;
        progress.line(String::from_utf8_lossy(&line).trim_end());
    }
    let status = child.wait()?;
    if status.success() {
        progress.finish("done");
        return Ok(());
    }
    progress.finish("FAILED");
    eprintln!("--- the last lines of {}:", log.display());
    for line in tail(log, 30)? {
        eprintln!("{line}");
    }
    eprintln!("---");
    bail!(
        "{title} failed ({status}); the whole log is {}",
        log.display()
    )
}

pub fn tail(path: &Path, n: usize) -> Result<Vec<String>> {
    let text = String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    let lines: Vec<_> = text.lines().collect();
    Ok(lines[lines.len().saturating_sub(n)..]
        .iter()
        .map(|s| (*s).to_owned())
        .collect())
}

/// One line on a terminal, rewritten in place; elsewhere a plain line every half a minute.
pub struct Progress {
    title: String,
    tty: bool,
    start: Instant,
    shown: Option<Instant>,
}

impl Progress {
    pub fn new(title: &str) -> Progress {
        let tty = std::io::stderr().is_terminal();
        if !tty {
            eprintln!("{title} ...");
        }
        let mut progress = Progress {
            title: title.to_owned(),
            tty,
            start: Instant::now(),
            shown: None,
        };
        progress.update("");
        progress
    }

    /// A line of the command's output: worth showing when it is one of ninja's, or as a sign of life.
    fn line(&mut self, line: &str) {
        if let Some((done, total)) = ninja_step(line) {
            let what = line.split_once(']').map_or("", |(_, rest)| rest.trim());
            // The full command line of a step says little; the file's name says where we are.
            let name = what.rsplit('/').next().unwrap_or(what);
            self.update(&format!("{done}/{total}  {name}"));
        }
    }

    pub fn update(&mut self, state: &str) {
        let every = if self.tty {
            Duration::from_millis(100)
        } else {
            Duration::from_secs(30)
        };
        let since = self.shown.unwrap_or(self.start);
        if since.elapsed() < every && !(self.tty && self.shown.is_none()) {
            return;
        }
        self.shown = Some(Instant::now());
        let seconds = self.start.elapsed().as_secs();
        let text = format!("{} {seconds:>4} s  {state}", self.title);
        if self.tty {
            let short: String = text.chars().take(terminal_width() - 1).collect();
            eprint!("\r\x1b[2K{short}");
            let _ = std::io::stderr().flush();
        } else {
            eprintln!("{text}");
        }
    }

    /// A line of its own, which stays.
    pub fn note(&mut self, text: &str) {
        let clear = if self.tty { "\r\x1b[2K" } else { "" };
        eprintln!("{clear}{text}");
    }

    pub fn finish(&mut self, state: &str) {
        let end = if self.tty { "\r\x1b[2K" } else { "" };
        eprintln!(
            "{end}{} {:>4} s  {state}",
            self.title,
            self.start.elapsed().as_secs()
        );
    }
}

fn terminal_width() -> usize {
    // SAFETY: `winsize` is plain data that the call fills.
    let size = unsafe {
        let mut size: libc::winsize = std::mem::zeroed();
        libc::ioctl(libc::STDERR_FILENO, libc::TIOCGWINSZ, &raw mut size);
        size
    };
    if size.ws_col < 20 {
        80
    } else {
        usize::from(size.ws_col)
    }
}

fn ninja_step(line: &str) -> Option<(u32, u32)> {
    let (step, _) = line.strip_prefix('[')?.split_once(']')?;
    let (done, total) = step.split_once('/')?;
    Some((done.parse().ok()?, total.parse().ok()?))
}

/// Lets the threads of a program that computes give up their cores sooner when they wait for each other. GCC's OpenMP spins
/// for as long as a time slice, which with another busy program on the machine (a CI runner's, say) means that a thread
/// spins on the very core that the one it waits for needs: measured with one such program on two cores, llama-server fell
/// from 2000 tokens/s to as few as 4, and with this to 500. Without one it makes no difference.
pub fn spin_briefly(command: &mut Command) -> &mut Command {
    if std::env::var_os("GOMP_SPINCOUNT").is_none() && std::env::var_os("OMP_WAIT_POLICY").is_none()
    {
        command.env("GOMP_SPINCOUNT", "1000");
    }
    command
}

/// The first program of that name on PATH.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| is_executable(file))
}

pub fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_ninja_steps() {
        assert_eq!(
            ninja_step("[12/212] Building CXX object a.o"),
            Some((12, 212))
        );
        assert_eq!(ninja_step("ninja: no work to do."), None);
        assert_eq!(ninja_step("[x] y"), None);
    }
}
