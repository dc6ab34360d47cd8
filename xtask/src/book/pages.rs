// SPDX-License-Identifier: Apache-2.0

//! The pages that a person sees, in a browser: at three widths, light and dark.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use base64::Engine;
use drex_build::{
    cache,
    cargo::{cargo, target_dir},
    process,
};
use drex_harness::browser::{self, Browser, View};
use serde_json::Value;

/// A phone, a tablet, a desk.
const WIDTHS: [u32; 3] = [390, 768, 1280];

/// Tests with this name leave pages with made-up figures in the folder that the variable names.
const TEST: &str = "pages_to_look_at";
const FOLDER: &str = "DREX_PAGES_OUT";
const PACKAGES: [&str; 3] = ["drex-demo", "drex-harness", "drex-sim"];

pub struct Looked {
    pub pages: usize,
    pub views: usize,
    /// Where the pictures are.
    pub folder: PathBuf,
    /// A line for each view that is not well.
    pub faults: Vec<String>,
}

/// Light and dark are laid out alike: dark is for the pictures, where they are wanted. None: there is no browser.
pub fn look(book: &Path, pictures: bool) -> Result<Option<Looked>> {
    let Some(program) = browser::program() else {
        return Ok(None);
    };
    let repo = cache::repo();
    let mut pages = below(book, "html")?;
    pages.retain(|page| {
        !["404.html", "toc.html", "print.html"]
            .iter()
            .any(|n| page.ends_with(n))
    });
    let made = made()?;
    pages.extend(below(&made, "html")?);
    pages.extend(below(&made, "svg")?);
    pages.extend(below(&repo.join("docs"), "svg")?);

    let folder = target_dir()?.join("looked-at");
    cache::remove(&folder)?;
    fs::create_dir_all(&folder)?;
    let mut browser = Browser::start(&program)?;
    let mut looked = Looked {
        pages: pages.len(),
        views: 0,
        faults: Vec::new(),
        folder: folder.clone(),
    };
    for page in &pages {
        for width in WIDTHS {
            for &dark in if pictures {
                &[false, true][..]
            } else {
                &[false]
            } {
                looked.views += 1;
                let scheme = if dark { "dark" } else { "light" };
                let name = short(page, &[book, &made, &repo.join("docs")]);
                browser.open(&format!("file://{}", page.display()), View { width, dark })?;
                let fit: Value = serde_json::from_str(&browser.evaluate(include_str!("look.js"))?)?;
                ensure!(
                    fit["width"] == width,
                    "{name} is {} wide, not {width}",
                    fit["width"]
                );
                // A picture of its own is as wide as it is.
                let is_page = page.extension().is_some_and(|e| e == "html");
                let small = fit["small"].as_array().is_some_and(|s| !s.is_empty());
                for (wrong, what, which) in [
                    (
                        is_page && fit["overflow"] == true,
                        "wider than the window",
                        &fit["wide"],
                    ),
                    (small, "too small to read", &fit["small"]),
                ] {
                    let line = format!("{name} at {width}: {what}: {which}");
                    if wrong && !looked.faults.contains(&line) {
                        looked.faults.push(line);
                    }
                }
                if !pictures {
                    continue;
                }
                let height = fit["height"].as_u64().unwrap_or(0).clamp(1, 6000) as u32;
                let picture = browser.picture(width, height)?;
                let file = folder.join(format!(
                    "{}-{width}-{scheme}.png",
                    name.replace(['/', '.'], "-")
                ));
                fs::write(
                    &file,
                    base64::engine::general_purpose::STANDARD.decode(&picture)?,
                )?;
            }
        }
    }
    Ok(Some(looked))
}

/// Reports and plots of made-up figures.
fn made() -> Result<PathBuf> {
    let folder = target_dir()?.join("pages");
    cache::remove(&folder)?;
    fs::create_dir_all(&folder)?;
    let mut command = cargo();
    command.args(["test", "--quiet", "--lib", "--bins"]);
    for package in PACKAGES {
        command.args(["--package", package]);
    }
    command.arg(TEST).env(FOLDER, &folder);
    process::output(&mut command)?;
    Ok(folder)
}

fn below(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut names = cache::files(folder, &|_| false)?;
    names.retain(|name| name.extension().is_some_and(|e| e == extension));
    ensure!(
        !names.is_empty() || extension == "svg",
        "no pages in {}",
        folder.display()
    );
    names.sort();
    Ok(names.iter().map(|name| folder.join(name)).collect())
}

fn short(page: &Path, folders: &[&Path]) -> String {
    let inside = folders
        .iter()
        .find_map(|folder| page.strip_prefix(folder).ok());
    inside.unwrap_or(page).display().to_string()
}

/// Puts Chromium onto the machine where that needs no question, as root.
pub fn install() -> Result<()> {
    let how =
        "the pages are looked at in Chromium (Debian: apt-get install chromium-headless-shell)";
    if browser::program().is_some() {
        return Ok(());
    }
    let root = process::output(Command::new("id").arg("-u")).is_ok_and(|id| id == "0");
    ensure!(root && process::find_program("apt-get").is_some(), "{how}");
    println!("installing chromium-headless-shell");
    for args in [
        &["update", "-qq"][..],
        &[
            "install",
            "-qq",
            "-y",
            "--no-install-recommends",
            "chromium-headless-shell",
            "fonts-dejavu-core",
        ],
    ] {
        let mut apt = Command::new("apt-get");
        apt.args(args).env("DEBIAN_FRONTEND", "noninteractive");
        process::output(&mut apt).context(how)?;
    }
    ensure!(browser::program().is_some(), "{how}");
    Ok(())
}
