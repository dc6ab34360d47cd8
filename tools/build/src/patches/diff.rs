// SPDX-License-Identifier: Apache-2.0

//! Reads unified diffs: which files a patch touches, and how much of them.

use anyhow::{Context, Result, bail, ensure};

/// A file that a patch changes.
#[derive(Debug, PartialEq)]
pub struct Touched {
    /// After the patch.
    pub path: String,
    pub added: usize,
    pub removed: usize,
    pub hunks: usize,
}

/// The files of a patch, in its order. What stands before, between and after them is left out.
pub fn parse(text: &str) -> Result<Vec<Touched>> {
    let mut files: Vec<Touched> = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(name) = line.strip_prefix("+++ ") {
            let name = name.split('\t').next().unwrap_or(name);
            files.push(Touched {
                path: name.strip_prefix("b/").unwrap_or(name).to_owned(),
                added: 0,
                removed: 0,
                hunks: 0,
            });
        } else if line.starts_with("@@ -") {
            let file = files.last_mut().context("a hunk before the first file")?;
            let (mut old, mut new) =
                lengths(line).with_context(|| format!("{line:?} is no hunk"))?;
            file.hunks += 1;
            while old > 0 || new > 0 {
                let line = lines.next().context("the last hunk ends early")?;
                match line.as_bytes().first() {
                    Some(b'+') => {
                        file.added += 1;
                        ensure!(new > 0, "{}: a hunk adds more than it says", file.path);
                        new -= 1;
                    }
                    Some(b'-') => {
                        file.removed += 1;
                        ensure!(old > 0, "{}: a hunk removes more than it says", file.path);
                        old -= 1;
                    }
                    // Of a context line that is empty some programs cut the blank.
                    Some(b' ') | None => {
                        ensure!(
                            old > 0 && new > 0,
                            "{}: a hunk is longer than it says",
                            file.path
                        );
                        old -= 1;
                        new -= 1;
                    }
                    Some(b'\\') => {}
                    _ => bail!("{}: a hunk ends early at {line:?}", file.path),
                }
            }
        }
    }
    Ok(files)
}

/// Lines before and after, of `@@ -12,7 +14,9 @@`; a length of 1 may be left out.
fn lengths(line: &str) -> Option<(usize, usize)> {
    let (ranges, _) = line.strip_prefix("@@ -")?.split_once(" @@")?;
    let (old, new) = ranges.split_once(" +")?;
    let length = |range: &str| match range.split_once(',') {
        Some((_, length)) => length.parse().ok(),
        None => range.parse::<usize>().ok().map(|_| 1),
    };
    Some((length(old)?, length(new)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_look_like_headers_are_lines() -> Result<()> {
        let text = "A title\n\n--- a/x.sql\t2026\n+++ b/x.sql\t2026\n@@ -1,2 +1,2 @@\n--- a comment\n+++ b/another\n context\n\
                    @@ -9 +9,2 @@ fn\n-1\n+2\n+3\n\\ No newline at end of file\n\
                    diff --git a/y b/y\nnew file mode 100644\n--- /dev/null\n+++ b/y\n@@ -0,0 +1 @@\n+new\n-- \n2.0\n";
        let touched = |path: &str, added, removed, hunks| Touched {
            path: path.into(),
            added,
            removed,
            hunks,
        };
        assert_eq!(
            parse(text)?,
            [touched("x.sql", 3, 2, 2), touched("y", 1, 0, 1)]
        );
        Ok(())
    }

    #[test]
    fn what_is_no_patch_is_refused() {
        for (text, says) in [
            ("@@ -1 +1 @@\n-a\n+b\n", "before the first file"),
            ("+++ b/x\n@@ -1,2 +1 @@\n-a\n", "ends early"),
            ("+++ b/x\n@@ -one +1 @@\n-a\n", "is no hunk"),
            (
                "+++ b/x\n@@ -1,2 +1,2 @@\n-a\ndiff\n",
                "x: a hunk ends early",
            ),
            ("+++ b/x\n@@ -1 +0,0 @@\n+a\n", "adds more"),
        ] {
            let error = format!("{:#}", parse(text).expect_err(text));
            assert!(error.contains(says), "{error}");
        }
    }
}
