// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask deb`: the Debian packages libdrex0 (the shared library) and libdrex-dev (all that a compiler wants).

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use flate2::{Compression, GzBuilder};

use super::{
    Built, SOVERSION, install,
    symbols::{self, Symbol},
    target,
};
use crate::{
    cache::{files, remove, repo},
    cargo::cargo,
    process,
};

/// As Debian's own tools take it; whoever gives packages to others says who they are.
fn maintainer() -> String {
    let env = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
    let name = env("DEBFULLNAME").unwrap_or_else(|| "the drex authors".to_owned());
    let email = env("DEBEMAIL").unwrap_or_else(|| "drex@localhost".to_owned());
    format!("{name} <{email}>")
}

#[derive(Args)]
pub struct Options {
    /// Where to write the packages
    #[arg(long, value_name = "DIR", default_value = "target/deb")]
    out: PathBuf,
}

pub fn run(options: &Options) -> Result<()> {
    let out = repo().join(&options.out);
    for deb in build(&out)? {
        println!("{}", deb.display());
    }
    Ok(())
}

/// A package on its way: a tree of files, and what is said of it.
struct Package {
    name: String,
    root: PathBuf,
    control: String,
}

/// libdrex0 and libdrex-dev, in `out`.
pub fn build(out: &Path) -> Result<[PathBuf; 2]> {
    ensure!(
        process::find_program("dpkg-deb").is_some(),
        "dpkg-deb is needed to build Debian packages (Debian, Ubuntu: apt-get install dpkg)"
    );
    let arch = process::output(Command::new("dpkg").arg("--print-architecture"))?;
    let multiarch = multiarch()?;
    let built = Built::make(true)?;
    let version = format!("{}-1", built.version);
    let libdir = Path::new("lib").join(&multiarch);
    let work = target()?.join("deb");
    remove(&work)?;

    let dev = work.join("libdrex-dev");
    install(&built, &dev.join("usr"), &libdir, Some("/usr"))?;
    let lib = work.join(format!("libdrex{SOVERSION}"));
    let usr_lib = Path::new("usr").join(&libdir);
    fs::create_dir_all(lib.join(&usr_lib))?;
    // The library and the loader's link; libdrex.so, the linker's, stays with the headers.
    for name in [
        format!("libdrex.so.{}", built.version),
        format!("libdrex.so.{SOVERSION}"),
    ] {
        fs::rename(
            dev.join(&usr_lib).join(&name),
            lib.join(&usr_lib).join(&name),
        )?;
    }

    let shared = lib
        .join(&usr_lib)
        .join(format!("libdrex.so.{}", built.version));
    let about = " drex gives a serving engine early exit with dynamic rebatching: tokens that\n \
                 are confident at an exit ramp leave there, the others are regrouped into\n \
                 dense batches for the deeper layers. The engine keeps its model and memory.\n";
    let maintainer = maintainer();
    let common = |name: &str, section: &str, depends: &str, title: &str, more: &str| {
        format!(
            "Package: {name}\nSource: drex\nVersion: {version}\nArchitecture: {arch}\nMulti-Arch: same\n\
             Maintainer: {maintainer}\nSection: {section}\nPriority: optional\nDepends: {depends}\n\
             Description: {title}\n{about} .\n {more}\n"
        )
    };
    let runtime = format!("libdrex{SOVERSION}");
    let packages = [
        Package {
            control: common(
                &runtime,
                "libs",
                &format!("libc6 (>= {}), libgcc-s1", glibc(&shared)?),
                "early exit with dynamic rebatching for LLM serving (library)",
                "This package contains the shared library.",
            ),
            name: runtime.clone(),
            root: lib,
        },
        Package {
            control: common(
                "libdrex-dev",
                "libdevel",
                &format!("{runtime} (= {version})"),
                "early exit with dynamic rebatching for LLM serving (headers)",
                "This package contains the headers for C and C++, the static library and\n \
                 the files for pkg-config and CMake.",
            ),
            name: "libdrex-dev".to_owned(),
            root: dev,
        },
    ];
    let control = packages[0].root.join("DEBIAN");
    fs::create_dir_all(&control)?;
    fs::write(
        control.join("shlibs"),
        format!("libdrex {SOVERSION} {runtime} (>= {})\n", built.version),
    )?;
    fs::write(
        control.join("symbols"),
        symbols_file(&symbols::all()?, &runtime),
    )?;
    fs::write(control.join("triggers"), "activate-noawait ldconfig\n")?;

    fs::create_dir_all(out)?;
    let mut made = Vec::new();
    for package in &packages {
        made.push(package.finish(out, &version, &arch)?);
    }
    made.try_into().ok().context("two packages")
}

impl Package {
    fn finish(&self, out: &Path, version: &str, arch: &str) -> Result<PathBuf> {
        let doc = self.root.join("usr/share/doc").join(&self.name);
        fs::create_dir_all(&doc)?;
        let copyright = fs::read_to_string(repo().join("packaging/deb/copyright"))?;
        fs::write(
            doc.join("copyright"),
            copyright.replace("@CRATES@", crates()?.trim_end()),
        )?;
        let maintainer = maintainer();
        let changes = format!(
            "drex ({version}) unstable; urgency=medium\n\n  * Built from its own source tree.\n\n -- {maintainer}  {}\n",
            date()?
        );
        // No time and no name inside: the same source gives the same package.
        let mut gz = GzBuilder::new().write(
            fs::File::create(doc.join("changelog.Debian.gz"))?,
            Compression::best(),
        );
        gz.write_all(changes.as_bytes())?;
        gz.finish()?;

        let control = self.root.join("DEBIAN");
        fs::create_dir_all(&control)?;
        let all = files(&self.root, &|p| p == Path::new("DEBIAN"))?;
        let mut bytes = 0;
        let mut sums = Vec::new();
        for file in &all {
            let path = self.root.join(file);
            let meta = fs::symlink_metadata(&path)?;
            if meta.is_symlink() {
                continue;
            }
            bytes += meta.len().div_ceil(1024);
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
            let sum = process::output(Command::new("md5sum").arg("--").arg(&path))?;
            let sum = sum.split(' ').next().context("md5sum says nothing")?;
            sums.push(format!("{sum}  {}\n", file.display()));
        }
        fs::write(control.join("md5sums"), sums.concat())?;
        let text =
            self.control
                .replacen("Section:", &format!("Installed-Size: {bytes}\nSection:"), 1);
        fs::write(control.join("control"), text)?;
        let deb = out.join(format!("{}_{version}_{arch}.deb", self.name));
        process::output(
            Command::new("dpkg-deb")
                .args(["--root-owner-group", "-Zxz", "--build"])
                .arg(&self.root)
                .arg(&deb),
        )?;
        Ok(deb)
    }
}

fn multiarch() -> Result<String> {
    let out = process::output(Command::new("cc").arg("-print-multiarch")).unwrap_or_default();
    if !out.is_empty() {
        return Ok(out);
    }
    Ok(format!("{}-linux-gnu", std::env::consts::ARCH))
}

/// The oldest glibc that has all that the library needs of it.
fn glibc(shared: &Path) -> Result<String> {
    let text = process::output(Command::new("readelf").arg("-VW").arg(shared))?;
    let newest = text
        .split_whitespace()
        .filter_map(|w| w.strip_prefix("GLIBC_"))
        .filter_map(|v| {
            v.split('.')
                .map(|n| n.parse().ok())
                .collect::<Option<Vec<u32>>>()
        })
        .max()
        .context("libdrex.so needs no glibc?")?;
    let parts: Vec<String> = newest.iter().map(u32::to_string).collect();
    Ok(parts.join("."))
}

/// What dpkg-shlibdeps reads: since which version each symbol is there, so that a program depends on no newer library
/// than it needs.
fn symbols_file(symbols: &BTreeMap<String, Symbol>, package: &str) -> String {
    let mut out = format!("libdrex.so.{SOVERSION} {package} #MINVER#\n");
    let mut nodes = BTreeMap::new();
    for symbol in symbols.values() {
        let since = nodes.entry(&symbol.node).or_insert(&symbol.since);
        // A node is as old as its oldest symbol.
        if older(&symbol.since, since) {
            *since = &symbol.since;
        }
    }
    for (node, since) in nodes {
        out.push_str(&format!(" {node}@{node} {since}\n"));
    }
    for (name, symbol) in symbols {
        out.push_str(&format!(" {name}@{} {}\n", symbol.node, symbol.since));
    }
    out
}

fn older(a: &str, b: &str) -> bool {
    let numbers = |v: &str| -> Vec<u32> { v.split('.').filter_map(|n| n.parse().ok()).collect() };
    numbers(a) < numbers(b)
}

/// The packages in the library, with their licences, as cargo knows them.
fn crates() -> Result<String> {
    let mut command = cargo();
    command.args([
        "tree",
        "--package",
        "drex",
        "--edges",
        "normal",
        "--prefix",
        "none",
    ]);
    command.args(["--format", "{p} ({l})"]);
    let text = process::output(&mut command)?;
    let mut lines: Vec<String> = text
        .lines()
        .filter(|l| !l.starts_with("drex "))
        .map(|l| format!("  {}", l.trim_end_matches(" (*)")))
        .collect();
    lines.sort();
    lines.dedup();
    Ok(lines.join("\n"))
}

/// Of the last commit, so that building twice gives the same; of the machine's clock where there is no git.
fn date() -> Result<String> {
    let git = Command::new("git")
        .current_dir(repo())
        .args(["log", "-1", "--format=%cD"])
        .stderr(Stdio::null())
        .output();
    match git {
        Ok(out) if out.status.success() && !out.stdout.is_empty() => {
            Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
        }
        _ => process::output(Command::new("date").arg("-R")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_symbol_has_its_own_version() {
        let symbol = |node: &str, since: &str| Symbol {
            node: node.to_owned(),
            since: since.to_owned(),
        };
        let symbols = BTreeMap::from([
            ("drex_a".to_owned(), symbol("DREX_0", "0.10.0")),
            ("drex_b".to_owned(), symbol("DREX_0", "0.9.0")),
            ("drex_c".to_owned(), symbol("DREX_0.11", "0.11.0")),
        ]);
        assert_eq!(
            symbols_file(&symbols, "libdrex0"),
            "libdrex.so.0 libdrex0 #MINVER#\n DREX_0@DREX_0 0.9.0\n DREX_0.11@DREX_0.11 0.11.0\n \
             drex_a@DREX_0 0.10.0\n drex_b@DREX_0 0.9.0\n drex_c@DREX_0.11 0.11.0\n"
        );
    }
}
