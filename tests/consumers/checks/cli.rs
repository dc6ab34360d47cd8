// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask install` itself: what it writes is what it lists, and it says what is wrong.

use std::{collections::BTreeSet, fs, path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};
use drex_build::{cache, cargo, install};

use super::{guide, libraries};
use crate::{kit::Kit, programs::SMOKE};

fn xtask(args: &[&str]) -> Command {
    let mut command = cargo::cargo();
    command.args(["run", "--quiet", "--package", "xtask", "--"]);
    command.args(args);
    command
}

pub fn install(kit: &Kit) -> Result<()> {
    // As the guide says, to a prefix whose name a shell takes apart.
    let prefix = kit.scratch("cli/a prefix")?;
    let script = guide::block("docs/install.md", "install")?;
    let listed = guide::in_checkout(kit, &script, &mut |sh| {
        sh.env("PREFIX", &prefix);
    })?;
    complete(&listed, &prefix)?;
    guide::follow(kit, "plain-cc", &[], &prefix)?;

    // For a packager.
    let dest = kit.scratch("cli/dest")?;
    let text = dest.to_str().context("not UTF-8")?;
    let args = [
        "install",
        "--prefix",
        "/opt/drex",
        "--libdir",
        "lib/multi/arch",
        "--strip",
        "--destdir",
        text,
    ];
    complete(&kit.succeed(&mut xtask(&args))?, &dest)?;
    let root = dest.join("opt/drex");
    let lib = root.join("lib/multi/arch");
    for name in cache::files(&dest, &|_| false)? {
        let content = fs::read(dest.join(&name))?;
        let names_it = content.windows(text.len()).any(|w| w == text.as_bytes());
        ensure!(!names_it, "{} names --destdir", name.display());
    }
    libraries::versioned(kit, &root.join("include/drex.h"), &lib.join("libdrex.so"))?;
    for file in ["libdrex.so", "libdrex.a"] {
        let size = |path: PathBuf| Ok::<_, anyhow::Error>(fs::metadata(path)?.len());
        let sections = kit.succeed(kit.command("readelf").arg("-SW").arg(lib.join(file)))?;
        ensure!(!sections.contains(".debug_info"), "{file} is not stripped");
        ensure!(
            size(lib.join(file))? < size(kit.lib().join(file))?,
            "{file} has not become smaller"
        );
    }
    let exe = kit.dir.join("cli/stripped");
    let mut cc = kit.command("cc");
    cc.arg(cache::repo().join(SMOKE.source))
        .arg("-I")
        .arg(root.join("include"));
    cc.arg(lib.join("libdrex.a"))
        .args(install::SYSTEM_LIBS.map(|l| format!("-l{l}")));
    kit.succeed(cc.arg("-o").arg(&exe))?;
    kit.count(1, 0, 0);
    kit.run(&[], &exe, SMOKE)?;

    let tree = kit.succeed(&mut xtask(&["install", "--build-tree"]))?;
    let tree = tree.lines().find_map(|l| l.split_once("-Ddrex_DIR="));
    let tree = PathBuf::from(tree.context("no drex_DIR")?.1);
    ensure!(tree.join("libdrex.so.0").exists() && tree.join("drex.pc").is_file());

    for (args, code, words) in [
        (&["install"][..], 2, "--prefix"),
        (
            &["install", "--prefix", "/x", "--build-tree"],
            2,
            "cannot be used with",
        ),
        (
            &["install", "--build-tree", "--destdir", "/x"],
            2,
            "cannot be used with",
        ),
        (
            &["install", "--prefix", text, "--libdir", "/lib"],
            1,
            "--libdir is \"/lib\"; expected",
        ),
        (
            &["install", "--prefix", text, "--libdir", "../lib"],
            1,
            "--libdir is \"../lib\"",
        ),
        (&["install", "--prefix", "/dev/null/x"], 1, "/dev/null/x"),
    ] {
        let out = xtask(args).output()?;
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(
            out.status.code() == Some(code) && said.contains(words),
            "xtask {args:?}: {} and {said:?}; expected {code} and {words:?}",
            out.status
        );
    }
    Ok(())
}

/// All that lies below the folder is listed, and all that is listed lies there.
fn complete(listed: &str, root: &std::path::Path) -> Result<()> {
    let listed: BTreeSet<PathBuf> = listed.lines().map(PathBuf::from).collect();
    let there = cache::files(root, &|_| false)?;
    let there: BTreeSet<PathBuf> = there.iter().map(|f| root.join(f)).collect();
    ensure!(listed == there, "{listed:?} was said, {there:?} is there");
    ensure!(there.len() > 9, "{there:?}");
    Ok(())
}
