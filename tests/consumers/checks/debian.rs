// SPDX-License-Identifier: Apache-2.0

//! The Debian packages, under dpkg's own eyes.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use drex_build::{
    cache::{self, repo},
    install::{self, symbols},
};

use super::{guide, libraries};
use crate::{
    kit::Kit,
    programs::{CPP17, SMOKE},
};

/// A package that is installed already, as far as dpkg knows.
fn present(kit: &Kit, name: &str, version: &str) -> Result<String> {
    let arch = kit.succeed(kit.command("dpkg").arg("--print-architecture"))?;
    Ok(format!(
        "Package: {name}\nStatus: install ok installed\nMaintainer: nobody <nobody@localhost>\nArchitecture: {}\n\
         Multi-Arch: same\nVersion: {version}\nDescription: there\n\n",
        arch.trim()
    ))
}

/// An empty system that has these packages of the machine's, or others in their place.
fn system(kit: &Kit, name: &str, libc: Option<&str>) -> Result<PathBuf> {
    let root = kit.scratch(name)?;
    let admin = root.join("var/lib/dpkg");
    for folder in ["info", "updates", "triggers"] {
        fs::create_dir_all(admin.join(folder))?;
    }
    let version = |package: &str| {
        kit.succeed(
            kit.command("dpkg-query")
                .args(["--show", "--showformat=${Version}", package]),
        )
    };
    let libc = libc.map_or_else(|| version("libc6"), |v| Ok(v.to_owned()))?;
    let status = [
        present(kit, "libc6", &libc)?,
        present(kit, "libgcc-s1", &version("libgcc-s1")?)?,
    ];
    fs::write(admin.join("status"), status.concat())?;
    Ok(root)
}

fn dpkg(kit: &Kit, root: &Path) -> Command {
    let mut command = kit.command("fakeroot");
    command.arg("dpkg").arg("--root").arg(root);
    command
}

/// Both packages, as `cargo xtask deb` has left them.
fn packages(kit: &Kit) -> Result<[PathBuf; 2]> {
    let arch = kit.succeed(kit.command("dpkg").arg("--print-architecture"))?;
    let file = |name: &str| {
        let name = format!("{name}_{}-1_{}.deb", kit.version, arch.trim());
        repo().join("target/deb").join(name)
    };
    Ok([file("libdrex0"), file("libdrex-dev")])
}

pub fn installed(kit: &Kit) -> Result<()> {
    let deb = repo().join("target/deb");
    cache::remove(&deb)?;
    let root = system(kit, "debian", None)?;
    // Here `apt install FILES` is dpkg's part of it, and the system another one.
    let bin = kit.scratch("debian-bin")?;
    for (name, script) in [
        ("sudo", "exec \"$@\""),
        (
            "apt",
            "test \"$1\" = install; shift\nexec fakeroot dpkg --root \"$ROOT\" --install \"$@\"",
        ),
    ] {
        let path = bin.join(name);
        fs::write(&path, format!("#!/bin/sh -e\n{script}\n"))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    let mut path = bin.into_os_string();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    path.push(":/usr/sbin:/sbin");
    let script = guide::block("docs/install.md", "debian-build")?;
    guide::in_checkout(kit, &script, &mut |sh| {
        sh.env("PATH", &path).env("ROOT", &root);
    })?;
    let verified = kit.succeed(dpkg(kit, &root).arg("--verify"))?;
    ensure!(verified.trim().is_empty(), "dpkg --verify: {verified}");

    let usr = root.join("usr");
    let lib = fs::read_dir(usr.join("lib"))?
        .next()
        .context("no multiarch folder")??
        .path();
    guide::follow_with(kit, "debian", &[], &mut |sh| {
        sh.env("C_INCLUDE_PATH", usr.join("include"));
        sh.env("LIBRARY_PATH", &lib).env("LD_LIBRARY_PATH", &lib);
    })?;
    use_it(kit, &root, &lib)?;

    // What dpkg must refuse: too old a C library, and headers without their library.
    let [runtime, dev] = packages(kit)?;
    let old = system(kit, "debian-old", Some("2.1-1"))?;
    let refused = |root: &Path, package: &Path, words: &str| -> Result<()> {
        let out = dpkg(kit, root).arg("--install").arg(package).output()?;
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(!out.status.success() && said.contains(words), "{said}");
        Ok(())
    };
    refused(&old, &runtime, "depends on libc6 (>= ")?;
    let bare = system(kit, "debian-bare", None)?;
    refused(&bare, &dev, "depends on libdrex0 (= ")?;

    kit.succeed(dpkg(kit, &root).args(["--purge", "libdrex-dev", "libdrex0"]))?;
    let left = cache::files(&root, &|p| p == Path::new("var/lib/dpkg"))?;
    ensure!(left.is_empty(), "after --purge there is {left:?}");
    Ok(())
}

/// pkg-config and CMake, where Debian puts what they ask for.
fn use_it(kit: &Kit, root: &Path, lib: &Path) -> Result<()> {
    let dir = kit.scratch("debian-use")?;
    fs::copy(
        repo().join("tests/consumers/cmake/CMakeLists.txt"),
        dir.join("CMakeLists.txt"),
    )?;
    fs::copy(repo().join(SMOKE.source), dir.join("main.c"))?;
    fs::copy(repo().join(CPP17.source), dir.join("main.cpp"))?;
    let script = "eval \"cc -std=c99 -Wall -Wextra -Wpedantic -Werror main.c $(pkg-config --cflags --libs drex) -o main\"\n\
                  cmake -S . -B build -DCMAKE_PREFIX_PATH=\"$ROOT/usr\"\ncmake --build build\n";
    let mut sh = kit.command("sh");
    sh.args(["-euc", script]).current_dir(&dir);
    sh.env("ROOT", root)
        .env("PKG_CONFIG_SYSROOT_DIR", root)
        .env("PKG_CONFIG_LIBDIR", lib.join("pkgconfig"))
        .env("PKG_CONFIG_ALLOW_SYSTEM_CFLAGS", "1")
        .env("PKG_CONFIG_ALLOW_SYSTEM_LIBS", "1");
    kit.succeed(&mut sh)?;
    for (name, program) in [
        ("main", SMOKE),
        ("build/shared", SMOKE),
        ("build/static", SMOKE),
        ("build/cpp", CPP17),
    ] {
        kit.count(1, 0, 0);
        let text = kit.succeed(kit.command(dir.join(name)).env("LD_LIBRARY_PATH", lib))?;
        ensure!(
            text.starts_with(&program.says(&kit.version)),
            "{name}: {text}"
        );
        kit.count(0, 1, 0);
    }
    Ok(())
}

pub fn metadata(kit: &Kit) -> Result<()> {
    let [runtime, dev] = packages(kit)?;
    let field = |package: &Path, name: &str| {
        kit.succeed(Command::new("dpkg-deb").arg("-f").arg(package).arg(name))
    };
    for package in [&runtime, &dev] {
        ensure!(field(package, "Multi-Arch")?.trim() == "same", "Multi-Arch");
        let root = kit.scratch("metadata")?;
        kit.succeed(Command::new("dpkg-deb").arg("-R").arg(package).arg(&root))?;
        let sums = root.join("DEBIAN/md5sums");
        kit.succeed(
            kit.command("md5sum")
                .args(["--check", "--strict", "--quiet"])
                .arg(&sums)
                .current_dir(&root),
        )?;
        let list = fs::read_to_string(&sums)?;
        ensure!(list.lines().count() >= 3, "md5sums has too little:\n{list}");
    }
    let depends = field(&dev, "Depends")?;
    let own = field(&runtime, "Version")?;
    ensure!(
        depends.trim() == format!("libdrex0 (= {})", own.trim()),
        "{depends}"
    );
    ensure!(
        field(&runtime, "Depends")?.contains("libc6 (>= 2."),
        "no libc6"
    );
    let root = kit.scratch("metadata")?;
    kit.succeed(Command::new("dpkg-deb").arg("-R").arg(&runtime).arg(&root))?;
    let text = fs::read_to_string(root.join("DEBIAN/symbols"))?;
    let lines: Vec<&str> = text.lines().collect();
    let symbols = symbols::all()?;
    for name in libraries::declared(&kit.prefix.join("include/drex.h"))? {
        let symbol = symbols.get(&name).with_context(|| format!("no {name}"))?;
        let line = format!(" {name}@{} {}", symbol.node, symbol.since);
        ensure!(lines.contains(&line.as_str()), "symbols has no \"{line}\"");
    }
    let shlibs = fs::read_to_string(root.join("DEBIAN/shlibs"))?;
    ensure!(
        shlibs.starts_with(&format!("libdrex {} libdrex0 ", install::SOVERSION)),
        "{shlibs}"
    );
    Ok(())
}
