// SPDX-License-Identifier: Apache-2.0

//! The cache folder: where it is, its lock, and files and folders that appear in it whole or not at all.

use std::{
    env,
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result, bail};
use fs4::fs_std::FileExt;
use sha2::{Digest, Sha256};

pub struct Cache {
    root: PathBuf,
}

/// Held while there must be only one xtask at something. The kernel drops it with the process, so it is never stale.
pub struct Lock {
    _file: File,
}

impl Cache {
    pub fn open() -> Result<Cache> {
        let root = match (
            env::var_os("DREX_CACHE"),
            env::var_os("XDG_CACHE_HOME"),
            env::var_os("HOME"),
        ) {
            (Some(dir), _, _) if !dir.is_empty() => PathBuf::from(dir),
            (_, Some(dir), _) if Path::new(&dir).is_absolute() => PathBuf::from(dir).join("drex"),
            (_, _, Some(home)) if !home.is_empty() => PathBuf::from(home).join(".cache/drex"),
            _ => bail!("no place for the cache: set DREX_CACHE, XDG_CACHE_HOME or HOME"),
        };
        fs::create_dir_all(&root)
            .with_context(|| format!("cannot create the cache folder {}", root.display()))?;
        // Absolute and free of links: paths below it end up in build systems and compiler caches.
        let root = root.canonicalize()?;
        Ok(Cache { root })
    }

    pub fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.root.join(relative)
    }

    /// For fetching and building.
    pub fn lock(&self) -> Result<Lock> {
        self.lock_file("lock", "fetches or builds")
    }

    /// For running servers that want the whole machine. Two at once do not just share it: their threads spin while they
    /// wait for others that have no core to run on, and both become a hundred times slower.
    pub fn lock_machine(&self) -> Result<Lock> {
        self.lock_file("machine-lock", "measures or tests servers")
    }

    fn lock_file(&self, name: &str, what: &str) -> Result<Lock> {
        let path = self.path(name);
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)?;
        // By their trait's name: newer standard libraries have methods of the same names with other results.
        if !FileExt::try_lock_exclusive(&file)
            .with_context(|| format!("cannot lock {}", path.display()))?
        {
            eprintln!("waiting for another xtask that {what} ({})", path.display());
            FileExt::lock_exclusive(&file)?;
        }
        Ok(Lock { _file: file })
    }

    /// A fresh folder on the cache's own file system, so that what is made in it can be renamed into place.
    pub fn temp_dir(&self) -> Result<TempDir> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let parent = self.path("tmp");
        fs::create_dir_all(&parent)?;
        let path = parent.join(format!(
            "{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        ));
        remove(&path)?;
        fs::create_dir(&path)?;
        Ok(TempDir { path })
    }

    /// Removes what killed runs left behind. Only under the lock.
    pub fn sweep(&self, _lock: &Lock) -> Result<()> {
        remove(&self.path("tmp"))
    }

    pub fn log(&self, name: &str) -> Result<PathBuf> {
        let dir = self.path("log");
        fs::create_dir_all(&dir)?;
        Ok(dir.join(format!("{name}.log")))
    }
}

pub struct TempDir {
    path: PathBuf,
}

impl TempDir {
    /// In the system's folder, for work without the cache's lock: who takes that clears the cache's own.
    pub fn unlocked(name: &str) -> Result<TempDir> {
        let path = env::temp_dir().join(format!("drex-{name}-{}", std::process::id()));
        remove(&path)?;
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(TempDir { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves a file or a folder of this temporary one into place; what was there before is gone.
    pub fn publish(&self, name: impl AsRef<Path>, to: &Path) -> Result<()> {
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        let from = self.path.join(name);
        if to.is_dir() {
            // A folder cannot be renamed onto a full one. Moved aside first, the name is free for an instant only.
            fs::rename(to, self.path.join("replaced"))?;
        }
        fs::rename(&from, to)
            .with_context(|| format!("cannot move {} to {}", from.display(), to.display()))
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = remove(&self.path);
    }
}

/// Removes a file or a folder, or nothing.
pub fn remove(path: &Path) -> Result<()> {
    let result = match fs::symlink_metadata(path) {
        Err(_) => return Ok(()),
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
    };
    result.with_context(|| format!("cannot remove {}", path.display()))
}

/// The clone that the running program belongs to. Cargo names the folder of the program's package.
pub fn repo() -> PathBuf {
    let manifest =
        env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let manifest = PathBuf::from(manifest);
    let root = manifest
        .ancestors()
        .find(|dir| dir.join("Cargo.lock").is_file());
    root.map(Path::to_path_buf).unwrap_or(manifest)
}

/// The folder that an option `--out` names, below the clone or absolute.
pub fn out_dir(name: &Path) -> Result<PathBuf> {
    let dir = repo().join(name);
    writable("--out", &dir)?;
    Ok(dir)
}

/// Makes the folder that an option names, if there is none. An error where it cannot be written to: before what takes long,
/// not after.
pub fn writable(option: &str, dir: &Path) -> Result<()> {
    let probe = dir.join(".probe");
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(dir)?;
        fs::write(&probe, "")?;
        fs::remove_file(&probe)
    };
    write().with_context(|| format!("{option} {}: cannot write there", dir.display()))
}

pub fn bundled_model() -> Result<PathBuf> {
    let path = repo().join("models/ee-rustdoc-16l-q8_0.gguf");
    if !path.is_file() {
        bail!("the bundled model is missing: {}", path.display());
    }
    Ok(path)
}

/// Whether the file is there with this SHA-256. A damaged one is removed.
pub fn has(path: &Path, sha256: &str) -> Result<bool> {
    if !path.is_file() {
        return Ok(false);
    }
    if sha256_file(path)? == sha256 {
        return Ok(true);
    }
    eprintln!("{} is damaged; fetching it again", path.display());
    remove(path)?;
    Ok(false)
}

pub fn sha256_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// A short name for a set of inputs. Each is preceded by its length, so that no two different lists hash alike.
#[derive(Clone, Default)]
pub struct Key(Sha256);

impl Key {
    pub fn with(mut self, part: impl AsRef<[u8]>) -> Key {
        let part = part.as_ref();
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
        self
    }

    pub fn short(self) -> String {
        let mut text = hex(&self.0.finalize());
        text.truncate(12);
        text
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// All files (and links) below a folder, relative to it, sorted.
pub fn files(root: &Path, skip: &dyn Fn(&Path) -> bool) -> Result<Vec<PathBuf>> {
    fn walk(
        root: &Path,
        below: &Path,
        skip: &dyn Fn(&Path) -> bool,
        out: &mut Vec<PathBuf>,
    ) -> Result<()> {
        let dir = root.join(below);
        for entry in fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))? {
            let entry = entry?;
            let relative = below.join(entry.file_name());
            if skip(&relative) {
                continue;
            }
            if entry.file_type()?.is_dir() {
                walk(root, &relative, skip, out)?;
            } else {
                out.push(relative);
            }
        }
        Ok(())
    }
    let mut out = Vec::new();
    walk(root, Path::new(""), skip, &mut out)?;
    out.sort();
    Ok(out)
}

/// Makes `to` a copy of `from` (a file or a link), but leaves it alone, with its mtime, where it is one already:
/// that is what lets ninja see which files really changed. Returns whether it wrote.
pub fn copy_if_different(from: &Path, to: &Path) -> Result<bool> {
    let copy = || -> Result<bool> {
        let meta = fs::symlink_metadata(from)?;
        let old = fs::symlink_metadata(to).ok();
        if meta.is_symlink() {
            let target = fs::read_link(from)?;
            if fs::read_link(to).is_ok_and(|old| old == target) {
                return Ok(false);
            }
            remove(to)?;
            fs::create_dir_all(to.parent().context("no parent")?)?;
            std::os::unix::fs::symlink(target, to)?;
            return Ok(true);
        }
        if let Some(old) = old {
            let same = old.is_file()
                && old.len() == meta.len()
                && old.permissions() == meta.permissions()
                && fs::read(to)? == fs::read(from)?;
            if same {
                return Ok(false);
            }
            if !old.is_file() {
                remove(to)?;
            }
        }
        // Beside it and then over it: a running process may have the old file mapped.
        let mut temp = to.as_os_str().to_owned();
        temp.push(".xtask-tmp");
        fs::create_dir_all(to.parent().context("no parent")?)?;
        // Not `fs::copy`, which some file systems turn into a clone that keeps the old mtime.
        fs::write(&temp, fs::read(from)?)?;
        fs::set_permissions(&temp, meta.permissions())?;
        fs::rename(&temp, to)?;
        Ok(true)
    };
    copy().with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_lists_apart() {
        assert_ne!(
            Key::default().with("ab").with("c").short(),
            Key::default().with("a").with("bc").short()
        );
        assert_eq!(Key::default().with("ab").short().len(), 12);
    }

    #[test]
    fn copies_only_what_differs() -> Result<()> {
        let dir = env::temp_dir().join(format!("xtask-copy-{}", std::process::id()));
        remove(&dir)?;
        fs::create_dir_all(&dir)?;
        let (a, b) = (dir.join("a"), dir.join("sub/b"));
        fs::write(&a, "one")?;
        assert!(copy_if_different(&a, &b)?);
        assert!(!copy_if_different(&a, &b)?);
        fs::write(&a, "two")?;
        assert!(copy_if_different(&a, &b)?);
        assert_eq!(fs::read_to_string(&b)?, "two");
        assert_eq!(
            files(&dir, &|p| p == Path::new("a"))?,
            [PathBuf::from("sub/b")]
        );
        remove(&dir)
    }

    #[test]
    fn a_folder_that_cannot_be_written_to_is_named() {
        let error = format!("{:#}", out_dir(Path::new("/proc/none")).unwrap_err());
        assert!(
            error.contains("--out /proc/none: cannot write there"),
            "{error}"
        );
    }
}
