// SPDX-License-Identifier: Apache-2.0

//! Packages of Python, each installed into a folder of its own in the cache.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::{cache::Cache, fetch::Python, process};

pub struct Package {
    pub name: &'static str,
    /// Modules that can be imported then.
    pub module: &'static str,
    /// Requirements, apart by spaces.
    pub pinned: &'static str,
    /// For a Python that the pinned versions left behind.
    pub wide: &'static str,
}

/// Where a package is; nothing where Python has it already.
pub fn package(cache: &Cache, python: &Python, package: &Package) -> Result<Option<PathBuf>> {
    let name = package.name;
    let import = format!("import {}", package.module);
    let has = |path: Option<&PathBuf>| {
        let mut command = python.command();
        command.args(["-c", &import]);
        if let Some(path) = path {
            command.env("PYTHONPATH", path);
        }
        process::output(&mut command).is_ok()
    };
    if has(None) {
        return Ok(None);
    }
    // An extension module is made for one version of Python.
    let version = process::output(
        python
            .command()
            .args(["-c", "import sys; print(sys.implementation.cache_tag)"]),
    )?;
    let dir = cache.path(format!("{name}-{version}"));
    if has(Some(&dir)) {
        return Ok(Some(dir));
    }
    let lock = cache.lock()?;
    let log = cache.log(name)?;
    let temp = cache.temp_dir()?;
    let install = |requirement: &str, target: &str| {
        let mut command = python.wheels(&temp.path().join(target));
        command.args(requirement.split(' '));
        process::logged(&mut command, &format!("installing {name}"), &log, false)
    };
    let mut target = "pinned";
    if install(package.pinned, target).is_err() {
        target = "wide";
        install(package.wide, target).with_context(|| {
            format!("cannot install {name} with pip; install it yourself (Debian, Ubuntu: apt-get install python3-{name})")
        })?;
    }
    temp.publish(target, &dir)?;
    drop(lock);
    ensure!(
        has(Some(&dir)),
        "{name} was installed with pip but cannot be imported from {}",
        dir.display()
    );
    Ok(Some(dir))
}
