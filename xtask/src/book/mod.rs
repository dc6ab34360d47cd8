//! `cargo xtask docs`: the book in `docs/`, with the reference made from the header, and no dead link.

mod links;
mod reference;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::{
    cache::{self, Cache},
    cargo, process,
};

const MDBOOK: &str = "0.5.4";

/// What chapters include from outside of `docs/`.
const INCLUDED: [&str; 2] = ["examples", "bindings/python"];

/// Builds the book and returns its first page, and what was checked.
pub fn build() -> Result<(PathBuf, links::Checked)> {
    let mdbook = mdbook(&Cache::open()?)?;
    let repo = cache::repo();
    let stage = repo.join("target/book-source");
    cache::remove(&stage)?;
    // A copy, since mdBook wants its chapters as files, and some are made here.
    for folder in ["docs"].iter().chain(&INCLUDED) {
        let from = repo.join(folder);
        for name in cache::files(&from, &|p| p.ends_with("__pycache__"))? {
            let to = stage.join(folder).join(&name);
            fs::create_dir_all(to.parent().context("no parent")?)?;
            fs::copy(from.join(&name), to)?;
        }
    }
    let header = fs::read_to_string(repo.join("include/drex.h"))?;
    for (name, text) in reference::pages(&header)? {
        let path = stage.join("docs/reference").join(name);
        fs::create_dir_all(path.parent().context("no parent")?)?;
        fs::write(path, text)?;
    }
    let out = repo.join("target/book");
    cache::remove(&out)?;
    let mut command = Command::new(&mdbook);
    command
        .arg("build")
        .arg(stage.join("docs"))
        .arg("-d")
        .arg(&out);
    let built = command.output().context("cannot run mdbook")?;
    let said = String::from_utf8_lossy(&built.stderr);
    // A missing file to include is only a warning to it.
    ensure!(
        built.status.success() && !said.contains("ERROR") && !said.contains("WARN"),
        "mdbook: {said}"
    );
    let checked = links::check(&out)?;
    ensure!(
        checked.dead.is_empty(),
        "dead links:\n{}",
        checked.dead.join("\n")
    );
    Ok((out.join("index.html"), checked))
}

pub fn print() -> Result<()> {
    let (index, checked) = build()?;
    println!("{}", index.display());
    println!(
        "{} pages, {} links, none dead",
        checked.pages, checked.links
    );
    Ok(())
}

/// mdBook, built once into the cache: a debug build without its server and search takes half a minute.
fn mdbook(cache: &Cache) -> Result<PathBuf> {
    let dir = cache.path(format!("mdbook-{MDBOOK}"));
    let program = dir.join("bin/mdbook");
    let works = |program: &Path| process::output(Command::new(program).arg("--version")).is_ok();
    if works(&program) {
        return Ok(program);
    }
    let _lock = cache.lock()?;
    if works(&program) {
        return Ok(program);
    }
    let temp = cache.temp_dir()?;
    let mut command = cargo::cargo();
    command
        .args(["install", "mdbook", "--version", MDBOOK, "--locked"])
        .args(["--no-default-features", "--debug", "--root"])
        .arg(temp.path().join("root"))
        .arg("--target-dir")
        .arg(temp.path().join("target"))
        // Outside of this workspace and its settings.
        .current_dir(temp.path());
    let log = cache.log("mdbook")?;
    process::logged(&mut command, "building mdBook", &log, false)?;
    temp.publish("root", &dir)?;
    ensure!(works(&program), "mdBook was built but does not run");
    Ok(program)
}
