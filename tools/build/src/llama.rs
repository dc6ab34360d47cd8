// SPDX-License-Identifier: Apache-2.0

//! llama.cpp's source trees and builds.
//!
//! Per source there is one `pristine` tree, one `work` tree and one build folder for that. The work tree is brought to
//! the unpatched or to the patched state by writing only the files that differ, so that ninja rebuilds only what
//! depends on them: the patched build reuses the objects of the unpatched one, and a changed patch costs what it
//! touched. What a build made is copied into a runtime folder of its own, named after everything that went into it.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{
    cache::{self, Cache, Key, Lock, copy_if_different, files},
    cargo, fetch, process,
    tools::{CMAKE_ARGS, Tools},
};

/// Raised when what a runtime folder holds changes, so that folders of older xtasks are not taken for it.
const LAYOUT: &str = "1";

const FLAGS: [&str; 10] = [
    "-DCMAKE_BUILD_TYPE=Release",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DBUILD_SHARED_LIBS=ON",
    // Every binary looks for its libraries beside itself, so that a runtime folder is complete and can be mixed.
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DCMAKE_INSTALL_RPATH=$ORIGIN",
];

/// With these, the result for a row does not depend on how many rows are computed with it. Both concern libggml-cpu
/// only (they are private definitions of that target), so that one library is all that an exact runtime replaces.
const EXACT_FLAGS: [&str; 2] = ["-DGGML_LLAMAFILE=OFF", "-DGGML_CPU_REPACK=OFF"];
const EXACT_TARGET: &str = "ggml-cpu";

/// The same for weights in K-quants: libggml-cpu has tiles for eight rows and more, which add up in another order.
const EXACT_ENV: [(&str, &str); 1] = [("GGML_CPU_TILED_MM", "0")];

/// The RPC backend, which libggml knows of if it is built with it. Built beside the exact libggml-cpu, which libggml needs.
const RPC_FLAG: &str = "-DGGML_RPC=ON";
const RPC_SERVER: &str = "ggml-rpc-server";

/// Arguments of the server without which a row's result depends on its company. A quantised KV cache: with F16 the engine's
/// flash attention takes other paths for one row over many cells, and for many rows. No slot that serves twice: attention adds
/// up in the order of the cells, and a cell that is used again can hold a later token than its neighbour (`-sps 0` makes the
/// server take an unused slot first).
pub const EXACT_ARGS: &[&str] = &["-ctk", "q8_0", "-ctv", "q8_0", "-sps", "0"];

/// What a build of the libraries and the server does not read.
const UNPACKED: [&str; 20] = [
    ".git",
    "app/",
    "benches/",
    "ci/",
    "conversion/",
    "convert",
    "docs/",
    "examples/",
    "gguf-py/",
    "grammars/",
    "media/",
    "models/",
    "pocs/",
    "requirements",
    "scripts/",
    "skills/",
    "tests/",
    "AUTHORS",
    "flake",
    "pyproject",
];

const SONAME: &str = "libdrex.so.0";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Reference,
    Patched,
    ReferenceExact,
    PatchedExact,
    /// The patched exact build with the RPC backend and a server for it.
    PatchedRpc,
}

impl Kind {
    /// In an order of building that compiles the least.
    const ALL: [Kind; 5] = [
        Kind::Reference,
        Kind::ReferenceExact,
        Kind::Patched,
        Kind::PatchedExact,
        Kind::PatchedRpc,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Reference => "reference",
            Kind::Patched => "patched",
            Kind::ReferenceExact => "reference-exact",
            Kind::PatchedExact => "patched-exact",
            Kind::PatchedRpc => "patched-rpc",
        }
    }

    pub fn is_patched(self) -> bool {
        matches!(self, Kind::Patched | Kind::PatchedExact | Kind::PatchedRpc)
    }

    pub fn is_exact(self) -> bool {
        matches!(
            self,
            Kind::ReferenceExact | Kind::PatchedExact | Kind::PatchedRpc
        )
    }

    /// The build that this one is made from.
    fn base(self) -> Kind {
        if self.is_patched() {
            Kind::Patched
        } else {
            Kind::Reference
        }
    }
}

/// A folder with llama-server, its libraries and their headers.
#[derive(Clone)]
pub struct Runtime {
    pub kind: Kind,
    pub dir: PathBuf,
}

impl Runtime {
    pub fn server(&self) -> PathBuf {
        self.dir.join("llama-server")
    }

    /// What the environment of its programs has.
    pub fn env(&self) -> &'static [(&'static str, &'static str)] {
        if self.kind.is_exact() {
            &EXACT_ENV
        } else {
            &[]
        }
    }

    /// A build with the RPC backend has one.
    pub fn rpc_server(&self) -> PathBuf {
        self.dir.join(RPC_SERVER)
    }
}

pub struct Llama<'a> {
    cache: &'a Cache,
    user_source: Option<PathBuf>,
}

/// What one `ensure` works on, under the lock.
struct Work<'a> {
    cache: &'a Cache,
    lock: &'a Lock,
    tools: Tools,
    dir: PathBuf,
    source_id: String,
    patches: Vec<PathBuf>,
}

impl<'a> Llama<'a> {
    pub fn open(cache: &'a Cache, user_source: Option<&Path>) -> Result<Llama<'a>> {
        let user_source = match user_source {
            None => None,
            Some(dir) => {
                let dir = dir
                    .canonicalize()
                    .with_context(|| format!("--llama-src {}", dir.display()))?;
                if !dir.join("CMakeLists.txt").is_file()
                    || !dir.join("src/llama-model.cpp").is_file()
                {
                    bail!("--llama-src {}: not a checkout of llama.cpp", dir.display());
                }
                Some(dir)
            }
        };
        Ok(Llama { cache, user_source })
    }

    /// The unpatched source.
    pub fn source(&self) -> Result<PathBuf> {
        let lock = self.cache.lock()?;
        Ok(self.prepare(&lock)?.pristine())
    }

    pub fn ensure_one(&self, kind: Kind) -> Result<Runtime> {
        Ok(self.ensure(&[kind])?.remove(0))
    }

    /// Builds what is missing of these, in an order that compiles the least, and returns them in the order asked for.
    pub fn ensure(&self, kinds: &[Kind]) -> Result<Vec<Runtime>> {
        // Before the lock: cargo has a lock of its own, and this may take a while.
        let library = if kinds.iter().any(|k| k.is_patched()) {
            Some(cargo::build_library()?)
        } else {
            None
        };
        let lock = self.cache.lock()?;
        self.cache.sweep(&lock)?;
        let work = self.prepare(&lock)?;
        if kinds.iter().any(|k| k.is_patched()) && work.patches.is_empty() {
            bail!("there are no patches in {}", patch_dir().display());
        }
        let mut made = Vec::new();
        for kind in Kind::ALL.into_iter().filter(|k| kinds.contains(k)) {
            made.push(work.runtime(kind, library.as_deref())?);
        }
        work.prune()?;
        Ok(kinds
            .iter()
            .filter_map(|k| made.iter().find(|r| r.kind == *k).cloned())
            .collect())
    }

    fn prepare<'l>(&'l self, lock: &'l Lock) -> Result<Work<'l>> {
        let tools = Tools::find(self.cache, lock)?;
        let (dir, source_id);
        match &self.user_source {
            None => {
                let id = &fetch::SHA256[..12];
                dir = self.cache.path(format!("llama/{id}"));
                source_id = id.to_owned();
                let pristine = dir.join("pristine");
                if !pristine.is_dir() {
                    let archive = fetch::archive(self.cache, lock)?;
                    eprintln!("unpacking llama.cpp");
                    let temp = self.cache.temp_dir()?;
                    fetch::unpack(&archive, &temp.path().join("source"))?;
                    temp.publish("source", &pristine)?;
                }
            }
            Some(user) => {
                let id = Key::default()
                    .with(user.as_os_str().as_encoded_bytes())
                    .short();
                dir = self.cache.path(format!("llama/user-{id}"));
                let pristine = dir.join("pristine");
                let skip = |path: &Path| {
                    let first = path
                        .components()
                        .next()
                        .map(|c| c.as_os_str().to_string_lossy().into_owned());
                    first.is_some_and(|name| {
                        name == ".git" || name.starts_with("build") && user.join(&name).is_dir()
                    })
                };
                mirror(user, &pristine, &skip)?;
                // The mirror keeps the mtimes of what did not change: they name the content well enough.
                let mut key = Key::default();
                for path in files(&pristine, &|_| false)? {
                    let meta = fs::symlink_metadata(pristine.join(&path))?;
                    let stamp = format!("{} {} {:?}", path.display(), meta.len(), meta.modified()?);
                    key = key.with(stamp);
                }
                source_id = key.short();
            }
        }
        Ok(Work {
            cache: self.cache,
            lock,
            tools,
            dir,
            source_id,
            patches: patches()?,
        })
    }

    /// Writes what a machine without Rust and network needs to build llama.cpp with CUDA: the library, and the patched
    /// source without what that build and our patches do not touch, as an archive.
    pub fn pack(&self, to: &Path) -> Result<PathBuf> {
        let library = cargo::build_library()?;
        let lock = self.cache.lock()?;
        let work = self.prepare(&lock)?;
        let temp = self.cache.temp_dir()?;
        let tree = temp.path().join("llama.cpp");
        let unused = |path: &Path| {
            let name = path.to_string_lossy();
            UNPACKED.iter().any(|p| name.starts_with(p))
                || name.starts_with("ggml/src/ggml-")
                    && name.matches('/').count() > 2
                    && !["cpu", "cuda", "rpc"].contains(
                        &name["ggml/src/ggml-".len()..]
                            .split('/')
                            .next()
                            .unwrap_or_default(),
                    )
        };
        mirror(&work.pristine(), &tree, &unused)?;
        for patch in &work.patches {
            apply(patch, &tree)?;
        }
        for path in added()? {
            copy_if_different(&added_dir().join(&path), &tree.join(&path))?;
        }
        fs::create_dir_all(to)?;
        let archive = to.join("llama.cpp.tar.xz");
        process::output(
            Command::new("tar")
                .arg("-C")
                .arg(&tree)
                .arg("-cJf")
                .arg(&archive)
                .arg("."),
        )?;
        let packed = to.join("libdrex.so");
        copy_if_different(&library, &packed)?;
        // Debug information would be most of it.
        process::output(Command::new("strip").arg("--strip-debug").arg(&packed))?;
        Ok(archive)
    }

    /// Compiles the user's source with staged files in the place of its own, on after errors. Returns the log, and
    /// whether all of it was built.
    pub(crate) fn compile_anyway(&self, stage: &Path) -> Result<(PathBuf, Result<()>)> {
        let library = cargo::build_library()?;
        let lock = self.cache.lock()?;
        let work = self.prepare(&lock)?;
        work.install_drex(&library)?;
        let overlay = files(stage, &|_| false)?.into_iter().collect();
        work.write_tree(stage, &overlay)?;
        let build = work.build_dir("build");
        let built = work.build(&build, Kind::Patched, &[], "llama-server", "port", true);
        Ok((self.cache.log("llama-port")?, built))
    }

    /// Compiles our own programs for a runtime: `tools/*.cpp` for an unpatched one, `tests/*.cpp` for a patched one.
    pub fn tools(&self, runtime: &Runtime) -> Result<Vec<PathBuf>> {
        let (folder, prefix) = if runtime.kind.is_patched() {
            ("tests", "")
        } else {
            ("tools", "drex-")
        };
        let folder = cache::repo().join("integration/llama.cpp").join(folder);
        if !folder.is_dir() {
            return Ok(Vec::new());
        }
        let lock = self.cache.lock()?;
        let tools = Tools::find(self.cache, &lock)?;
        let mut made = Vec::new();
        for source in files(&folder, &|_| false)? {
            if source.extension().is_some_and(|e| e == "cpp") {
                let stem = source.file_stem().context("no name")?.to_string_lossy();
                let name = format!("{prefix}{stem}");
                made.push(self.compiled(&tools, runtime, &[folder.join(&source)], &name, &[])?);
            }
        }
        Ok(made)
    }

    /// `drex-score`, compiled for an unpatched runtime.
    pub fn scorer(&self, runtime: &Runtime) -> Result<PathBuf> {
        self.tools(runtime)?
            .into_iter()
            .find(|tool| tool.ends_with("drex-score"))
            .context("integration/llama.cpp/tools/score.cpp is missing")
    }

    /// Compiles a program of ours that uses libllama's windows and libdrex.
    pub fn program(&self, runtime: &Runtime, source: &Path, name: &str) -> Result<PathBuf> {
        let lock = self.cache.lock()?;
        let tools = Tools::find(self.cache, &lock)?;
        let mut include = OsString::from("-I");
        include.push(cache::repo().join("include"));
        let more = [include, "-ldrex".into(), "-ldl".into()];
        self.compiled(&tools, runtime, &[source.to_owned()], name, &more)
    }

    /// Compiles what `drex-tune` asks of the engine.
    pub fn tune_engine(&self, runtime: &Runtime) -> Result<PathBuf> {
        let folder = cache::repo().join("integration/llama.cpp/tune");
        let lock = self.cache.lock()?;
        let tools = Tools::find(self.cache, &lock)?;
        let sources: Vec<PathBuf> = files(&folder, &|_| false)?
            .into_iter()
            .filter(|f| f.extension().is_some_and(|e| e == "cpp"))
            .map(|f| folder.join(f))
            .collect();
        self.compiled(&tools, runtime, &sources, "drex-tune-engine", &[])
    }

    /// A program beside a runtime's libraries, compiled anew if it, a header beside its sources or one of drex changed.
    fn compiled(
        &self,
        tools: &Tools,
        runtime: &Runtime,
        sources: &[PathBuf],
        name: &str,
        more: &[OsString],
    ) -> Result<PathBuf> {
        let mut key = Key::default().with(&tools.fingerprint);
        for source in sources {
            key = key.with(fs::read(source)?);
        }
        let first = sources.first().context("no source")?;
        let mut headers = vec![first.parent().context("no folder")?.to_owned()];
        if !more.is_empty() {
            headers.push(cache::repo().join("include"));
        }
        for folder in headers {
            for header in files(&folder, &|_| false)? {
                if header.extension().is_some_and(|e| e == "h") {
                    key = key.with(fs::read(folder.join(header))?);
                }
            }
        }
        let key = key.short();
        let program = runtime.dir.join(name);
        let stamp = runtime.dir.join(format!("{name}.key"));
        if process::is_executable(&program)
            && fs::read_to_string(&stamp).is_ok_and(|old| old == key)
        {
            return Ok(program);
        }
        let temp = runtime.dir.join(format!("{name}.xtask-tmp"));
        let mut command = Command::new(&tools.cxx);
        command
            .args(["-std=c++17", "-O2", "-Wall"])
            .args(sources)
            .arg("-I")
            .arg(runtime.dir.join("include"));
        command.arg("-L").arg(&runtime.dir).args(more).args([
            "-lllama",
            "-lggml",
            "-lggml-base",
            "-lpthread",
        ]);
        // The linker wants to see what our libraries need in turn.
        let mut link = OsString::from("-Wl,-rpath-link,");
        link.push(&runtime.dir);
        command
            .arg(link)
            .arg("-Wl,-rpath,$ORIGIN")
            .arg("-o")
            .arg(&temp);
        let file = first.file_name().unwrap_or_default().to_string_lossy();
        let log = self.cache.log(&format!("tool-{name}"))?;
        process::logged(&mut command, &format!("compiling {file}"), &log, false)?;
        fs::rename(&temp, &program)?;
        fs::write(&stamp, key)?;
        Ok(program)
    }
}

fn patch_dir() -> PathBuf {
    cache::repo().join("integration/llama.cpp/patches")
}

/// Files of our own, in folders that mirror where they go.
pub(crate) fn added_dir() -> PathBuf {
    cache::repo().join("integration/llama.cpp/tree")
}

pub(crate) fn added() -> Result<Vec<PathBuf>> {
    files(&added_dir(), &|_| false)
}

/// In the order of their names, which is the order that they apply in.
pub(crate) fn patches() -> Result<Vec<PathBuf>> {
    let dir = patch_dir();
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let names = files(&dir, &|_| false)?;
    Ok(names
        .into_iter()
        .filter(|p| p.extension().is_some_and(|e| e == "patch"))
        .map(|p| dir.join(p))
        .collect())
}

/// Makes `to` the same as `from`, touching only what differs.
fn mirror(from: &Path, to: &Path, skip: &dyn Fn(&Path) -> bool) -> Result<()> {
    fs::create_dir_all(to)?;
    let wanted: BTreeSet<_> = files(from, skip)?.into_iter().collect();
    for path in files(to, &|_| false)? {
        if !wanted.contains(&path) {
            cache::remove(&to.join(path))?;
        }
    }
    for path in wanted {
        copy_if_different(&from.join(&path), &to.join(&path))?;
    }
    Ok(())
}

/// The files that a patch names, old and new names alike.
fn touched(patch: &str) -> BTreeSet<PathBuf> {
    let strip = |name: &str| {
        let name = name.split('\t').next().unwrap_or(name).trim_end();
        let name = name
            .strip_prefix("a/")
            .or_else(|| name.strip_prefix("b/"))?;
        let path = PathBuf::from(name);
        path.components()
            .all(|c| matches!(c, std::path::Component::Normal(_)))
            .then_some(path)
    };
    let mut out = BTreeSet::new();
    for line in patch.lines() {
        if let Some(name) = line
            .strip_prefix("--- ")
            .or_else(|| line.strip_prefix("+++ "))
        {
            out.extend(strip(name));
        } else if let Some(names) = line.strip_prefix("diff --git ") {
            // Empty files, modes and renames have no ---/+++ lines.
            if let Some((old, new)) = names.split_once(" b/") {
                out.extend(strip(old));
                out.extend(strip(&format!("b/{new}")));
            }
        } else if let Some(name) = line
            .strip_prefix("rename from ")
            .or_else(|| line.strip_prefix("rename to "))
        {
            out.extend(strip(&format!("b/{name}")));
        }
    }
    out
}

impl Work<'_> {
    fn pristine(&self) -> PathBuf {
        self.dir.join("pristine")
    }

    fn tree(&self) -> PathBuf {
        self.dir.join("work")
    }

    /// Where the work tree finds the library: the same place for every clone, or each would rebuild the other's.
    fn drex(&self) -> PathBuf {
        self.dir.join("drex")
    }

    fn build_key(&self, kind: Kind) -> Result<String> {
        let mut key = Key::default()
            .with(LAYOUT)
            .with(&self.source_id)
            .with(&self.tools.fingerprint);
        for flag in FLAGS {
            key = key.with(flag);
        }
        if kind.is_patched() {
            for patch in &self.patches {
                key = key
                    .with(patch.file_name().unwrap_or_default().as_encoded_bytes())
                    .with(fs::read(patch)?);
            }
            for path in added()? {
                key = key
                    .with(path.as_os_str().as_encoded_bytes())
                    .with(fs::read(added_dir().join(&path))?);
            }
            let include = cache::repo().join("include");
            for header in files(&include, &|_| false)? {
                key = key.with(fs::read(include.join(header))?);
            }
        }
        if kind.is_exact() {
            for flag in EXACT_FLAGS {
                key = key.with(flag);
            }
        }
        if kind == Kind::PatchedRpc {
            key = key.with(RPC_FLAG).with(RPC_SERVER);
        }
        Ok(key.short())
    }

    fn runtime(&self, kind: Kind, library: Option<&Path>) -> Result<Runtime> {
        let key = self.build_key(kind)?;
        let dir = self.dir.join("run").join(format!("{}-{key}", kind.name()));
        if !dir.is_dir() {
            if kind == Kind::PatchedRpc {
                let base = self.runtime(Kind::PatchedExact, library)?;
                self.make_rpc(&base, &dir)?;
            } else if kind.is_exact() {
                let base = self.runtime(kind.base(), library)?;
                self.make_exact(kind, &base, &dir)?;
            } else {
                self.make(kind, library, &dir)?;
            }
        }
        // Apart from the build: a change of the library alone needs no build of llama.cpp.
        if let Some(library) = library.filter(|_| kind.is_patched()) {
            install_library(library, &dir)?;
        }
        // For `prune`, which removes what has not been asked for longest.
        fs::write(dir.join("used"), "")?;
        Ok(Runtime { kind, dir })
    }

    /// The library and its headers, for the work tree's build.
    fn install_drex(&self, library: &Path) -> Result<()> {
        let include = self.drex().join("include");
        mirror(&cache::repo().join("include"), &include, &|_| false)?;
        install_library(library, &self.drex().join("lib"))
    }

    fn make(&self, kind: Kind, library: Option<&Path>, dir: &Path) -> Result<()> {
        self.set_tree(kind)?;
        if let Some(library) = library {
            self.install_drex(library)?;
        }
        let build = self.build_dir("build");
        self.build(&build, kind, &[], "llama-server", kind.name(), false)?;

        let temp = self.cache.temp_dir()?;
        let run = temp.path().join("run");
        let bin = build.join("bin");
        for name in files(&bin, &|_| false)? {
            let text = name.to_string_lossy();
            if text == "llama-server" || text.starts_with("lib") && text.contains(".so") {
                copy_if_different(&bin.join(&name), &run.join(&name))?;
            }
        }
        for folder in ["include", "ggml/include", "src"] {
            let from = self.tree().join(folder);
            for name in files(&from, &|p| from.join(p).is_dir())? {
                if name.extension().is_some_and(|e| e == "h" || e == "hpp") {
                    copy_if_different(&from.join(&name), &run.join("include").join(&name))?;
                }
            }
        }
        if let Some(library) = library.filter(|_| kind.is_patched()) {
            install_library(library, &run)?;
        }
        let mut check = Command::new(run.join("llama-server"));
        check.arg("--version").env_remove("LD_LIBRARY_PATH");
        process::output(&mut check).context("the server was built but does not run")?;
        temp.publish("run", dir)
    }

    fn make_exact(&self, kind: Kind, base: &Runtime, dir: &Path) -> Result<()> {
        let library = self.exact_library(kind)?;
        let temp = self.cache.temp_dir()?;
        let run = temp.path().join("run");
        copy_runtime(base, &run)?;
        let mut replaced = 0;
        for name in files(&library, &|_| false)? {
            if !run.join(&name).exists() {
                bail!(
                    "{} is not among the libraries that the server uses",
                    name.display()
                );
            }
            copy_if_different(&library.join(&name), &run.join(&name))?;
            replaced += 1;
        }
        if replaced == 0 {
            bail!("the exact build made no library");
        }
        temp.publish("run", dir)
    }

    fn make_rpc(&self, base: &Runtime, dir: &Path) -> Result<()> {
        self.set_tree(Kind::Patched)?;
        let build = self.build_dir("build-exact");
        let flags = [&EXACT_FLAGS[..], &[RPC_FLAG]].concat();
        self.build(
            &build,
            Kind::PatchedRpc,
            &flags,
            RPC_SERVER,
            "RPC backend",
            false,
        )?;
        let temp = self.cache.temp_dir()?;
        let run = temp.path().join("run");
        copy_runtime(base, &run)?;
        let bin = build.join("bin");
        for name in files(&bin, &|_| false)? {
            let text = name.to_string_lossy();
            if text == RPC_SERVER
                || text.starts_with("libggml.so")
                || text.starts_with("libggml-rpc.so")
            {
                copy_if_different(&bin.join(&name), &run.join(&name))?;
            }
        }
        if !run.join(RPC_SERVER).is_file() {
            bail!("the build made no {RPC_SERVER}");
        }
        temp.publish("run", dir)
    }

    /// libggml-cpu with the exact flags. Its name comes from what it is built from alone, so that the unpatched and the
    /// patched runtime share it as long as no patch touches ggml.
    fn exact_library(&self, kind: Kind) -> Result<PathBuf> {
        let mut key = Key::default()
            .with(LAYOUT)
            .with(&self.source_id)
            .with(&self.tools.fingerprint);
        for flag in FLAGS.iter().chain(&EXACT_FLAGS) {
            key = key.with(flag);
        }
        if kind.is_patched() {
            for patch in &self.patches {
                let text = String::from_utf8_lossy(&fs::read(patch)?).into_owned();
                if touched(&text).iter().any(|path| path.starts_with("ggml")) {
                    key = key.with(text);
                }
            }
        }
        let dir = self
            .dir
            .join("run")
            .join(format!("ggml-cpu-exact-{}", key.short()));
        if dir.is_dir() {
            return Ok(dir);
        }
        // A runtime of this kind exists by now, so that the tree's state is a matter of these few files only.
        self.set_tree(kind.base())?;
        let build = self.build_dir("build-exact");
        self.build(
            &build,
            kind,
            &EXACT_FLAGS,
            EXACT_TARGET,
            "exact libggml-cpu",
            false,
        )?;
        let temp = self.cache.temp_dir()?;
        let bin = build.join("bin");
        for name in files(&bin, &|_| false)? {
            if name.to_string_lossy().starts_with("libggml-cpu.so") {
                copy_if_different(&bin.join(&name), &temp.path().join("lib").join(&name))?;
            }
        }
        temp.publish("lib", &dir)?;
        Ok(dir)
    }

    /// Per compiler and processor: ninja does not see that the same command now means something else.
    fn build_dir(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}-{}", self.tools.fingerprint))
    }

    /// Brings the work tree to the state of this kind.
    fn set_tree(&self, kind: Kind) -> Result<()> {
        let pristine = self.pristine();
        let mut overlay = BTreeSet::new();
        let temp = self.cache.temp_dir()?;
        let stage = temp.path().join("stage");
        fs::create_dir(&stage)?;
        if kind.is_patched() {
            for patch in &self.patches {
                let text =
                    fs::read(patch).with_context(|| format!("cannot read {}", patch.display()))?;
                overlay.extend(touched(&String::from_utf8_lossy(&text)));
            }
            // Only the files that the patches name are staged: applied to copies, a patch that fails leaves no mess.
            for path in overlay.iter().filter(|path| pristine.join(path).exists()) {
                copy_if_different(&pristine.join(path), &stage.join(path))?;
            }
            for patch in &self.patches {
                apply(patch, &stage)?;
            }
            for path in added()? {
                copy_if_different(&added_dir().join(&path), &stage.join(&path))?;
                overlay.insert(path);
            }
        }
        self.write_tree(&stage, &overlay)
    }

    /// Makes the work tree the pristine one, but for the files of the overlay, of which it has those that are staged.
    fn write_tree(&self, stage: &Path, overlay: &BTreeSet<PathBuf>) -> Result<()> {
        let pristine = self.pristine();
        let tree = self.tree();
        fs::create_dir_all(&tree)?;
        let mut wanted: BTreeSet<_> = files(&pristine, &|p| overlay.contains(p))?
            .into_iter()
            .collect();
        for path in &wanted {
            copy_if_different(&pristine.join(path), &tree.join(path))?;
        }
        for path in files(stage, &|_| false)? {
            copy_if_different(&stage.join(&path), &tree.join(&path))?;
            wanted.insert(path);
        }
        for path in files(&tree, &|_| false)? {
            if !wanted.contains(&path) {
                cache::remove(&tree.join(path))?;
            }
        }
        Ok(())
    }

    fn build(
        &self,
        build: &Path,
        kind: Kind,
        extra: &[&str],
        target: &str,
        what: &str,
        after_errors: bool,
    ) -> Result<()> {
        let log = self
            .cache
            .log(&format!("llama-{}", what.replace(' ', "-")))?;
        let patched = kind.is_patched();
        let environment = |command: &mut Command| {
            // llama.cpp asks git what it is; a home folder under version control is not the answer.
            command.env("GIT_CEILING_DIRECTORIES", &self.dir);
            if std::env::var_os("CCACHE_BASEDIR").is_none() {
                // So that a compiler cache serves a cache folder in another place, too.
                command.env("CCACHE_BASEDIR", &self.dir);
            }
        };
        let configure = |append: bool| {
            let mut command = Command::new(&self.tools.cmake);
            command
                .arg("-S")
                .arg(self.tree())
                .arg("-B")
                .arg(build)
                .args(["-G", "Ninja"]);
            command
                .arg(joined("-DCMAKE_MAKE_PROGRAM=", &self.tools.ninja))
                .args(FLAGS)
                .args(extra)
                .args(
                    std::env::var(CMAKE_ARGS)
                        .unwrap_or_default()
                        .split_whitespace(),
                );
            command.arg(if patched {
                "-DLLAMA_DREX=ON"
            } else {
                "-DLLAMA_DREX=OFF"
            });
            if patched {
                command.arg(joined("-DDREX_INCLUDE_DIR=", &self.drex().join("include")));
                command.arg(joined(
                    "-DDREX_LIBRARY=",
                    &self.drex().join("lib/libdrex.so"),
                ));
            }
            environment(&mut command);
            process::logged(
                &mut command,
                &format!("configuring llama.cpp ({what})"),
                &log,
                append,
            )
        };
        if configure(false).is_err() {
            // An old folder may hold on to a cmake or a compiler that is gone.
            eprintln!("configuring again from nothing");
            cache::remove(build)?;
            configure(true)?;
        }
        let jobs = std::env::var("CMAKE_BUILD_PARALLEL_LEVEL")
            .ok()
            .and_then(|n| n.parse::<usize>().ok())
            .or_else(|| std::thread::available_parallelism().ok().map(Into::into))
            .unwrap_or(1);
        let mut command = Command::new(&self.tools.ninja);
        command
            .arg("-C")
            .arg(build)
            .arg("-j")
            .arg(jobs.to_string())
            .arg(target)
            .args(after_errors.then_some(["-k", "0"]).into_iter().flatten())
            .env_remove("NINJA_STATUS");
        environment(&mut command);
        process::logged(
            &mut command,
            &format!("building llama.cpp ({what})"),
            &log,
            true,
        )
    }

    /// Keeps the newest few runtime folders: each changed patch leaves one behind.
    fn prune(&self) -> Result<()> {
        let run = self.dir.join("run");
        for kind in Kind::ALL {
            let mut found = Vec::new();
            for entry in fs::read_dir(&run)? {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy().into_owned();
                // Names are a kind's and a key of 12 digits, and one kind's name starts another's.
                if name.len() == kind.name().len() + 13 && name.starts_with(kind.name()) {
                    let used = fs::metadata(entry.path().join("used"))
                        .and_then(|m| m.modified())
                        .ok();
                    found.push((used, entry.path()));
                }
            }
            found.sort();
            found.reverse();
            for (_, path) in found.into_iter().skip(4) {
                cache::remove(&path)?;
            }
        }
        let _ = self.lock;
        Ok(())
    }
}

/// The server, its libraries and their headers. Our own tools are left out: they are compiled again beside the libraries that
/// a copy gets.
fn copy_runtime(from: &Runtime, to: &Path) -> Result<()> {
    let skip = |p: &Path| {
        let name = p.to_string_lossy();
        !(name == "llama-server" || name.contains(".so") || name.starts_with("include"))
    };
    for name in files(&from.dir, &skip)? {
        copy_if_different(&from.dir.join(&name), &to.join(&name))?;
    }
    Ok(())
}

fn joined(option: &str, path: &Path) -> OsString {
    let mut text = OsString::from(option);
    text.push(path);
    text
}

/// Under its own name for the linker and under its SONAME for the loader.
fn install_library(library: &Path, dir: &Path) -> Result<()> {
    copy_if_different(library, &dir.join(SONAME))?;
    let link = dir.join("libdrex.so");
    if fs::read_link(&link).is_ok_and(|target| target == Path::new(SONAME)) {
        return Ok(());
    }
    cache::remove(&link)?;
    std::os::unix::fs::symlink(SONAME, &link)?;
    Ok(())
}

fn apply(patch: &Path, dir: &Path) -> Result<()> {
    let mut command;
    if process::find_program("git").is_some() {
        command = Command::new("git");
        // Inside of a repository `git apply` silently leaves out what that does not track: let it find none.
        command
            .env("GIT_CEILING_DIRECTORIES", dir.parent().unwrap_or(dir))
            .env_remove("GIT_DIR");
        command.args(["apply", "--whitespace=nowarn"]).arg(patch);
    } else if process::find_program("patch").is_some() {
        command = Command::new("patch");
        command
            .args([
                "-p1",
                "--batch",
                "--forward",
                "--fuzz=0",
                "--no-backup-if-mismatch",
                "-i",
            ])
            .arg(patch);
    } else {
        bail!("neither git nor patch is on PATH (Debian, Ubuntu: apt-get install git)");
    }
    process::output(command.current_dir(dir)).with_context(|| {
        format!(
            "{} does not apply",
            patch.file_name().unwrap_or_default().to_string_lossy()
        )
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_names_from_patches() {
        let patch = "diff --git a/src/a.cpp b/src/a.cpp\n--- a/src/a.cpp\n+++ b/src/a.cpp\n@@ -1 +1 @@\n--- a\n\
                     diff --git a/new.h b/new.h\nnew file mode 100644\n--- /dev/null\n+++ b/new.h\n\
                     diff --git a/x b/y\nrename from x\nrename to y\n";
        let names: Vec<_> = touched(patch)
            .into_iter()
            .map(|p| p.display().to_string())
            .collect();
        assert_eq!(names, ["new.h", "src/a.cpp", "x", "y"]);
    }

    #[test]
    fn no_name_leads_out_of_the_tree() {
        assert!(touched("--- a/../../etc/x\n+++ b/../y\n").is_empty());
    }
}
