// SPDX-License-Identifier: Apache-2.0

//! What CMake's `find_package` takes and what not.

use std::{fs, os::unix::fs::symlink, path::Path};

use anyhow::{Context, Result, ensure};
use drex_build::cache::{self, repo};

use crate::kit::Kit;

/// Configures a project that asks for drex; what CMake says where that fails.
fn asks(kit: &Kit, prefix: &Path, asked: &str) -> Result<Option<String>> {
    let project = fs::read_to_string(repo().join("tests/consumers/cmake/CMakeLists.txt"))?;
    let dir = kit.scratch("cmake-asks")?;
    let own = "drex 0.1 REQUIRED";
    ensure!(
        project.contains(own),
        "the project does not ask for drex 0.1"
    );
    let text = project.replace(own, &format!("{asked} REQUIRED"));
    fs::write(dir.join("CMakeLists.txt"), text)?;
    for name in ["main.c", "main.cpp"] {
        fs::write(dir.join(name), "")?;
    }
    let mut at = std::ffi::OsString::from("-DCMAKE_PREFIX_PATH=");
    at.push(prefix);
    let mut command = kit.command("cmake");
    command.args(["-S", ".", "-B", "build"]).arg(at);
    let out = command.current_dir(&dir).output()?;
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    Ok((!out.status.success()).then_some(text))
}

pub fn refuses(kit: &Kit) -> Result<()> {
    for (asked, words) in [
        ("drex 0.99", "not accepted"),
        ("drex 1", "not accepted"),
        ("drex COMPONENTS python", "drex has no component python"),
    ] {
        let said = asks(kit, &kit.prefix, asked)?;
        ensure!(
            said.as_ref().is_some_and(|text| text.contains(words)),
            "find_package({asked}) should fail with \"{words}\": {said:?}"
        );
    }
    // Half an installation has a sentence, too.
    let dir = kit.scratch("cmake-half")?;
    cache::files(&kit.prefix, &|_| false)?
        .iter()
        .filter(|f| !f.ends_with("libdrex.a"))
        .try_for_each(|file| link(kit, file, &dir))?;
    let said = asks(kit, &dir, "drex 0.1.0")?;
    ensure!(
        said.as_ref()
            .is_some_and(|t| t.contains("libdrex.a is missing") || t.contains("is not whole")),
        "without libdrex.a: {said:?}"
    );
    Ok(())
}

fn link(kit: &Kit, file: &Path, to: &Path) -> Result<()> {
    let to = to.join(file);
    fs::create_dir_all(to.parent().context("no folder")?)?;
    // The files that find themselves by their own place are copied.
    if file.extension().is_some_and(|e| e == "cmake") {
        fs::copy(kit.prefix.join(file), to)?;
    } else {
        symlink(kit.prefix.join(file), to)?;
    }
    Ok(())
}

pub fn ranges(kit: &Kit) -> Result<()> {
    let dir = kit.scratch("cmake-0.3.0")?;
    for file in cache::files(&kit.prefix, &|_| false)? {
        link(kit, &file, &dir)?;
    }
    // The same installation, were it version 0.3.0.
    let file = dir.join("lib/cmake/drex/drex-config-version.cmake");
    let text = fs::read_to_string(&file)?;
    let later = text.replace(
        &format!("set(PACKAGE_VERSION \"{}\")", kit.version),
        "set(PACKAGE_VERSION \"0.3.0\")",
    );
    ensure!(later != text, "{text}");
    fs::write(&file, later)?;
    for (asked, taken) in [
        ("drex 0.1...<0.2", false),
        ("drex 0.1...0.2", false),
        ("drex 0.1...<0.3.0", false),
        ("drex 0.3.1...0.9", false),
        ("drex 1...2", false),
        ("drex 0.4", false),
        ("drex 0.1 EXACT", false),
        ("drex 0.1...0.3.0", true),
        ("drex 0.1...<0.4", true),
        ("drex 0.3...0.9", true),
        ("drex 0.1", true),
        ("drex 0.3.0 EXACT", true),
        ("drex", true),
    ] {
        let said = asks(kit, &dir, asked)?;
        let as_it_should = match &said {
            None => taken,
            Some(text) => !taken && text.contains("not accepted"),
        };
        ensure!(
            as_it_should,
            "find_package({asked}) with 0.3.0 installed, which should {}: {said:?}",
            if taken { "be found" } else { "be refused" }
        );
    }
    Ok(())
}
