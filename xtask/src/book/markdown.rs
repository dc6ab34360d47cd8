// SPDX-License-Identifier: Apache-2.0

//! Links between the Markdown files of the checkout. Who reads them there follows them to any file; the book has pages
//! for some, and a link to another file becomes its text.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    ops::Range,
    path::{Component, Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use pulldown_cmark::{Event, LinkType, Options, Parser, Tag, TagEnd};

use super::links::{Checked, external};
use drex_build::cache;

/// Made from the header; only the book has it.
const REFERENCE: &str = "docs/reference";

/// Where to look for Markdown, besides the checkout's own folder.
const FOLDERS: [&str; 10] = [
    "benches",
    "bindings",
    "demo",
    "docs",
    "examples",
    "integration",
    "kernels",
    "models",
    "tests",
    "tools",
];

/// A link: all of it, and its target.
struct Link {
    whole: Range<usize>,
    text: Range<usize>,
    target: Range<usize>,
}

/// The links and pictures of a text that lead to files or anchors here.
fn links(text: &str) -> Result<Vec<Link>> {
    let mut found = Vec::new();
    // Those that are open: kind, target, all of it, its text.
    let mut open = Vec::new();
    for (event, range) in Parser::new_ext(text, OPTIONS).into_offset_iter() {
        match event {
            Event::Start(Tag::Link {
                link_type,
                dest_url,
                ..
            }) => {
                let begin = range.start + 1;
                open.push((link_type, dest_url, range, begin..begin));
            }
            Event::Start(Tag::Image {
                link_type,
                dest_url,
                ..
            }) => {
                let begin = range.start + 2;
                open.push((link_type, dest_url, range, begin..begin));
            }
            Event::End(TagEnd::Link | TagEnd::Image) => {
                let (kind, target, whole, words) = open.pop().context("a link ends twice")?;
                if let Some((_, _, _, words)) = open.last_mut() {
                    words.end = whole.end;
                }
                if external(&target) {
                    continue;
                }
                // `](`
                let begin = words.end + 2;
                let at = begin..begin + target.len();
                let plain = text.get(at.clone()) == Some(&*target);
                ensure!(
                    kind == LinkType::Inline && plain,
                    "{}: links to files are written [text](target)",
                    &text[whole]
                );
                found.push(Link {
                    whole,
                    text: words,
                    target: at,
                });
            }
            _ => {
                if let Some((_, _, _, words)) = open.last_mut() {
                    words.end = words.end.max(range.end);
                }
            }
        }
    }
    Ok(found)
}

const OPTIONS: Options = Options::ENABLE_TABLES;

/// The anchors of a page's headings, as the book and the hosts of Markdown make them.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut title: Option<String> = None;
    for event in Parser::new_ext(text, OPTIONS) {
        match event {
            Event::Start(Tag::Heading { .. }) => title = Some(String::new()),
            Event::Text(words) | Event::Code(words) => {
                if let Some(title) = &mut title {
                    title.push_str(&words);
                }
            }
            Event::End(TagEnd::Heading(_)) => {
                let slug: String = title
                    .take()
                    .unwrap_or_default()
                    .to_lowercase()
                    .chars()
                    .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
                    .map(|c| if c == ' ' { '-' } else { c })
                    .collect();
                // The same title again gets a number.
                let numbered = (1..).map(|n| format!("{slug}-{n}"));
                let mut names = std::iter::once(slug.clone()).chain(numbered);
                let free = names.find(|name| !found.contains(name));
                found.extend(free);
            }
            _ => {}
        }
    }
    found
}

/// A link's file, from the file that it stands in, both below the checkout.
fn resolve(file: &Path, link: &str) -> Result<PathBuf> {
    ensure!(!link.starts_with('/'), "absolute");
    let mut out = file.parent().unwrap_or(Path::new("")).to_path_buf();
    for part in Path::new(link).components() {
        match part {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => ensure!(out.pop(), "leads out of the checkout"),
            _ => {}
        }
    }
    Ok(out)
}

/// The checkout's Markdown.
pub fn names(repo: &Path) -> Result<Vec<PathBuf>> {
    let is_text = |p: &Path| p.extension().is_some_and(|e| e == "md");
    let mut names = Vec::new();
    for entry in fs::read_dir(repo)? {
        names.push(PathBuf::from(entry?.file_name()));
    }
    for folder in FOLDERS.iter().filter(|f| repo.join(f).is_dir()) {
        let below = cache::files(&repo.join(folder), &|_| false)?;
        names.extend(below.iter().map(|name| Path::new(folder).join(name)));
    }
    names.retain(|name| is_text(name));
    names.sort();
    Ok(names)
}

/// Looks at all Markdown of the checkout.
pub fn check(repo: &Path) -> Result<Checked> {
    let names = names(repo)?;
    let (mut links_seen, mut dead) = (0, Vec::new());
    for name in &names {
        let text = fs::read_to_string(repo.join(name))?;
        for link in links(&text).with_context(|| name.display().to_string())? {
            let link = &text[link.target];
            links_seen += 1;
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() {
                Ok(name.clone())
            } else {
                resolve(name, path)
            };
            let alive = target.is_ok_and(|target| {
                // The built book's links are checked there.
                target.starts_with(REFERENCE)
                    || repo.join(&target).exists()
                        && (anchor.is_empty()
                            || fs::read_to_string(repo.join(&target))
                                .is_ok_and(|text| anchors(&text).contains(anchor)))
            });
            if !alive {
                dead.push(format!("  {}: {link}", name.display()));
            }
        }
    }
    Ok(Checked {
        pages: names.len(),
        links: links_seen,
        dead,
    })
}

/// In a copy of the checkout's part that the book is made from: links to files that it has no page for become text, those
/// in files that a page includes are the page's.
pub fn stage(stage: &Path, repo: &Path) -> Result<()> {
    let mut pages = BTreeMap::new();
    let docs = cache::files(&stage.join("docs"), &|_| false)?;
    for name in docs
        .iter()
        .filter(|n| n.extension().is_some_and(|e| e == "md"))
    {
        let page = Path::new("docs").join(name);
        let text = fs::read_to_string(stage.join(&page))?;
        let included = text
            .trim()
            .strip_prefix("{{#include ")
            .and_then(|t| t.strip_suffix("}}"));
        if let Some(file) = included.filter(|f| f.ends_with(".md")) {
            pages.insert(resolve(&page, file)?, page.clone());
        }
        pages.insert(page.clone(), page);
    }
    for (file, page) in &pages {
        let text = fs::read_to_string(stage.join(file))?;
        let text = rewritten(&text, file, page, &pages, repo)
            .with_context(|| file.display().to_string())?;
        fs::write(stage.join(file), text)?;
    }
    Ok(())
}

fn rewritten(
    text: &str,
    file: &Path,
    page: &Path,
    pages: &BTreeMap<PathBuf, PathBuf>,
    repo: &Path,
) -> Result<String> {
    let (mut out, mut done) = (String::new(), 0);
    for link in links(text)? {
        let target = &text[link.target.clone()];
        if target.starts_with('#') {
            continue;
        }
        ensure!(done <= link.whole.start, "a link within a link: {target}");
        let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
        let at = resolve(file, path).with_context(|| target.to_owned())?;
        let known = pages.get(&at).cloned();
        let in_book =
            at.starts_with(REFERENCE) || at.starts_with("docs") && repo.join(&at).is_file();
        out += &text[done..link.whole.start];
        done = link.whole.end;
        if let Some(to) = known.or_else(|| in_book.then(|| at.clone())) {
            let hash = if anchor.is_empty() { "" } else { "#" };
            out += &text[link.whole.start..link.target.start];
            out += &format!("{}{hash}{anchor})", relative(page, &to));
        } else if repo.join(&at).exists() && !text[link.whole.clone()].starts_with('!') {
            out += &text[link.text];
        } else {
            bail!("dead link: {target}");
        }
    }
    out += &text[done..];
    Ok(out)
}

/// From a page to a file, both below the same folder.
fn relative(page: &Path, to: &Path) -> String {
    let from = page.parent().unwrap_or(Path::new(""));
    let common = from
        .components()
        .zip(to.components())
        .take_while(|(a, b)| a == b)
        .count();
    let up = from.components().count() - common;
    let down: PathBuf = to.components().skip(common).collect();
    format!("{}{}", "../".repeat(up), down.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# A b: C\n… [one](x.md#there) `[no](no.md)` ![p](p.svg)\n```\n[no](no.md)\n# no\n```\n\
                        [`two` [3]](../src/lib.rs) [four](#a-b-c) [five](https://example.com/x) [t](a + b)\n";

    #[test]
    fn finds_links_and_anchors() {
        let found: Vec<_> = links(TEXT)
            .unwrap()
            .into_iter()
            .map(|l| (&TEXT[l.text], &TEXT[l.target]))
            .collect();
        assert_eq!(
            found,
            [
                ("one", "x.md#there"),
                ("p", "p.svg"),
                ("`two` [3]", "../src/lib.rs"),
                ("four", "#a-b-c"),
            ]
        );
        assert_eq!(anchors(TEXT), BTreeSet::from(["a-b-c".to_owned()]));
        let twice = "Title\n=====\n\n## `Code` Ünd *so*\n\n# Title\n";
        let names = ["code-ünd-so", "title", "title-1"].map(str::to_owned);
        assert_eq!(anchors(twice), BTreeSet::from(names));
    }

    #[test]
    fn a_link_that_cannot_be_rewritten_is_refused() {
        for text in ["[a][b]\n\n[b]: x.md\n", "[a](<x y.md>)\n"] {
            let error = links(text).err().expect(text).to_string();
            assert!(error.contains("are written [text](target)"), "{error}");
        }
        assert!(links("[a][b] <https://x.org>\n\n[b]: https://example.com\n").is_ok());
    }

    #[test]
    fn a_page_links_to_pages_and_names_the_rest() -> Result<()> {
        let repo = std::env::temp_dir().join(format!("xtask-markdown-{}", std::process::id()));
        cache::remove(&repo)?;
        for folder in ["docs", "src", "bindings"] {
            fs::create_dir_all(repo.join(folder))?;
        }
        fs::write(repo.join("docs/a.md"), TEXT)?;
        fs::write(repo.join("docs/x.md"), "## There\n")?;
        fs::write(repo.join("docs/p.svg"), "")?;
        fs::write(repo.join("src/lib.rs"), "")?;
        fs::write(repo.join("docs/b.md"), "{{#include ../bindings/b.md}}\n")?;
        fs::write(
            repo.join("bindings/b.md"),
            "# B\n[a](../docs/a.md) [c](c.h) [x](#b)\n",
        )?;
        fs::write(repo.join("bindings/c.h"), "")?;
        assert_eq!(check(&repo)?.dead, Vec::<String>::new());
        fs::write(
            repo.join("README.md"),
            "[a](docs/a.md#no) [b](docs/no.md) [c](docs) [d](../..)",
        )?;
        assert_eq!(
            check(&repo)?.dead,
            [
                "  README.md: docs/a.md#no",
                "  README.md: docs/no.md",
                "  README.md: ../.."
            ]
        );
        stage(&repo, &repo)?;
        let read = |name: &str| fs::read_to_string(repo.join(name));
        assert_eq!(read("bindings/b.md")?, "# B\n[a](a.md) c [x](#b)\n");
        assert_eq!(
            read("docs/a.md")?,
            TEXT.replace("[`two` [3]](../src/lib.rs)", "`two` [3]")
        );
        cache::remove(&repo)
    }
}
