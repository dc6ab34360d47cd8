// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask docs`: the book in `docs/`, with the reference made from the header, and no dead link.

mod blocks;
mod links;
mod markdown;
pub mod pages;
mod reference;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use drex_build::{
    cache::{self, Cache},
    cargo,
};

const MDBOOK: &str = "0.5.4";

/// What chapters include from outside of `docs/`.
const INCLUDED: [&str; 2] = ["examples", "bindings"];

pub struct Built {
    /// The first page.
    index: PathBuf,
    /// What was checked: the book, and the Markdown of the checkout.
    pages: links::Checked,
    texts: links::Checked,
    blocks: blocks::Blocks,
}

impl Built {
    /// The folder of the built book.
    pub fn folder(&self) -> &Path {
        self.index.parent().unwrap_or(&self.index)
    }

    pub fn say(&self) {
        for (what, checked) in [("pages", &self.pages), ("Markdown files", &self.texts)] {
            println!(
                "{} {what}, {} links, none dead",
                checked.pages, checked.links
            );
        }
        let blocks = &self.blocks;
        println!(
            "{} blocks of code are compiled as printed, {} of commands are run, {} are parts of the examples, {} are shown",
            blocks.compiled, blocks.run, blocks.included, blocks.shown
        );
    }
}

pub fn build() -> Result<Built> {
    // Without its server and search it takes half a minute to build.
    let less = ["--no-default-features"];
    let mdbook = cargo::tool(&Cache::open()?, "mdbook", MDBOOK, "mdbook", &less)?;
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
    let texts = markdown::check(&repo)?;
    alive(&texts)?;
    markdown::stage(&stage, &repo)?;
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
    alive(&checked)?;
    Ok(Built {
        index: out.join("index.html"),
        pages: checked,
        texts,
        blocks: blocks::count(&repo, &markdown::names(&repo)?)?,
    })
}

fn alive(checked: &links::Checked) -> Result<()> {
    let dead = &checked.dead;
    ensure!(dead.is_empty(), "dead links:\n{}", dead.join("\n"));
    Ok(())
}

pub fn print() -> Result<()> {
    let built = build()?;
    println!("{}", built.index.display());
    built.say();
    Ok(())
}
