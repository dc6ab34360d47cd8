// SPDX-License-Identifier: Apache-2.0

//! What the guides say, done as they say it: their blocks are run as they stand.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use drex_build::{
    cache::{self, repo},
    install,
};

use crate::{
    kit::Kit,
    programs::{CPP17, FRAGMENTS, HOST, MINIMAL, SKELETON, SMOKE, VERIFY},
};

/// The commands that a guide gives for a way of using drex.
pub fn block(page: &str, way: &str) -> Result<String> {
    block_in("sh", page, way)
}

fn block_in(language: &str, page: &str, way: &str) -> Result<String> {
    let text = fs::read_to_string(repo().join(page))?;
    let (_, rest) = text
        .split_once(&format!("<!-- consumer: {way} -->\n```{language}\n"))
        .with_context(|| format!("{page} says nothing on {way}"))?;
    let (script, _) = rest.split_once("```").context("a block without an end")?;
    Ok(script.to_owned())
}

/// A block of the install guide, in a copy of a consumer's folder with a prefix; every program in it must speak.
pub fn follow(kit: &Kit, way: &str, projects: &[&str], prefix: &Path) -> Result<PathBuf> {
    follow_with(kit, way, projects, &mut |sh| {
        sh.env("PREFIX", prefix);
    })
}

/// The same with whatever environment; returns the folder.
pub fn follow_with(
    kit: &Kit,
    way: &str,
    projects: &[&str],
    prepare: &mut dyn FnMut(&mut Command),
) -> Result<PathBuf> {
    let script = block("docs/install.md", way)?;
    let dir = kit.scratch(&format!("guide-{way}"))?;
    for project in projects {
        for entry in fs::read_dir(repo().join("tests/consumers").join(project))? {
            let entry = entry?;
            fs::copy(entry.path(), dir.join(entry.file_name()))?;
        }
    }
    fs::copy(repo().join(SMOKE.source), dir.join("main.c"))?;
    fs::copy(repo().join(CPP17.source), dir.join("main.cpp"))?;
    let mut sh = kit.command("sh");
    sh.args(["-euc", &script]).current_dir(&dir);
    prepare(&mut sh);
    let text = kit.succeed(&mut sh)?;
    let runs = script
        .lines()
        .filter(|l| l.split(' ').any(|word| word.starts_with("./")))
        .count();
    let (c, cpp) = (SMOKE.says(&kit.version), CPP17.says(&kit.version));
    let spoken = text
        .lines()
        .filter(|l| l.starts_with(&c) || l.starts_with(&cpp))
        .count();
    ensure!(
        runs > 0 && spoken == runs,
        "{runs} programs were to run, {spoken} said what they should:\n{text}"
    );
    let n = u32::try_from(runs)?;
    kit.count(n, n, 0);
    Ok(dir)
}

/// A block that is for the checkout, with the user's own Rust.
pub fn in_checkout(
    kit: &Kit,
    script: &str,
    prepare: &mut dyn FnMut(&mut Command),
) -> Result<String> {
    let mut sh = Command::new("sh");
    sh.args(["-euc", script]).current_dir(repo());
    // As in a shell of its own: cargo has put its variables into ours.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let own = ["CARGO_HOME", "CARGO_NET_OFFLINE"].contains(&text.as_ref());
        if text == "CARGO" || text.starts_with("CARGO_") && !own || text == "LD_LIBRARY_PATH" {
            sh.env_remove(name);
        }
    }
    prepare(&mut sh);
    kit.succeed(&mut sh)
}

pub fn make_pkgconfig(kit: &Kit) -> Result<()> {
    follow(kit, "make-pkgconfig", &["make-pkgconfig"], &kit.prefix)?;
    let version = kit.succeed(
        kit.command("pkg-config")
            .env("PKG_CONFIG_PATH", kit.lib().join("pkgconfig"))
            .args(["--modversion", "drex"]),
    )?;
    ensure!(version.trim() == kit.version, "drex.pc says {version}");
    Ok(())
}

pub fn cmake(kit: &Kit) -> Result<()> {
    follow(kit, "cmake", &["cmake"], &kit.prefix).map(drop)
}

pub fn plain_cc(kit: &Kit) -> Result<()> {
    follow(kit, "plain-cc", &[], &kit.prefix).map(drop)
}

pub fn static_library(kit: &Kit) -> Result<()> {
    let exe = follow(kit, "static", &[], &kit.prefix)?.join("main");
    let needs = kit.succeed(kit.command("readelf").arg("-dW").arg(exe))?;
    ensure!(!needs.contains("libdrex"), "{needs}");
    Ok(())
}

/// Where checkout and tree have names that shells take apart.
pub fn build_tree(kit: &Kit) -> Result<()> {
    let checkout = kit.scratch("a check out")?;
    for (name, from) in install::headers()? {
        let to = checkout
            .join(from.strip_prefix(repo())?.parent().context("no folder")?)
            .join(name.file_name().context("no name")?);
        cache::copy_if_different(&from, &to)?;
    }
    let tree = checkout.join("target/drex/tree");
    install::tree_at(&kit.libraries, &checkout, &tree)?;
    follow_with(kit, "build-tree", &["cmake", "make-pkgconfig"], &mut |sh| {
        sh.env("BUILD_TREE", &tree);
    })
    .map(drop)
}

/// The commands in a comment at the top of a program.
fn head(source: &str) -> Result<String> {
    let text = fs::read_to_string(repo().join(source))?;
    let comment = text.lines().take_while(|l| !l.starts_with("#include"));
    let commands: Vec<&str> = comment
        .filter_map(|l| l.strip_prefix(" *   ").or_else(|| l.strip_prefix("//   ")))
        .collect();
    ensure!(commands.len() >= 3, "{source} begins with {commands:?}");
    Ok(commands.join("\n"))
}

pub fn examples(kit: &Kit) -> Result<()> {
    let minimal = MINIMAL.says(&kit.version);
    let host = "48 tokens, ";
    let verify = VERIFY.says(&kit.version);
    for (whose, script, words) in [
        (
            "docs/port.md",
            block("docs/port.md", "examples")?,
            &[minimal.as_str(), host][..],
        ),
        (MINIMAL.source, head(MINIMAL.source)?, &[minimal.as_str()]),
        (VERIFY.source, head(VERIFY.source)?, &[verify.as_str()]),
        (
            HOST.source,
            head(HOST.source)?,
            &["96 tokens, ", "request 1: 48 tokens"],
        ),
    ] {
        let text = in_checkout(kit, &script, &mut |_| ())?;
        for said in words {
            ensure!(text.contains(said), "{whose}: no \"{said}\" in\n{text}");
        }
        let n = u32::try_from(script.matches("-std=").count())?;
        kit.count(n, n, 0);
    }
    Ok(())
}

/// The program of the bindings' page as printed, and what it prints.
pub fn skeleton(kit: &Kit) -> Result<()> {
    let dir = kit.scratch("skeleton")?;
    let prints = block_in("text", "bindings/README.md", "skeleton-prints")?;
    for way in ["skeleton", "callables"] {
        let code = block_in("cpp", "bindings/README.md", way)?;
        fs::write(dir.join(format!("{way}.inc")), code)?;
    }
    let include = format!("-I{}", dir.display());
    for (compiler, more) in [
        ("g++", &["-fno-exceptions", "-fno-rtti"][..]),
        ("clang++", &["-g", "-fsanitize=address,undefined"]),
    ] {
        let flags = [&["-std=c++17", &include], more].concat();
        let exe = kit.compile(compiler, &flags, SKELETON)?;
        kit.run(&[], &exe, SKELETON)?;
        let text = kit.succeed(kit.command(&exe).env("LD_LIBRARY_PATH", kit.lib()))?;
        ensure!(
            text.starts_with(&prints),
            "bindings/README.md prints \"{prints}\", its program \"{text}\""
        );
    }
    Ok(())
}

/// Blocks of C that are no programs, in one that has what they speak of.
pub fn fragments(kit: &Kit) -> Result<()> {
    let dir = kit.scratch("fragments")?;
    for (page, way) in [("README.md", "loop"), ("docs/observability.md", "trace")] {
        fs::write(dir.join(format!("{way}.inc")), block_in("c", page, way)?)?;
    }
    let include = format!("-I{}", dir.display());
    for compiler in ["gcc", "clang"] {
        let exe = kit.compile(compiler, &["-std=c99", &include], FRAGMENTS)?;
        let mut command = kit.command(&exe);
        command.current_dir(&dir).env("LD_LIBRARY_PATH", kit.lib());
        let text = kit.succeed(&mut command)?;
        let says = FRAGMENTS.says(&kit.version);
        ensure!(text.trim() == says, "{text}, not {says}");
        kit.count(0, 1, 0);
    }
    Ok(())
}
