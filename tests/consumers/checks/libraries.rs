// SPDX-License-Identifier: Apache-2.0

//! What the libraries export, however they are built.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use drex_build::{
    cache::Cache,
    cargo,
    install::{self, symbols},
};

use super::guide;
use crate::{kit::Kit, programs::SMOKE};

const CARGO_C: &str = "0.10.16";

/// The functions that an installed header declares.
pub fn declared(header: &Path) -> Result<BTreeSet<String>> {
    let text = fs::read_to_string(header)?;
    let names: BTreeSet<String> = text
        .lines()
        .filter(|l| !l.starts_with("//") && !l.starts_with(" *") && !l.starts_with("typedef"))
        .filter_map(|l| l.split_once('(')?.0.split([' ', '*']).next_back())
        .filter(|name| name.starts_with("drex_"))
        .map(str::to_owned)
        .collect();
    ensure!(names.len() > 40, "the header declares {names:?}");
    Ok(names)
}

/// Every declared function with its version, nothing else, and the SONAME.
pub fn versioned(kit: &Kit, header: &Path, shared: &Path) -> Result<()> {
    let mut nm = kit.command("nm");
    let text = kit.succeed(nm.args(["-D", "--defined-only"]).arg(shared))?;
    let got: BTreeSet<&str> = text.lines().filter_map(|l| l.split(' ').nth(2)).collect();
    let symbols = symbols::all()?;
    let mut want: BTreeSet<String> = symbols.values().map(|s| s.node.clone()).collect();
    for name in declared(header)? {
        let symbol = symbols.get(&name);
        let node = &symbol
            .with_context(|| format!("libdrex.map has no {name}"))?
            .node;
        want.insert(format!("{name}@@{node}"));
    }
    ensure!(
        got == want.iter().map(String::as_str).collect(),
        "{} exports {got:?}; expected {want:?}",
        shared.display()
    );
    let dynamic = kit.succeed(kit.command("readelf").arg("-dW").arg(shared))?;
    ensure!(dynamic.contains("soname: [libdrex.so.0]"), "{dynamic}");
    ensure!(
        !dynamic.contains("RUNPATH") && !dynamic.contains("TEXTREL"),
        "{dynamic}"
    );
    Ok(())
}

/// The links beside a library of this version.
fn linked(kit: &Kit, lib: &Path, links: &[(&str, &str)]) -> Result<()> {
    for (link, to) in links {
        let target = fs::read_link(lib.join(link)).context((*link).to_owned())?;
        ensure!(
            target == Path::new(&to.replace("VERSION", &kit.version)),
            "{link} is a link to {}",
            target.display()
        );
    }
    Ok(())
}

pub fn exports(kit: &Kit) -> Result<()> {
    let header = kit.prefix.join("include/drex.h");
    versioned(kit, &header, &kit.lib().join("libdrex.so"))?;
    linked(
        kit,
        &kit.lib(),
        &[
            ("libdrex.so", "libdrex.so.0"),
            ("libdrex.so.0", "libdrex.so.VERSION"),
        ],
    )?;
    let mut nm = kit.command("nm");
    let text = kit.succeed(
        nm.args(["-g", "--defined-only"])
            .arg(kit.lib().join("libdrex.a")),
    )?;
    let archive: BTreeSet<&str> = text.lines().filter_map(|l| l.split(' ').nth(2)).collect();
    for name in declared(&header)? {
        ensure!(archive.contains(name.as_str()), "libdrex.a has no {name}");
    }
    // What a program asks for once it is linked: the SONAME and the version.
    let exe = kit.compile("gcc", &["-std=c99"], SMOKE)?;
    let needs = kit.succeed(kit.command("readelf").arg("-dVW").arg(&exe))?;
    ensure!(
        needs.contains("Shared library: [libdrex.so.0]") && needs.contains("Name: DREX_0"),
        "{needs}"
    );
    Ok(())
}

/// Where cargo-c's variant is built, by itself or by cargo-c.
fn capi() -> Result<PathBuf> {
    Ok(install::target()?.join("capi"))
}

/// What `cargo cinstall` builds, without cargo-c itself, which takes long to compile: see `cargo_c`.
pub fn as_cargo_c(kit: &Kit) -> Result<()> {
    let mut build = cargo::cargo();
    build.args(["rustc", "--release", "--package", "drex", "--lib"]);
    build.args(["--features", "capi", "--crate-type", "cdylib"]);
    kit.succeed(build.arg("--target-dir").arg(capi()?))?;
    let shared = capi()?.join("release/libdrex.so");
    versioned(kit, &kit.prefix.join("include/drex.h"), &shared)
}

/// `cargo cinstall`, and programs built against what it installs.
pub fn cargo_c(kit: &Kit) -> Result<()> {
    let program = cargo::tool(&Cache::open()?, "cargo-c", CARGO_C, "cargo-cinstall", &[])?;
    let mut path = program
        .parent()
        .context("no folder")?
        .as_os_str()
        .to_owned();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    let target = capi()?;
    let install = |script: &str, prefix: &Path| {
        guide::in_checkout(kit, script, &mut |sh| {
            sh.env("PREFIX", prefix).env("PATH", &path);
            sh.env("CARGO_TARGET_DIR", &target);
        })
    };
    // cargo-c writes the prefix into drex.pc, and no quotes around it.
    let prefix = kit.scratch("cargo-c")?;
    let script = guide::block("docs/install.md", "cargo-c")?;
    install(&script, &prefix)?;
    let (header, lib) = (prefix.join("include/drex.h"), prefix.join("lib"));
    versioned(kit, &header, &lib.join("libdrex.so"))?;
    let same = |(name, from): &(PathBuf, PathBuf)| -> Result<()> {
        let there = fs::read(prefix.join("include").join(name));
        let there = there.with_context(|| format!("no {}", name.display()))?;
        ensure!(there == fs::read(from)?, "{} differs", name.display());
        Ok(())
    };
    install::headers()?.iter().try_for_each(same)?;
    for link in ["libdrex.so", "libdrex.so.0"] {
        let real = fs::canonicalize(lib.join(link))?;
        let want = format!("libdrex.so.{}", kit.version);
        ensure!(real.ends_with(&want), "{link} is {}", real.display());
    }
    // The ways of the guide that are for this installation, too.
    guide::follow(kit, "make-pkgconfig", &["make-pkgconfig"], &prefix)?;
    guide::follow(kit, "plain-cc", &[], &prefix)?;
    guide::follow(kit, "static", &[], &prefix)?;
    // A program that was built against the other one runs with this.
    let exe = kit.compile("gcc", &["-std=c99"], SMOKE)?;
    let text = kit.succeed(kit.command(exe).env("LD_LIBRARY_PATH", &lib))?;
    ensure!(text.starts_with(&SMOKE.says(&kit.version)), "{text}");
    kit.count(0, 1, 0);

    let dest = kit.scratch("cargo-c-dest")?;
    let script = format!(
        "cargo cinstall --release --prefix /usr --libdir lib --destdir '{}'",
        dest.display()
    );
    install(&script, Path::new(""))?;
    let pc = fs::read_to_string(dest.join("usr/lib/pkgconfig/drex.pc"))?;
    ensure!(pc.contains("prefix=/usr\n"), "{pc}");
    ensure!(pc.contains(&format!("Version: {}\n", kit.version)), "{pc}");
    versioned(
        kit,
        &dest.join("usr/include/drex.h"),
        &dest.join("usr/lib/libdrex.so"),
    )
}
