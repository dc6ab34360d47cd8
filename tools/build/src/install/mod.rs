// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask install`: the libraries, the headers and what build systems ask for them, below a prefix.

pub mod deb;
pub mod symbols;

use std::{
    ffi::OsString,
    fs,
    path::{Component, Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::{
    cache::{copy_if_different, files, remove, repo},
    cargo, process,
};

/// The shared library's interface number, in its SONAME and in its symbol versions.
pub const SOVERSION: &str = "0";
/// What a program that links the static library needs besides. The unwinder is missing here because gcc and clang add
/// it by themselves, the right one for `-static` too.
pub const SYSTEM_LIBS: [&str; 5] = ["pthread", "dl", "util", "rt", "m"];

#[derive(Args)]
pub struct Options {
    /// Where to install, such as /usr/local
    #[arg(
        long,
        value_name = "DIR",
        required_unless_present = "build_tree",
        conflicts_with = "build_tree"
    )]
    prefix: Option<PathBuf>,
    /// The libraries' folder, relative to the prefix
    #[arg(long, value_name = "DIR", default_value = "lib")]
    libdir: PathBuf,
    /// Folder to stage below, for packagers; no installed file names it
    #[arg(long, value_name = "DIR", conflicts_with = "build_tree")]
    destdir: Option<PathBuf>,
    /// Leave out symbols that only debuggers want
    #[arg(long)]
    strip: bool,
    /// Install nothing: leave libraries and package files in target/drex/tree, for programs built against this checkout
    #[arg(long)]
    build_tree: bool,
}

pub fn run(options: &Options) -> Result<()> {
    let built = Built::make(options.strip)?;
    let Some(prefix) = &options.prefix else {
        let tree = build_tree(&built)?;
        println!("CMake       -Ddrex_DIR={}", tree.display());
        println!("pkg-config  PKG_CONFIG_PATH={}", tree.display());
        println!("at run time LD_LIBRARY_PATH={}", tree.display());
        return Ok(());
    };
    let prefix = std::path::absolute(prefix)?;
    let root = match &options.destdir {
        Some(destdir) => std::path::absolute(destdir)?.join(prefix.strip_prefix("/")?),
        None => prefix,
    };
    for file in install(&built, &root, &options.libdir, None)? {
        println!("{}", file.display());
    }
    Ok(())
}

pub fn version() -> Result<String> {
    let text = fs::read_to_string(repo().join("Cargo.toml"))?;
    let mut package = text.lines().skip_while(|l| *l != "[package]");
    let line = package.find_map(|l| l.strip_prefix("version = \""));
    Ok(line
        .and_then(|l| l.strip_suffix('"'))
        .context("no version in Cargo.toml")?
        .to_owned())
}

/// Both libraries as they are installed.
pub struct Built {
    pub version: String,
    pub shared: PathBuf,
    pub archive: PathBuf,
}

impl Built {
    /// rustc writes a version script of its own for shared libraries, without versions, and linkers accept no second
    /// one. So the shared library is linked from the static one, with ours.
    pub fn make(strip: bool) -> Result<Built> {
        let version = version()?;
        let archive = cargo::build_archive()?;
        let dir = target()?.join(if strip { "stripped" } else { "lib" });
        fs::create_dir_all(&dir)?;
        let built = Built {
            shared: dir.join(format!("libdrex.so.{version}")),
            archive: dir.join("libdrex.a"),
            version,
        };
        copy_if_different(&archive, &built.archive)?;
        if strip {
            process::output(
                Command::new("strip")
                    .args(["--strip-debug", "--enable-deterministic-archives"])
                    .arg(&built.archive),
            )?;
        }
        let mut link = Command::new(compiler()?);
        link.arg("-shared").arg("-o").arg(&built.shared);
        link.arg(format!("-Wl,-soname,libdrex.so.{SOVERSION}"));
        let mut script = OsString::from("-Wl,--version-script=");
        script.push(repo().join("packaging/libdrex.map"));
        link.arg(script);
        link.args(["-Wl,--gc-sections", "-Wl,-z,relro,-z,now", "-Wl,-z,defs"]);
        link.args(strip.then_some("-Wl,--strip-all"));
        link.arg("-Wl,--whole-archive").arg(&archive);
        link.args(["-Wl,--no-whole-archive", "-Wl,--as-needed"]);
        link.args(SYSTEM_LIBS.map(|lib| format!("-l{lib}")));
        process::output(&mut link).context("cannot link libdrex.so")?;
        Ok(built)
    }
}

fn compiler() -> Result<PathBuf> {
    let named = std::env::var_os("CC").filter(|cc| !cc.is_empty());
    named
        .map(PathBuf::from)
        .or_else(|| {
            ["cc", "gcc", "clang"]
                .iter()
                .find_map(|c| process::find_program(c))
        })
        .context("no C compiler on PATH (Debian, Ubuntu: apt-get install gcc libc6-dev); CC can name one")
}

/// target/drex, wherever cargo's target folder is.
pub fn target() -> Result<PathBuf> {
    Ok(cargo::target_dir()?.join("drex"))
}

/// Puts everything below `root`; returns the paths. `prefix` is written into drex.pc where it is known for good (else
/// the file finds itself, and the tree can be moved).
pub fn install(
    built: &Built,
    root: &Path,
    libdir: &Path,
    prefix: Option<&str>,
) -> Result<Vec<PathBuf>> {
    ensure!(
        libdir
            .components()
            .all(|c| matches!(c, Component::Normal(_)))
            && libdir.components().next().is_some(),
        "--libdir is \"{}\"; expected a folder below the prefix, such as lib/x86_64-linux-gnu",
        libdir.display()
    );
    let depth = libdir.components().count();
    let lib = root.join(libdir);
    let pkgconfig = lib.join("pkgconfig/drex.pc");
    let cmake = lib.join("cmake/drex");
    let up = |n| vec![".."; n].join("/");
    let texts = Texts {
        version: &built.version,
        prefix: prefix.map_or_else(
            || format!("${{pcfiledir}}/{}", up(depth + 1)),
            str::to_owned,
        ),
        pc_libdir: format!("${{prefix}}/{}", libdir.display()),
        cflags: "-I${includedir}".to_owned(),
        up: up(depth + 2),
        libdir: libdir.display().to_string(),
        include_dirs: "\"${_drex_root}/include\"".to_owned(),
    };
    let mut written = vec![];
    for (header, at) in headers()? {
        let to = root.join("include").join(header);
        copy_if_different(&at, &to)?;
        written.push(to);
    }
    let archive = lib.join("libdrex.a");
    copy_if_different(&built.archive, &archive)?;
    written.push(archive);
    written.extend(shared(built, &lib)?);
    texts.write(&pkgconfig, &cmake)?;
    written.push(pkgconfig);
    written.extend(["drex-config.cmake", "drex-config-version.cmake"].map(|f| cmake.join(f)));
    Ok(written)
}

/// The library and its links: libdrex.so for the linker, libdrex.so.0 for the loader.
fn shared(built: &Built, lib: &Path) -> Result<[PathBuf; 3]> {
    let file = format!("libdrex.so.{}", built.version);
    let soname = format!("libdrex.so.{SOVERSION}");
    copy_if_different(&built.shared, &lib.join(&file))?;
    let link = |name: &str, to: &str| -> Result<PathBuf> {
        let path = lib.join(name);
        if !fs::read_link(&path).is_ok_and(|old| old == Path::new(to)) {
            remove(&path)?;
            std::os::unix::fs::symlink(to, &path)?;
        }
        Ok(path)
    };
    Ok([
        lib.join(&file),
        link(&soname, &file)?,
        link("libdrex.so", &soname)?,
    ])
}

/// Where headers are edited: C's, and C++'s, which lie on top of them.
const INCLUDE: [&str; 2] = ["include", "bindings/cpp/include"];

/// Below an include folder, and where they are now.
pub fn headers() -> Result<Vec<(PathBuf, PathBuf)>> {
    let mut found = vec![];
    for folder in INCLUDE.map(|f| repo().join(f)) {
        let names = files(&folder, &|_| false)?;
        found.extend(
            names
                .into_iter()
                .map(|name| (name.clone(), folder.join(name))),
        );
    }
    Ok(found)
}

/// Libraries and package files in target/drex; the headers stay where they are edited.
pub fn build_tree(built: &Built) -> Result<PathBuf> {
    let tree = target()?.join("tree");
    tree_at(built, &repo(), &tree)?;
    Ok(tree)
}

/// The same for any place of the checkout and of the tree.
pub fn tree_at(built: &Built, checkout: &Path, tree: &Path) -> Result<()> {
    fs::create_dir_all(tree)?;
    shared(built, tree)?;
    copy_if_different(&built.archive, &tree.join("libdrex.a"))?;
    let include = INCLUDE.map(|f| checkout.join(f).display().to_string());
    let texts = Texts {
        version: &built.version,
        prefix: escaped(&tree.display().to_string()),
        pc_libdir: "${prefix}".to_owned(),
        cflags: include
            .iter()
            .map(|i| format!("-I{} ", escaped(i)))
            .collect(),
        up: ".".to_owned(),
        libdir: ".".to_owned(),
        include_dirs: include.iter().map(|i| format!("\"{i}\" ")).collect(),
    };
    texts.write(&tree.join("drex.pc"), tree)
}

/// A path as a word in drex.pc. (Where the file finds itself, by `pcfiledir`, pkg-config does this.)
fn escaped(path: &str) -> String {
    path.replace('\\', "\\\\").replace(' ', "\\ ")
}

/// What the templates in packaging/ leave open.
struct Texts<'a> {
    version: &'a str,
    prefix: String,
    pc_libdir: String,
    cflags: String,
    /// From the CMake files to the prefix.
    up: String,
    libdir: String,
    include_dirs: String,
}

impl Texts<'_> {
    fn write(&self, pc: &Path, cmake: &Path) -> Result<()> {
        let system: Vec<String> = SYSTEM_LIBS.iter().map(|l| format!("-l{l}")).collect();
        let values = [
            ("PREFIX", self.prefix.as_str()),
            ("INCLUDEDIR", "${prefix}/include"),
            ("CFLAGS", self.cflags.trim_end()),
            ("VERSION", self.version),
            ("MAJOR", self.version.split('.').next().unwrap_or_default()),
            ("SOVERSION", SOVERSION),
            ("UP", &self.up),
            ("INCLUDE_DIRS", self.include_dirs.trim_end()),
            ("SYSTEM_LIBS", &system.join(" ")),
            ("SYSTEM_LIBS_CMAKE", &SYSTEM_LIBS.join(";")),
        ];
        let fill = |template: &str, libdir: &str, to: &Path| -> Result<()> {
            let path = repo().join("packaging").join(template);
            let mut text = fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            for (name, value) in values.iter().chain([&("LIBDIR", libdir)]) {
                text = text.replace(&format!("@{name}@"), value);
            }
            if text.contains('@') {
                bail!("{template} has a name that nothing fills in");
            }
            fs::create_dir_all(to.parent().context("no folder")?)?;
            fs::write(to, text).with_context(|| format!("cannot write {}", to.display()))
        };
        fill("drex.pc.in", &self.pc_libdir, pc)?;
        for name in ["drex-config.cmake", "drex-config-version.cmake"] {
            fill(&format!("{name}.in"), &self.libdir, &cmake.join(name))?;
        }
        Ok(())
    }
}
