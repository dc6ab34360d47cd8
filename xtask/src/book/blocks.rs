// SPDX-License-Identifier: Apache-2.0

//! The code in the checkout's Markdown: which of it tests compile and run, and that none of it is compiled by nobody.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use drex_build::cache;

/// How many blocks there are of each kind.
#[derive(Default, PartialEq, Eq, Debug)]
pub struct Blocks {
    /// Printed in the page; a test compiles them as they stand, and runs them.
    pub compiled: usize,
    /// Commands that a test runs as they stand.
    pub run: usize,
    /// Parts of programs in `examples/`, which tests compile and run.
    pub included: usize,
    /// Other commands, output, configuration.
    pub shown: usize,
}

/// Languages that are compiled or interpreted.
const CODE: [&str; 4] = ["c", "cpp", "rust", "python"];

/// Its one program is run by the Python package's tests.
const PYTHON: &str = "bindings/python/README.md";

/// `names`: the checkout's Markdown. Who runs a marked block names it in tests/consumers.
pub fn count(repo: &Path, names: &[std::path::PathBuf]) -> Result<Blocks> {
    let mut tests = String::new();
    let folder = repo.join("tests/consumers/checks");
    for name in cache::files(&folder, &|_| false)? {
        tests += &fs::read_to_string(folder.join(name))?;
    }
    let mut all = Blocks::default();
    for name in names {
        let text = fs::read_to_string(repo.join(name))?;
        of_page(&text, name, &tests, &mut all)
            .with_context(|| format!("a block of {}", name.display()))?;
    }
    Ok(all)
}

fn of_page(text: &str, name: &Path, tests: &str, all: &mut Blocks) -> Result<()> {
    let mut lines = text.lines();
    let mut mark = None;
    while let Some(line) = lines.next() {
        let Some(language) = line.strip_prefix("```") else {
            mark = line
                .strip_prefix("<!-- consumer: ")
                .and_then(|l| l.strip_suffix(" -->"));
            continue;
        };
        let body: Vec<&str> = lines.by_ref().take_while(|l| *l != "```").collect();
        if let Some(mark) = mark.take() {
            ensure!(
                tests.contains(&format!("\"{mark}\"")),
                "{mark} is marked as run by tests/consumers, which has no such name"
            );
            match language {
                "sh" => all.run += 1,
                language if CODE.contains(&language) => all.compiled += 1,
                _ => all.shown += 1,
            }
        } else if !CODE.contains(&language) {
            all.shown += 1;
        } else if body.iter().any(|l| l.starts_with("{{#include ")) {
            for line in body.iter().filter(|l| !l.is_empty()) {
                ensure!(
                    line.starts_with("{{#include ../examples/"),
                    "{line:?} stands among what is included"
                );
            }
            all.included += 1;
        } else {
            ensure!(
                name == Path::new(PYTHON) && language == "python",
                "no test compiles this {language}: {}",
                body.first().unwrap_or(&"")
            );
            all.compiled += 1;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(text: &str, name: &str) -> Result<Blocks> {
        let mut all = Blocks::default();
        of_page(text, Path::new(name), "block(\"way\")", &mut all)?;
        Ok(all)
    }

    #[test]
    fn blocks_are_counted_and_none_is_compiled_by_nobody() {
        let page = "<!-- consumer: way -->\n```cpp\nint x;\n```\n<!-- consumer: way -->\n```sh\n./a\n```\n```sh\nls\n```\n\
                    ```c\n{{#include ../examples/a.c:b}}\n\n{{#include ../examples/c.h}}\n```\n```text\n```\n";
        let all = blocks(page, "a.md").unwrap();
        let wanted = Blocks {
            compiled: 1,
            run: 1,
            included: 1,
            shown: 2,
        };
        assert_eq!(all, wanted);
        for (page, why) in [
            ("```c\nint x;\n```\n", "no test compiles this c: int x;"),
            (
                "<!-- consumer: way -->\nText\n```python\nx\n```\n",
                "no test compiles this python",
            ),
            ("<!-- consumer: no -->\n```c\n```\n", "has no such name"),
            (
                "```c\n{{#include ../examples/a.c}}\nint x;\n```\n",
                "stands among what is included",
            ),
        ] {
            let error = blocks(page, "a.md").unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        assert_eq!(blocks("```python\nx\n```\n", PYTHON).unwrap().compiled, 1);
    }
}
