// SPDX-License-Identifier: Apache-2.0

//! The files of `--drex-profile` and `--drex-record`: what cannot work is told before the first request, nothing that happens
//! to them later ends a server, and a server that is killed has its profile all the same.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{Suite, Test, generate, greedy, prompt};
use crate::{client::Client, server::Server};

pub const TESTS: fn() -> Vec<Test> = || {
    vec![
        Test::new(
            "files that cannot be read or written are told at start",
            refused_at_start,
        ),
        Test::new(
            "a sleeping server wakes whatever became of its files",
            wakes,
        ),
        Test::new("a server that is killed has its profile", killed),
        Test::new("/metrics goes on while the server sleeps and after", sleeps),
    ]
};

/// A folder of a test's own, gone at its end.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new(name: &str) -> Result<Folder> {
        let path = std::env::temp_dir().join(format!("drex-{name}-{}", std::process::id()));
        fs::create_dir_all(&path)?;
        Ok(Folder(path))
    }

    pub fn path(&self) -> String {
        self.0.to_string_lossy().into_owned()
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).to_string_lossy().into_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn start(suite: &Suite, args: &[&str]) -> Result<Server> {
    suite.start(
        &suite.patched,
        2,
        &[&["--drex-policy", "hold"], args].concat(),
    )
}

fn refused_at_start(suite: &Suite) -> Result<()> {
    let folder = Folder::new("files")?;
    let zeros = folder.file("zeros");
    fs::write(&zeros, vec![0; 2 << 20])?;
    let garbage = folder.file("garbage");
    fs::write(&garbage, "no profile")?;
    let nowhere = folder.file("no/such/folder/file");
    let cases: &[(&str, &str, &str)] = &[
        ("--drex-profile", "/dev/full", "regular file"),
        (
            "--drex-profile",
            &folder.0.to_string_lossy(),
            "regular file",
        ),
        ("--drex-profile", &zeros, "1048576 bytes"),
        ("--drex-profile", &garbage, "profile"),
        ("--drex-profile", &nowhere, "No such file or directory"),
        ("--drex-profile", "/proc/profile", "cannot be written"),
        ("--drex-record", &nowhere, "No such file or directory"),
        ("--drex-record", "/dev/full", "No space left"),
    ];
    for (option, path, text) in cases {
        let begun = Instant::now();
        let Err(error) = start(suite, &[option, path]) else {
            bail!("{option} {path}: the server started");
        };
        let error = format!("{error:#}");
        ensure!(
            error.contains(&format!("{option} {path}"))
                && error.contains(text)
                && !error.contains("signal"),
            "{option} {path}: no '{text}' in: {error}"
        );
        ensure!(
            begun.elapsed() < Duration::from_secs(60),
            "{option} {path}: told after {:?}",
            begun.elapsed()
        );
    }
    ensure!(
        fs::read_dir(&folder.0)?.count() == 2,
        "a server that did not start has left a file"
    );
    Ok(())
}

/// Waits until the server says that it sleeps.
pub fn until_asleep(client: Client) -> Result<()> {
    let begun = Instant::now();
    while client.get("/props")?.ok()?.json()?["is_sleeping"] != true {
        ensure!(
            begun.elapsed() < Duration::from_secs(20),
            "the server does not go to sleep"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn wakes(suite: &Suite) -> Result<()> {
    let folder = Folder::new("wakes")?;
    let other = folder.file("other");
    let server = start(
        suite,
        &["--drex-exit-layers", "8", "--drex-profile", &other],
    )?;
    generate(server.client, &[greedy(&prompt(0), 40)], 1)?;
    server.stop(Duration::from_secs(5))?;
    let other = fs::read(&other).context("a server that ends writes its profile")?;

    type Happens<'a> = &'a dyn Fn(&Path) -> std::io::Result<()>;
    let cases: [(&str, Happens); 4] = [
        ("garbage", &|path| fs::write(path, "no profile")),
        ("another exit set", &|path| fs::write(path, &other)),
        ("a folder", &|path| {
            fs::remove_file(path).and_then(|()| fs::create_dir(path))
        }),
        ("nothing", &|path| fs::remove_file(path)),
    ];
    for (what, happens) in cases {
        let profile = folder.file("profile");
        let record = folder.file("record");
        let flags = [
            "--drex-profile",
            &profile,
            "--drex-record",
            &record,
            "--sleep-idle-seconds",
            "1",
        ];
        let mut server = start(suite, &flags)?;
        generate(server.client, &[greedy(&prompt(0), 40)], 1)?;
        until_asleep(server.client)?;
        happens(Path::new(&profile))?;
        if what == "a folder" {
            fs::remove_file(&record)?;
            fs::create_dir(&record)?;
        }
        let done = generate(server.client, &[greedy(&prompt(1), 40)], 1)?;
        ensure!(
            done[0].tokens.len() == 40,
            "{what}: {} tokens",
            done[0].tokens.len()
        );
        ensure!(server.is_running(), "{what}: the server has ended");
        ensure!(
            server.log().contains("is left out") == (what != "nothing"),
            "{what}: the log does not say that the profile is left out"
        );
        let before = fs::read(&profile).unwrap_or_default();
        server.stop(Duration::from_secs(5))?;
        // A file that is not this server's stays as it is.
        let after = fs::read(&profile).unwrap_or_default();
        ensure!(
            (before == after) == (what != "nothing"),
            "{what}: the profile was written over"
        );
        for path in [&profile, &record] {
            let _ = fs::remove_dir_all(path);
            let _ = fs::remove_file(path);
        }
    }
    Ok(())
}

fn killed(suite: &Suite) -> Result<()> {
    let folder = Folder::new("killed")?;
    let profile = folder.file("profile");
    let server = start(suite, &["--drex-profile", &profile])?;
    let begun = Instant::now();
    while !Path::new(&profile).exists() {
        ensure!(
            begun.elapsed() < Duration::from_secs(40),
            "no profile was written in {:?}",
            begun.elapsed()
        );
        generate(server.client, &[greedy(&prompt(0), 60)], 1)?;
    }
    drop(server); // SIGKILL
    let files: Vec<_> = fs::read_dir(&folder.0)?.collect();
    ensure!(files.len() == 1, "{files:?}");
    start(suite, &["--drex-profile", &profile])?.stop(Duration::from_secs(5))?;
    Ok(())
}

fn sleeps(suite: &Suite) -> Result<()> {
    let server = start(
        suite,
        &["--sleep-idle-seconds", "1", "--drex-threshold", "0.4"],
    )?;
    let families = || -> Result<Vec<String>> {
        let text = server.client.get("/metrics")?.ok()?.text();
        Ok(text
            .lines()
            .filter(|l| l.starts_with("# TYPE drex_"))
            .map(str::to_owned)
            .collect())
    };
    let counters = || -> Result<Vec<f64>> {
        let m = server.client.metrics()?;
        let names = [
            "drex_tokens_total",
            "tokens_predicted_total",
            "drex_exits_total",
            "drex_steps_total",
            "drex_window_seconds_sum",
            "drex_held_seconds_count",
            "drex_graphs_built_total",
        ];
        names
            .into_iter()
            .map(|n| m.get(n).with_context(|| format!("no {n}")))
            .collect()
    };
    generate(server.client, &[greedy(&prompt(0), 40)], 1)?;
    let (awake, before) = (families()?, counters()?);
    for (i, value) in before.iter().enumerate() {
        ensure!(*value > 0.0, "counter {i} is {value}");
    }
    until_asleep(server.client)?;
    ensure!(
        awake.len() > 20 && families()? == awake,
        "{:?} while it sleeps, {awake:?} before",
        families()?
    );
    ensure!(
        counters()? == before,
        "{:?} while it sleeps, {before:?} before",
        counters()?
    );

    generate(server.client, &[greedy(&prompt(1), 40)], 1)?;
    let after = counters()?;
    ensure!(
        after.iter().zip(&before).all(|(a, b)| a > b) && after[0] == 80.0 && after[1] == 80.0,
        "{after:?} after it woke, {before:?} before"
    );
    Ok(())
}

/// The windows that a record tells of.
pub fn windows(path: &str) -> Result<Vec<Value>> {
    let text = fs::read_to_string(path)?;
    let lines = text
        .lines()
        .map(|line| Ok(serde_json::from_str::<Value>(line)?));
    let lines: Vec<Value> = lines.collect::<Result<_>>()?;
    Ok(lines
        .into_iter()
        .filter(|l| l["e"] == json!("step"))
        .collect())
}

/// A file for a record, in the folder of temporary files.
pub fn record_file(name: &str) -> String {
    let path = std::env::temp_dir().join(format!("drex-record-{name}-{}", std::process::id()));
    path.to_string_lossy().into_owned()
}
