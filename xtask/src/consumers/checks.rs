// SPDX-License-Identifier: Apache-2.0

//! The checks themselves.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use super::kit::Kit;
use crate::{
    cache::repo,
    cargo::cargo,
    install::{self, deb},
};

type Check = fn(&Kit) -> Result<()>;

pub const ALL: [(&str, Check); 13] = [
    ("what the libraries export", exports),
    ("what cargo-c's library exports", cargo_c),
    ("make and pkg-config, as the guide says", make_pkgconfig),
    ("CMake, as the guide says", cmake),
    ("CMake refuses what it cannot serve", cmake_refuses),
    ("a compiler alone, as the guide says", plain_cc),
    ("static, as the guide says", static_library),
    ("the build tree, as the guide says", build_tree),
    ("C99 to C++17, gcc and clang", matrix),
    ("ASan and UBSan", sanitizers),
    ("valgrind", valgrind),
    ("Debian packages", debian),
    ("Debian packages' metadata", debian_metadata),
];

const C: &str = "tests/c/smoke.c";
const CPP11: &str = "tests/consumers/header.cpp";
const CPP17: &str = "bindings/cpp/tests/host.cpp";
const BAD: &str = "tests/consumers/bad.c";

/// What C, C++11 and C++17 programs print when all is well.
fn says(kit: &Kit, source: &str) -> String {
    let text = match source {
        C => "32 tokens in ",
        CPP11 => "1 token",
        _ => "30 tokens early, 15 deep",
    };
    format!("drex {}: {text}", kit.version)
}

/// The functions that the installed header declares.
fn declared(header: &Path) -> Result<BTreeSet<String>> {
    let text = fs::read_to_string(header)?;
    let names = text
        .lines()
        .filter(|l| !l.starts_with("//") && !l.starts_with(" *") && !l.starts_with("typedef"))
        .filter_map(|l| l.split_once('(')?.0.split([' ', '*']).next_back())
        .filter(|name| name.starts_with("drex_"))
        .map(str::to_owned);
    Ok(names.collect())
}

/// Every declared function with its version, nothing else, and the SONAME.
fn versioned(kit: &Kit, declared: &BTreeSet<String>, shared: &Path) -> Result<()> {
    let mut nm = kit.command("nm");
    let text = kit.succeed(nm.args(["-D", "--defined-only"]).arg(shared))?;
    let got: BTreeSet<&str> = text.lines().filter_map(|l| l.split(' ').nth(2)).collect();
    let mut want: BTreeSet<String> = declared.iter().map(|n| format!("{n}@@DREX_0")).collect();
    want.insert("DREX_0".to_owned());
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

/// What `cargo cinstall` builds and installs, without cargo-c itself, which takes minutes to compile.
fn cargo_c(kit: &Kit) -> Result<()> {
    let declared = declared(&kit.prefix.join("include/drex.h"))?;
    let target = install::target()?.join("capi");
    let mut build = cargo();
    build.args(["rustc", "--release", "--package", "drex", "--lib"]);
    build.args([
        "--features",
        "capi",
        "--crate-type",
        "cdylib",
        "--target-dir",
    ]);
    kit.succeed(build.arg(&target))?;
    versioned(kit, &declared, &target.join("release/libdrex.so"))
}

fn exports(kit: &Kit) -> Result<()> {
    let declared = declared(&kit.prefix.join("include/drex.h"))?;
    ensure!(declared.len() > 20, "the header declares {declared:?}");
    versioned(kit, &declared, &kit.lib().join("libdrex.so"))?;
    for (link, to) in [
        ("libdrex.so", "libdrex.so.0".to_owned()),
        ("libdrex.so.0", format!("libdrex.so.{}", kit.version)),
    ] {
        let target = fs::read_link(kit.lib().join(link))?;
        ensure!(
            target == Path::new(&to),
            "{link} is a link to {}",
            target.display()
        );
    }
    let mut nm = kit.command("nm");
    let text = kit.succeed(
        nm.args(["-g", "--defined-only"])
            .arg(kit.lib().join("libdrex.a")),
    )?;
    let archive: BTreeSet<&str> = text.lines().filter_map(|l| l.split(' ').nth(2)).collect();
    for name in &declared {
        ensure!(archive.contains(name.as_str()), "libdrex.a has no {name}");
    }
    // What a program asks for once it is linked: the SONAME and the version.
    let exe = kit.compile("gcc", &["-std=c99"], C, &["-ldrex"])?;
    let needs = kit.succeed(kit.command("readelf").arg("-dVW").arg(&exe))?;
    ensure!(
        needs.contains("Shared library: [libdrex.so.0]") && needs.contains("Name: DREX_0"),
        "{needs}"
    );
    Ok(())
}

/// The commands that the install guide gives for a way of using drex.
fn guide(way: &str) -> Result<String> {
    let text = fs::read_to_string(repo().join("docs/install.md"))?;
    let (_, rest) = text
        .split_once(&format!("<!-- consumer: {way} -->\n```sh\n"))
        .with_context(|| format!("docs/install.md says nothing on {way}"))?;
    Ok(rest
        .split_once("```")
        .context("a block without an end")?
        .0
        .to_owned())
}

/// Does what the guide says in a copy of a consumer's folder, and checks that every program in it has spoken.
fn follow(kit: &Kit, way: &str, projects: &[&str]) -> Result<()> {
    let script = guide(way)?;
    let dir = kit.scratch(&format!("guide-{way}"))?;
    for project in projects {
        for entry in fs::read_dir(repo().join("tests/consumers").join(project))? {
            let entry = entry?;
            fs::copy(entry.path(), dir.join(entry.file_name()))?;
        }
    }
    fs::copy(repo().join(C), dir.join("main.c"))?;
    fs::copy(repo().join(CPP17), dir.join("main.cpp"))?;
    let mut sh = kit.command("sh");
    sh.args(["-euc", &script]).current_dir(&dir);
    sh.env("PREFIX", &kit.prefix).env("BUILD_TREE", &kit.tree);
    let text = kit.succeed(&mut sh)?;
    let runs = script
        .lines()
        .filter(|l| l.split(' ').any(|word| word.starts_with("./")))
        .count();
    let c = says(kit, C);
    let cpp = says(kit, CPP17);
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
    Ok(())
}

fn make_pkgconfig(kit: &Kit) -> Result<()> {
    follow(kit, "make-pkgconfig", &["make-pkgconfig"])?;
    let version = kit.succeed(
        kit.command("pkg-config")
            .env("PKG_CONFIG_PATH", kit.lib().join("pkgconfig"))
            .args(["--modversion", "drex"]),
    )?;
    ensure!(version.trim() == kit.version, "drex.pc says {version}");
    Ok(())
}

fn cmake(kit: &Kit) -> Result<()> {
    follow(kit, "cmake", &["cmake"])
}

fn cmake_refuses(kit: &Kit) -> Result<()> {
    let project = fs::read_to_string(repo().join("tests/consumers/cmake/CMakeLists.txt"))?;
    for (asked, words) in [
        ("drex 0.99", "not accepted"),
        ("drex 1", "not accepted"),
        ("drex COMPONENTS python", "drex has no component python"),
    ] {
        let dir = kit.scratch("cmake-refuses")?;
        fs::write(
            dir.join("CMakeLists.txt"),
            project.replace("drex 0.1 REQUIRED", &format!("{asked} REQUIRED")),
        )?;
        for name in ["main.c", "main.cpp"] {
            fs::write(dir.join(name), "")?;
        }
        let mut prefix = std::ffi::OsString::from("-DCMAKE_PREFIX_PATH=");
        prefix.push(&kit.prefix);
        let mut command = kit.command("cmake");
        let out = command
            .args(["-S", ".", "-B", "build"])
            .arg(prefix)
            .current_dir(&dir)
            .output()?;
        let text = String::from_utf8_lossy(&out.stderr);
        ensure!(
            !out.status.success() && text.contains(words),
            "find_package({asked}) should fail: {text}"
        );
    }
    Ok(())
}

fn plain_cc(kit: &Kit) -> Result<()> {
    follow(kit, "plain-cc", &[])
}

fn static_library(kit: &Kit) -> Result<()> {
    follow(kit, "static", &[])?;
    let exe = kit.dir.join("guide-static/main");
    let needs = kit.succeed(kit.command("readelf").arg("-dW").arg(exe))?;
    ensure!(!needs.contains("libdrex"), "{needs}");
    Ok(())
}

fn build_tree(kit: &Kit) -> Result<()> {
    follow(kit, "build-tree", &["cmake", "make-pkgconfig"])
}

/// (compiler, standard, source)
const MATRIX: [(&str, &str, &str); 8] = [
    ("gcc", "c99", C),
    ("gcc", "c11", C),
    ("g++", "c++11", CPP11),
    ("g++", "c++17", CPP17),
    ("clang", "c99", C),
    ("clang", "c11", C),
    ("clang++", "c++11", CPP11),
    ("clang++", "c++17", CPP17),
];

fn matrix(kit: &Kit) -> Result<()> {
    for (compiler, standard, source) in MATRIX {
        let standard = format!("-std={standard}");
        let mut flags = vec![standard.as_str(), "-O1"];
        if source == CPP17 {
            flags.extend(["-fno-exceptions", "-fno-rtti"]);
        }
        let exe = kit.compile(compiler, &flags, source, &["-ldrex"])?;
        kit.run(&[], &exe, &says(kit, source))?;
    }
    Ok(())
}

fn sanitizers(kit: &Kit) -> Result<()> {
    let sanitize = [
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ];
    let flags = |standard, define: Option<&'static str>| {
        let mut flags = vec![standard];
        flags.extend(sanitize);
        flags.extend(define);
        flags
    };
    for (cc, cxx) in [("gcc", "g++"), ("clang", "clang++")] {
        let exe = kit.compile(cc, &flags("-std=c99", None), C, &["-ldrex"])?;
        kit.run(&[], &exe, &says(kit, C))?;
        let exceptions = Some("-DDREX_HPP_EXCEPTIONS");
        let exe = kit.compile(cxx, &flags("-std=c++17", exceptions), CPP17, &["-ldrex"])?;
        kit.run(&[], &exe, &says(kit, CPP17))?;
        // They were there: the same flags find what is wrong.
        let bad = kit.compile(cc, &flags("-std=c99", None), BAD, &["-ldrex"])?;
        kit.catch(
            &[],
            &bad,
            "overflow",
            "AddressSanitizer: heap-buffer-overflow",
        )?;
        kit.catch(&[], &bad, "leak", "LeakSanitizer: detected memory leaks")?;
        kit.catch(
            &[],
            &bad,
            "undefined",
            "runtime error: signed integer overflow",
        )?;
    }
    Ok(())
}

/// Unlike the sanitizers it sees into the library, which they have not compiled.
fn valgrind(kit: &Kit) -> Result<()> {
    let valgrind = [
        "valgrind",
        "--quiet",
        "--error-exitcode=99",
        "--leak-check=full",
        "--errors-for-leak-kinds=definite,indirect,possible",
    ];
    for (compiler, standard, source) in [("gcc", "-std=c99", C), ("g++", "-std=c++17", CPP17)] {
        let exe = kit.compile(compiler, &[standard, "-g"], source, &["-ldrex"])?;
        kit.run(&valgrind, &exe, &says(kit, source))?;
    }
    let bad = kit.compile("gcc", &["-std=c99", "-g"], BAD, &["-ldrex"])?;
    kit.catch(&valgrind, &bad, "short-logits", "Invalid read of size")?;
    kit.catch(&valgrind, &bad, "leak", "definitely lost")
}

/// Both packages, built once.
fn packages(kit: &Kit) -> Result<[PathBuf; 2]> {
    let out = kit.dir.join("deb");
    if !out.is_dir() {
        return deb::build(&out);
    }
    let found = |start: &str| {
        let mut entries = fs::read_dir(&out)?.flatten();
        let found = entries.find(|e| e.file_name().to_string_lossy().starts_with(start));
        Ok::<_, anyhow::Error>(found.context("no package")?.path())
    };
    Ok([found("libdrex0_")?, found("libdrex-dev_")?])
}

fn debian(kit: &Kit) -> Result<()> {
    let root = kit.scratch("debian")?;
    for package in packages(kit)? {
        let mut unpack = Command::new("dpkg-deb");
        kit.succeed(unpack.arg("-x").arg(package).arg(&root))?;
    }
    let lib = fs::read_dir(root.join("usr/lib"))?
        .next()
        .context("no multiarch folder")??
        .path();
    let flags = kit.succeed(
        kit.command("pkg-config")
            .env("PKG_CONFIG_SYSROOT_DIR", &root)
            .env("PKG_CONFIG_LIBDIR", lib.join("pkgconfig"))
            .env("PKG_CONFIG_ALLOW_SYSTEM_CFLAGS", "1")
            .env("PKG_CONFIG_ALLOW_SYSTEM_LIBS", "1")
            .args(["--cflags", "--libs", "drex"]),
    )?;
    let exe = root.join("main");
    let mut cc = kit.command("cc");
    cc.args(["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]);
    cc.arg(repo().join(C))
        .args(flags.split_whitespace())
        .arg("-o")
        .arg(&exe);
    kit.succeed(&mut cc)?;
    let text = kit.succeed(kit.command(&exe).env("LD_LIBRARY_PATH", &lib))?;
    ensure!(text.starts_with(&says(kit, C)), "{text}");
    kit.count(1, 1, 0);
    // The CMake package, found where Debian puts it.
    let dir = kit.scratch("debian-cmake")?;
    fs::copy(
        repo().join("tests/consumers/cmake/CMakeLists.txt"),
        dir.join("CMakeLists.txt"),
    )?;
    fs::copy(repo().join(C), dir.join("main.c"))?;
    fs::copy(repo().join(CPP17), dir.join("main.cpp"))?;
    let mut at = std::ffi::OsString::from("-DCMAKE_PREFIX_PATH=");
    at.push(root.join("usr"));
    kit.succeed(
        kit.command("cmake")
            .args(["-S", ".", "-B", "build"])
            .arg(at)
            .current_dir(&dir),
    )?;
    kit.succeed(
        kit.command("cmake")
            .args(["--build", "build"])
            .current_dir(&dir),
    )?;
    for name in ["shared", "static"] {
        kit.count(1, 0, 0);
        kit.run(&[], &dir.join("build").join(name), &says(kit, C))?;
    }
    Ok(())
}

fn debian_metadata(kit: &Kit) -> Result<()> {
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
    let symbols = fs::read_to_string(root.join("DEBIAN/symbols"))?;
    for name in declared(&kit.prefix.join("include/drex.h"))? {
        ensure!(
            symbols.contains(&format!(" {name}@DREX_0 ")),
            "symbols has no {name}"
        );
    }
    let shlibs = fs::read_to_string(root.join("DEBIAN/shlibs"))?;
    ensure!(
        shlibs.starts_with(&format!("libdrex {} libdrex0 ", install::SOVERSION)),
        "{shlibs}"
    );
    Ok(())
}
