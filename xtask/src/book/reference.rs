// SPDX-License-Identifier: Apache-2.0

//! The reference's pages, made from `include/drex.h`: its chapters, its types and constants, its functions. What the
//! header says is what they say; names become links.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

const CHAPTERS: &str = "chapters.md";
const TYPES: &str = "types.md";
const FUNCTIONS: &str = "functions.md";

#[derive(Debug, PartialEq)]
enum Kind {
    Define,
    Type,
    Function,
    /// A comment that belongs to nothing.
    Note,
    /// The title of the items that follow.
    Part,
}

#[derive(Debug)]
struct Item {
    kind: Kind,
    name: String,
    prose: Vec<String>,
    code: String,
}

/// File names and their Markdown.
pub fn pages(header: &str) -> Result<Vec<(&'static str, String)>> {
    let (chapters, rest) = header
        .split_once("#ifndef DREX_H")
        .context("drex.h has no include guard")?;
    let items = items(rest)?;
    let names: BTreeMap<&str, &str> = items
        .iter()
        .filter_map(|item| match item.kind {
            Kind::Function => Some((item.name.as_str(), FUNCTIONS)),
            Kind::Note | Kind::Part => None,
            _ => Some((item.name.as_str(), TYPES)),
        })
        .collect();
    let functions = names.values().filter(|page| **page == FUNCTIONS).count();
    ensure!(
        functions >= 20 && names.len() > functions + 20,
        "drex.h was not understood: {functions} functions of {} names",
        names.len()
    );
    let from = |page| Linker {
        names: &names,
        page,
    };
    Ok(vec![
        (CHAPTERS, chapters_page(chapters, &from(CHAPTERS))),
        (TYPES, types_page(&items, &from(TYPES))),
        (FUNCTIONS, functions_page(&items, &from(FUNCTIONS))),
    ])
}

const MADE: &str = "*Made from `include/drex.h`, which is the specification.*\n\n";

fn chapters_page(comment: &str, linker: &Linker) -> String {
    let mut out = format!("# The header's chapters\n\n{MADE}");
    let lines = plain_comment(comment.trim().lines());
    // Chapters begin with a number and capitals; what stands before the first is the header's own title.
    let mut chapter = Vec::new();
    let mut started = false;
    for line in lines {
        let title = line.split_once(". ").filter(|(number, title)| {
            number.parse::<u32>().is_ok() && *title == title.to_uppercase()
        });
        if let Some((number, title)) = title {
            if started {
                out += &linker.prose(&chapter);
            }
            chapter.clear();
            started = true;
            out += &format!("## {number}. {}\n\n", sentence_case(title));
        } else if started && is_heading(&line) {
            out += &linker.prose(&chapter);
            chapter.clear();
            out += &format!("### {}\n\n", sentence_case(&line));
        } else {
            chapter.push(line);
        }
    }
    out + &linker.prose(&chapter)
}

/// A heading within a chapter.
fn is_heading(line: &str) -> bool {
    line.starts_with(|c: char| c.is_ascii_uppercase())
        && line.contains(' ')
        && line.chars().all(|c| c.is_ascii_uppercase() || c == ' ')
}

fn sentence_case(title: &str) -> String {
    let mut out = String::new();
    for (i, word) in title.split(' ').enumerate() {
        if i > 0 {
            out.push(' ');
        }
        if word.contains('/') || word == "CUDA" {
            out += word;
        } else if i == 0 {
            out += &word[..1];
            out += &word[1..].to_lowercase();
        } else {
            out += &word.to_lowercase();
        }
    }
    out
}

/// The items of one page, with the titles of those parts that have any.
fn of_page(items: &[Item], belongs: impl Fn(&Item) -> bool) -> Vec<&Item> {
    let mut out: Vec<&Item> = Vec::new();
    for item in items {
        if item.kind == Kind::Part {
            out.pop_if(|last| last.kind == Kind::Part);
            out.push(item);
        } else if belongs(item) {
            out.push(item);
        }
    }
    out.pop_if(|last| last.kind == Kind::Part);
    out
}

fn types_page(items: &[Item], linker: &Linker) -> String {
    let mut out = format!("# Types and constants\n\n{MADE}");
    for item in of_page(items, |item| item.kind != Kind::Function) {
        match item.kind {
            Kind::Part => out += &format!("## {}\n\n", item.name),
            Kind::Define => {
                // Short ones are a line of what they belong to, which stands before them.
                let value = item
                    .code
                    .split_once(&item.name)
                    .map_or("", |(_, v)| v.trim());
                out += &format!("<a id=\"{0}\"></a>**`{0}`**", item.name);
                if value.contains('\n') {
                    out += &format!(
                        "\n\n{}```c\n{}\n```\n\n",
                        linker.prose(&item.prose),
                        item.code
                    );
                } else {
                    out += &format!(" = `{value}`  \n{}", linker.prose(&item.prose));
                    if item.prose.is_empty() {
                        out += "\n\n";
                    }
                }
            }
            Kind::Note => out += &linker.prose(&item.prose),
            _ => {
                out += &format!("### {}\n\n{}", item.name, linker.prose(&item.prose));
                out += &format!("```c\n{}\n```\n\n", item.code);
            }
        }
    }
    out
}

fn functions_page(items: &[Item], linker: &Linker) -> String {
    let mut out = format!("# Functions\n\n{MADE}");
    for item in of_page(items, |item| item.kind == Kind::Function) {
        if item.kind == Kind::Part {
            out += &format!("## {}\n\n", item.name);
            continue;
        }
        out += &format!(
            "### {}\n\n```c\n{}\n```\n\n{}",
            item.name,
            item.code,
            linker.prose(&item.prose)
        );
    }
    out
}

/// The text of a comment's lines.
fn plain_comment<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<String> {
    lines
        .map(|line| {
            let line = line.trim_end().trim_end_matches("*/").trim_end();
            let inner = ["//", "/*", " *"].iter().find_map(|p| line.strip_prefix(p));
            let inner = inner.unwrap_or(line);
            inner.strip_prefix(' ').unwrap_or(inner).to_owned()
        })
        .collect()
}

fn items(text: &str) -> Result<Vec<Item>> {
    let mut out = Vec::new();
    let mut comment: Vec<&str> = Vec::new();
    let mut lines = text.lines().peekable();
    lines.next(); // what is left of the guard's line
    while let Some(line) = lines.next() {
        if line.starts_with("//") {
            comment.push(line);
        } else if line.starts_with("/*") {
            comment.push(line);
            let mut last = line;
            while !last.contains("*/") {
                last = lines.next().context("drex.h: a comment without an end")?;
                comment.push(last);
            }
        } else if line.is_empty() {
            if !comment.is_empty() {
                let mut prose = plain_comment(comment.drain(..));
                let part = prose.len() > 1 && prose[0].starts_with("---");
                let (kind, name) = match part {
                    true => (Kind::Part, prose.swap_remove(1)),
                    false => (Kind::Note, String::new()),
                };
                out.push(Item {
                    kind,
                    name,
                    prose,
                    code: String::new(),
                });
            }
        } else if line.starts_with("#define DREX_") && line != "#define DREX_H" || is_code(line) {
            let mut code = vec![line];
            let structure = line.starts_with("typedef struct") && line.ends_with('{');
            let ends = |last: &str| match () {
                () if line.starts_with('#') => !last.ends_with('\\'),
                () if structure => last.starts_with('}'),
                () => last.ends_with(';'),
            };
            while !ends(code[code.len() - 1]) {
                code.push(
                    lines
                        .next()
                        .context("drex.h: a declaration without an end")?,
                );
            }
            let prose = plain_comment(comment.drain(..));
            out.push(item(prose, &code)?);
        } else {
            comment.clear();
        }
    }
    Ok(out)
}

fn is_code(line: &str) -> bool {
    line.starts_with(|c: char| c.is_ascii_alphabetic()) && !line.starts_with("extern")
}

fn item(prose: Vec<String>, code: &[&str]) -> Result<Item> {
    let (first, last) = (code[0], code[code.len() - 1]);
    let word = |text: &str| {
        let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        text[..end.unwrap_or(text.len())].to_owned()
    };
    let (kind, name) = if let Some(define) = first.strip_prefix("#define ") {
        (Kind::Define, word(define))
    } else if let Some((_, pointer)) = first
        .split_once("(*")
        .filter(|_| first.starts_with("typedef"))
    {
        (Kind::Type, word(pointer))
    } else if first.starts_with("typedef") {
        // A pointer to a function has its name in the middle.
        let name = match first.split_once("(*") {
            Some((_, rest)) => word(rest),
            None => word(last.rsplit([' ', '*']).next().unwrap_or_default()),
        };
        (Kind::Type, name)
    } else {
        let before = first.split('(').next().unwrap_or_default();
        let name = before.rsplit([' ', '*']).next().unwrap_or_default();
        (Kind::Function, name.to_owned())
    };
    ensure!(
        name.to_lowercase().starts_with("drex_"),
        "drex.h: no name in {first:?}"
    );
    Ok(Item {
        kind,
        name,
        prose,
        code: code.join("\n"),
    })
}

struct Linker<'a> {
    names: &'a BTreeMap<&'a str, &'a str>,
    page: &'a str,
}

impl Linker<'_> {
    /// Paragraphs, tables of names and their texts, and code.
    fn prose(&self, lines: &[String]) -> String {
        let mut out = String::new();
        let mut paragraphs: Vec<&[String]> = lines
            .split(|l| l.is_empty())
            .filter(|p| !p.is_empty())
            .collect();
        paragraphs.reverse();
        while let Some(paragraph) = paragraphs.pop() {
            if let Some(grid) = self.grid(paragraph) {
                out += &grid;
            } else if table_row(&paragraph[0]).is_some() {
                out += &self.table(paragraph);
            } else if paragraph[0].starts_with("  ") {
                // Code, with the empty lines in it.
                let mut code = vec![paragraph.to_vec()];
                while paragraphs.last().is_some_and(|p| p[0].starts_with("  ")) {
                    code.push(paragraphs.pop().unwrap_or_default().to_vec());
                }
                let code: Vec<String> = code.iter().map(|part| part.join("\n")).collect();
                let code: Vec<String> = code
                    .join("\n\n")
                    .lines()
                    .map(|l| l.strip_prefix("  ").unwrap_or(l).to_owned())
                    .collect();
                out += &format!("```c\n{}\n```\n\n", code.join("\n"));
            } else {
                out += &format!("{}\n\n", self.text(&paragraph.join("\n")));
            }
        }
        out
    }

    /// A table with a line of titles, whose first column has none.
    fn grid(&self, lines: &[String]) -> Option<String> {
        let rows: Vec<Vec<&str>> = lines
            .iter()
            .map(|line| {
                let cells = line.split("  ").map(str::trim);
                cells.filter(|cell| !cell.is_empty()).collect()
            })
            .collect();
        let (titles, rows) = rows.split_first()?;
        let fits = titles.len() > 1 && !rows.is_empty();
        if !fits || rows.iter().any(|row| row.len() != titles.len() + 1) {
            return None;
        }
        let mut out = format!("| | {} |\n", titles.join(" | "));
        out += &format!("|---{}|\n", "|---".repeat(titles.len()));
        for row in rows {
            let cells: Vec<String> = row.iter().map(|cell| self.text(cell)).collect();
            out += &format!("| {} |\n", cells.join(" | "));
        }
        out.push('\n');
        Some(out)
    }

    fn table(&self, lines: &[String]) -> String {
        let mut rows: Vec<(String, String)> = Vec::new();
        let mut after = Vec::new();
        let indent = lines[0].len() - lines[0].trim_start().len();
        for line in lines {
            let here = line.len() - line.trim_start().len();
            match (table_row(line), rows.last_mut()) {
                (Some((name, text)), _) if here == indent => {
                    rows.push((name.to_owned(), text.to_owned()))
                }
                (_, Some(row)) if here > indent => {
                    row.1.push(' ');
                    row.1 += line.trim();
                }
                _ => after.push(line.clone()),
            }
        }
        let mut out = String::from("| | |\n|---|---|\n");
        for (name, text) in rows {
            out += &format!("| `{name}` | {} |\n", self.text(&text).replace('|', "\\|"));
        }
        out.push('\n');
        if !after.is_empty() {
            out += &format!("{}\n\n", self.text(&after.join("\n")));
        }
        out
    }

    /// Markdown of plain text: names become links, what would be markup is escaped. *Emphasis* is meant as such.
    fn text(&self, text: &str) -> String {
        let mut out = String::new();
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            if c.is_ascii_alphabetic() {
                let end = rest
                    .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                    .unwrap_or(rest.len());
                let word = &rest[..end];
                let page = self.names.get(word);
                let code = page.is_some() || word.contains('_');
                // A call and a field are one thing with what they belong to.
                let end = if code {
                    end + suffix(&rest[end..])
                } else {
                    end
                };
                let whole = &rest[..end];
                match page {
                    Some(page) if *page == self.page => out += &format!("[`{whole}`](#{word})"),
                    Some(page) => out += &format!("[`{whole}`]({page}#{word})"),
                    None if code => out += &format!("`{whole}`"),
                    None => out += word,
                }
                rest = &rest[end..];
            } else {
                if "[]<>`\\".contains(c) || c == '*' && out.ends_with(['_', '`']) {
                    out.push('\\');
                }
                out.push(c);
                rest = &rest[c.len_utf8()..];
            }
        }
        out
    }
}

/// How much of `()` or `.field` a text begins with.
fn suffix(text: &str) -> usize {
    if text.starts_with("()") {
        return 2;
    }
    let Some(field) = text.strip_prefix('.') else {
        return 0;
    };
    let end = field.find(|c: char| !c.is_ascii_lowercase() && c != '_' && !c.is_ascii_digit());
    match end.unwrap_or(field.len()) {
        0 => 0,
        n => n + 1,
    }
}

/// `name  what it is`
fn table_row(line: &str) -> Option<(&str, &str)> {
    let (name, text) = line.trim_start().split_once("  ")?;
    let fits = name.len() <= 24
        && !name.is_empty()
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_, ".contains(c));
    (fits && !text.trim().is_empty()).then(|| (name, text.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_understood() -> Result<()> {
        let header = std::fs::read_to_string(drex_build::cache::repo().join("include/drex.h"))?;
        let pages: BTreeMap<_, _> = pages(&header)?.into_iter().collect();
        let chapters = &pages[CHAPTERS];
        assert!(chapters.contains("## 2. The host's loop"), "{chapters}");
        assert!(
            chapters.contains("| `plan` | [`drex_plan()`](functions.md#drex_plan) names"),
            "{chapters}"
        );
        assert!(chapters.contains("### When a window failed"), "{chapters}");
        assert!(
            chapters.contains("| [`drex_plan`](functions.md#drex_plan) | yes | - | - | - | - |"),
            "{chapters}"
        );
        let functions = &pages[FUNCTIONS];
        // Every function that is declared has a heading, by a simpler count.
        let declared = header.lines().filter(|l| {
            l.contains("drex_")
                && l.contains('(')
                && !l.starts_with([' ', '/', '#'])
                && !l.starts_with("typedef")
        });
        assert_eq!(functions.matches("\n### drex_").count(), declared.count());
        assert!(functions.contains("| `capacity` |"));
        let types = &pages[TYPES];
        assert!(types.contains("### drex_config\n"));
        assert!(types.contains("## Engines and their configuration\n"));
        assert!(types.contains("<a id=\"DREX_POLICY_HOLD\"></a>**`DREX_POLICY_HOLD`** = `6`"));
        Ok(())
    }

    #[test]
    fn text_is_escaped_and_linked() {
        let names = BTreeMap::from([("drex_row", TYPES)]);
        let linker = Linker {
            names: &names,
            page: FUNCTIONS,
        };
        assert_eq!(
            linker.text("[n] of drex_row.back, *held* < n_rows. drex_row() *or drex_row."),
            "\\[n\\] of [`drex_row.back`](types.md#drex_row), *held* \\< `n_rows`. \
             [`drex_row()`](types.md#drex_row) *or [`drex_row`](types.md#drex_row)."
        );
    }
}
