// SPDX-License-Identifier: Apache-2.0

//! What the checks work with: an installation in an empty prefix, tools, and a scratch folder.

use std::{
    cell::Cell,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::{Context, Result, bail, ensure};
use drex_build::{
    cache::{self, Cache, repo},
    install::{self, Built},
    process::{self, find_program},
    tools::Tools,
};

use crate::programs::Program;

pub struct Kit {
    pub dir: PathBuf,
    pub prefix: PathBuf,
    pub libraries: Built,
    pub version: String,
    /// Where cmake and its generator are.
    path: std::ffi::OsString,
    built: Cell<u32>,
    run: Cell<u32>,
    caught: Cell<u32>,
}

impl Kit {
    pub fn new() -> Result<Kit> {
        needed()?;
        let tools = {
            let cache = Cache::open()?;
            let lock = cache.lock()?;
            Tools::find(&cache, &lock)?
        };
        let dir = install::target()?.join("consumers");
        cache::remove(&dir)?;
        fs::create_dir_all(&dir)?;
        let libraries = Built::make(false)?;
        // Installed at one place and moved to another: nothing may remember the first.
        let first = dir.join("first");
        install::install(&libraries, &first, Path::new("lib"), None)?;
        // A name that shells take apart.
        let prefix = dir.join("the prefix");
        fs::rename(&first, &prefix)?;
        let mut path = tools
            .cmake
            .parent()
            .context("cmake has no folder")?
            .as_os_str()
            .to_owned();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        // dpkg looks for programs there.
        path.push(":/usr/sbin:/sbin");
        Ok(Kit {
            dir,
            prefix,
            version: libraries.version.clone(),
            libraries,
            path,
            built: Cell::new(0),
            run: Cell::new(0),
            caught: Cell::new(0),
        })
    }

    pub fn lib(&self) -> PathBuf {
        self.prefix.join("lib")
    }

    pub fn count(&self, built: u32, run: u32, caught: u32) {
        self.built.set(self.built.get() + built);
        self.run.set(self.run.get() + run);
        self.caught.set(self.caught.get() + caught);
    }

    pub fn tally(&self) -> String {
        format!(
            "{} programs built, {} runs as they should be, {} wrong ones caught",
            self.built.get(),
            self.run.get(),
            self.caught.get()
        )
    }

    /// A fresh folder.
    pub fn scratch(&self, name: &str) -> Result<PathBuf> {
        let dir = self.dir.join(name);
        cache::remove(&dir)?;
        fs::create_dir_all(&dir)?;
        Ok(dir)
    }

    /// A command that knows nothing of the checkout: no cargo, no library path, no flags from outside.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("PATH", &self.path);
        command.env("LC_ALL", "C").env("HOME", &self.dir);
        command
    }

    /// Compiles and links with all warnings as errors.
    pub fn compile(&self, compiler: &str, flags: &[&str], program: Program) -> Result<PathBuf> {
        let source = repo().join(program.source);
        let mut name = format!("{}-{compiler}{}", program.source, flags.concat());
        name.retain(|c| c.is_ascii_alphanumeric() || c == '-');
        let exe = self.dir.join(name);
        let mut command = self.command(compiler);
        command
            .args(flags)
            .args(["-Wall", "-Wextra", "-Wpedantic", "-Werror"]);
        command.arg("-I").arg(self.prefix.join("include"));
        command.arg(&source).arg("-L").arg(self.lib());
        command.arg("-ldrex").arg("-o").arg(&exe);
        self.succeed(&mut command)?;
        self.count(1, 0, 0);
        Ok(exe)
    }

    /// Runs a program against the installed library; its output must have its words.
    pub fn run(&self, wrapper: &[&str], exe: &Path, program: Program) -> Result<()> {
        let mut words = wrapper.iter().map(Path::new).chain([exe]);
        let mut command = self.command(words.next().context("no program")?);
        command.args(words).args(program.args).current_dir(repo());
        let text = self.succeed(command.env("LD_LIBRARY_PATH", self.lib()))?;
        let says = program.says(&self.version);
        ensure!(
            text.contains(&says),
            "{} says \"{}\"; expected \"{says}...\"",
            exe.display(),
            text.trim_end()
        );
        self.count(0, 1, 0);
        Ok(())
    }

    /// Runs a program that is wrong; it must fail, and what failed must be said in these words.
    pub fn catch(&self, wrapper: &[&str], exe: &Path, what: &str, words: &str) -> Result<()> {
        let mut all = wrapper.iter().map(Path::new).chain([exe]);
        let mut command = self.command(all.next().context("no program")?);
        command
            .args(all)
            .arg(what)
            .env("LD_LIBRARY_PATH", self.lib());
        let out = output(&mut command)?;
        let text = String::from_utf8_lossy(&out.stderr);
        ensure!(
            !out.status.success() && text.contains(words),
            "{what}: a wrong program was not caught ({}): {text}",
            out.status
        );
        self.count(0, 0, 1);
        Ok(())
    }

    /// Its standard output; what it said on both where it fails.
    pub fn succeed(&self, command: &mut Command) -> Result<String> {
        let out = output(command)?;
        if !out.status.success() {
            bail!(
                "{} failed ({})\n{}{}",
                process::describe(command),
                out.status,
                String::from_utf8_lossy(&out.stdout),
                String::from_utf8_lossy(&out.stderr)
            );
        }
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }
}

fn output(command: &mut Command) -> Result<Output> {
    command
        .output()
        .with_context(|| format!("cannot run {}", process::describe(command)))
}

/// Programs, and the Debian packages they come from.
const PROGRAMS: [(&str, &str); 10] = [
    ("gcc", "gcc"),
    ("g++", "g++"),
    ("clang", "clang"),
    ("clang++", "clang"),
    ("make", "make"),
    ("pkg-config", "pkg-config"),
    ("readelf", "binutils"),
    ("valgrind", "valgrind"),
    ("dpkg-deb", "dpkg"),
    ("fakeroot", "fakeroot"),
];

/// Without one of them something would go untested: then they are installed where that needs no question (as root, in a
/// container or in CI), and otherwise it is said what to install.
fn needed() -> Result<()> {
    let mut packages: Vec<String> = PROGRAMS
        .iter()
        .filter(|(program, _)| find_program(program).is_none())
        .map(|(_, package)| (*package).to_owned())
        .collect();
    packages.dedup();
    if !packages.is_empty() {
        get(&packages)?;
    }
    // clang's sanitizers are a package of their own, named after its version.
    if !clang_has_sanitizers()? {
        let version = process::output(Command::new("clang").arg("-dumpversion"))?;
        let major = version.split('.').next().unwrap_or_default();
        get(&[format!("libclang-rt-{major}-dev")])?;
        ensure!(
            clang_has_sanitizers()?,
            "clang cannot link AddressSanitizer"
        );
    }
    Ok(())
}

fn clang_has_sanitizers() -> Result<bool> {
    let out = Command::new("clang")
        .args(["-fsanitize=address", "-x", "c", "-o", "/dev/null", "-"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .and_then(|mut child| {
            use std::io::Write;
            let mut stdin = child.stdin.take().expect("piped");
            stdin.write_all(b"int main(void) { return 0; }\n")?;
            drop(stdin);
            child.wait()
        })?;
    Ok(out.success())
}

fn get(packages: &[String]) -> Result<()> {
    let list = packages.join(" ");
    // SAFETY: asks for a number.
    let root = unsafe { libc::geteuid() } == 0;
    ensure!(
        root && find_program("apt-get").is_some(),
        "the consumers' tests need programs that are not here (Debian, Ubuntu: apt-get install {list})"
    );
    println!("installing {list}");
    let apt = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").args(args);
        process::output(&mut command)
    };
    apt(&["update", "-qq"]).with_context(|| format!("needed: apt-get install {list}"))?;
    let mut args = vec!["install", "-qq", "-y", "--no-install-recommends"];
    args.extend(packages.iter().map(String::as_str));
    apt(&args).map(drop)
}
