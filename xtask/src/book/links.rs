// SPDX-License-Identifier: Apache-2.0

//! Looks for dead links in built pages: files that are not there, and anchors that their pages have not.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Component, Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use drex_build::cache;

pub struct Checked {
    pub pages: usize,
    pub links: usize,
    /// Page and link, each in a line.
    pub dead: Vec<String>,
}

pub fn check(root: &Path) -> Result<Checked> {
    let mut pages = BTreeMap::new();
    let mut files = BTreeSet::new();
    for name in cache::files(root, &|_| false)? {
        if name.extension().is_some_and(|e| e == "html") && !name.ends_with("404.html") {
            let text = fs::read_to_string(root.join(&name))?;
            pages.insert(name.clone(), text);
        }
        files.insert(name);
    }
    ensure!(!pages.is_empty(), "{} has no pages", root.display());
    let anchors: BTreeMap<&PathBuf, BTreeSet<String>> = pages
        .iter()
        .map(|(name, text)| (name, attributes(text, "id").collect()))
        .collect();
    let (mut links, mut dead) = (0, Vec::new());
    for (page, text) in &pages {
        for link in attributes(text, "href").chain(attributes(text, "src")) {
            if external(&link) {
                continue;
            }
            links += 1;
            let (path, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = resolve(page, path).with_context(|| format!("{}: {link}", page.display()));
            let alive = target.is_ok_and(|target| {
                files.contains(&target)
                    && (anchor.is_empty()
                        || anchors.get(&target).is_some_and(|a| a.contains(anchor)))
            });
            if !alive {
                dead.push(format!("  {}: {link}", page.display()));
            }
        }
    }
    dead.dedup();
    Ok(Checked {
        pages: pages.len(),
        links,
        dead,
    })
}

pub fn external(link: &str) -> bool {
    // A scheme, or another host.
    link.starts_with("//")
        || link
            .split(['/', '#'])
            .next()
            .is_some_and(|s| s.contains(':'))
}

/// The values of an attribute, wherever it stands in a tag; text cannot hold one, since its quotes or its `<` are escaped.
fn attributes<'a>(html: &'a str, name: &'a str) -> impl Iterator<Item = String> + 'a {
    html.split('<').skip(1).filter_map(move |tag| {
        let tag = tag.split('>').next()?;
        let at = tag.find(&format!(" {name}=\""))?;
        let value = &tag[at + name.len() + 3..];
        Some(decoded(value.split('"').next()?))
    })
}

fn decoded(text: &str) -> String {
    let text = text
        .replace("&amp;", "&")
        .replace("&quot;", "\"")
        .replace("&lt;", "<")
        .replace("&gt;", ">");
    let mut out = Vec::new();
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let hex = text
            .get(at + 1..at + 3)
            .and_then(|h| u8::from_str_radix(h, 16).ok());
        match (bytes[at], hex) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 3;
            }
            (byte, _) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// A link's file below the root; nothing for the page itself is the page.
fn resolve(page: &Path, link: &str) -> Result<PathBuf> {
    if link.is_empty() {
        return Ok(page.to_path_buf());
    }
    ensure!(!link.starts_with('/'), "absolute");
    let mut out = page.parent().unwrap_or(Path::new("")).to_path_buf();
    for part in Path::new(link).components() {
        match part {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => ensure!(out.pop(), "leads out of the book"),
            _ => {}
        }
    }
    if link.ends_with('/') {
        out.push("index.html");
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_is_dead_and_nothing_else() -> Result<()> {
        let dir = std::env::temp_dir().join(format!("xtask-links-{}", std::process::id()));
        cache::remove(&dir)?;
        fs::create_dir_all(dir.join("sub"))?;
        fs::write(
            dir.join("a.html"),
            r##"<h1 id="top">a href="text.html"</h1><a class="x" href="sub/b.html#here">1</a><a href="#top">2</a>
                <a href="sub/b.html#gone">3</a><a href="c.html">4</a><img alt="" src="p.svg"><a href="#no">5</a>
                <a href="https://example.com/x">6</a><a href="mailto:x@example.com">7</a><a href="../out.html">8</a>"##,
        )?;
        fs::write(
            dir.join("sub/b.html"),
            r#"<p id="here"><a href="../a.html#t%6fp">1</a><img src="../p.svg">"#,
        )?;
        fs::write(dir.join("p.svg"), "")?;
        let checked = check(&dir)?;
        cache::remove(&dir)?;
        assert_eq!(
            checked.dead,
            [
                "  a.html: sub/b.html#gone",
                "  a.html: c.html",
                "  a.html: #no",
                "  a.html: ../out.html"
            ]
        );
        assert_eq!((checked.pages, checked.links), (2, 9));
        Ok(())
    }
}
