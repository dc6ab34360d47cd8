// SPDX-License-Identifier: Apache-2.0

//! Reads a header in the form of drex.h, and has a C compiler measure it.

#![allow(dead_code)] // every test file uses its own part

use std::collections::BTreeMap;
use std::fmt;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

/// What programs rely on: "kind name" and what is said of it.
pub struct Abi(pub BTreeMap<String, String>);

impl fmt::Display for Abi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|(name, value)| writeln!(f, "{name} = {value}"))
    }
}

impl Abi {
    pub fn parse(text: &str) -> Abi {
        let lines = text.lines().filter_map(|l| l.split_once(" = "));
        Abi(lines.map(|(n, v)| (n.to_owned(), v.to_owned())).collect())
    }

    /// A struct's size, and whether it begins with it.
    pub fn size(&self, name: &str) -> Option<(u64, bool)> {
        let value = self.0.get(&format!("struct {name}"))?;
        let size = value.split([' ', ',']).nth(1)?.parse().ok()?;
        Some((size, value.ends_with("sized")))
    }

    /// What a program that was built with this would trip over in `now`.
    pub fn broken_by(&self, now: &Abi) -> Vec<String> {
        let mut wrong = Vec::new();
        for (name, then) in &self.0 {
            let grows = name
                .strip_prefix("struct ")
                .and_then(|n| Some((self.size(n)?, now.size(n)?)));
            let number = |v: &str| v.parse::<i64>().unwrap();
            match (now.0.get(name), grows) {
                (None, _) => wrong.push(format!("{name} is gone")),
                // How many there are; arrays of them have a length of their own.
                (Some(value), _)
                    if name.ends_with("_REASONS")
                        && !name.contains("_MAX_")
                        && number(value) >= number(then) => {}
                (Some(_), Some(((a, true), (b, true)))) if b >= a => {}
                (Some(value), _) if value == then => {}
                (Some(value), _) => wrong.push(format!("{name} was {then}, and is {value}")),
            }
        }
        // What is new in a struct must lie behind all that an older program has of
        // it, padding included.
        for (name, value) in &now.0 {
            let owner = name
                .strip_prefix("field ")
                .and_then(|n| n.split('.').next());
            let new = !self.0.contains_key(name);
            if let Some((size, _)) = owner.filter(|_| new).and_then(|o| self.size(o)) {
                let offset = value.split(' ').nth(1).and_then(|o| o.parse::<u64>().ok());
                if offset.unwrap() < size {
                    wrong.push(format!("{name} lies within what older programs have"));
                }
            }
        }
        wrong
    }
}

pub struct Field {
    pub kind: String,
    pub name: String,
}

/// The declarations of a header.
#[derive(Default)]
pub struct Header {
    structs: Vec<(String, Vec<Field>)>,
    aliases: Vec<(String, String)>,
    symbols: Vec<(String, String)>,
    numbers: Vec<String>,
    initializers: Vec<String>,
}

/// "const uint32_t *ramp_layers" to its type and name. The length of an array
/// belongs to the type.
fn split(declaration: &str) -> (String, String) {
    let (plain, length) = match declaration.find('[') {
        Some(at) => declaration.split_at(at),
        None => (declaration, ""),
    };
    let name = plain.split([' ', '*']).next_back().unwrap();
    let kind = plain.strip_suffix(name).unwrap().trim_end();
    (format!("{kind}{length}"), name.to_owned())
}

/// "void *user_data, size_t n)" to "void *, size_t".
fn kinds(arguments: &str) -> String {
    let arguments = arguments.trim_end_matches(')').split(',');
    let kinds: Vec<String> = arguments
        .map(|a| match a.trim() {
            "void" => "void".to_owned(),
            a => split(a).0,
        })
        .collect();
    kinds.join(", ")
}

impl Header {
    pub fn parse(text: &str) -> Header {
        let mut out = Header::default();
        let mut code = String::new();
        let mut comment = false;
        for line in text.lines() {
            comment |= line.starts_with("/*");
            let ends = comment && line.contains("*/");
            let macro_body = line.starts_with("  {") || line.ends_with('\\');
            if let Some(define) = line.strip_prefix("#define ") {
                let name = define.split(' ').next().unwrap();
                if name.ends_with("_INITIALIZER") {
                    out.initializers.push(name.to_owned());
                } else if define.contains(' ') && !name.starts_with("DREX_VERSION_") {
                    out.numbers.push(name.to_owned());
                }
            } else if !comment && !line.starts_with(['#', '}']) && !macro_body {
                let plain = line.split("//").next().unwrap().trim();
                // The initializers' last lines, and the end of extern "C".
                if !plain.ends_with('}') && !plain.starts_with("DREX_") && !plain.starts_with("0.")
                {
                    write!(code, "{plain} ").unwrap();
                }
            } else if line.starts_with("} drex_") {
                write!(code, "{line} ").unwrap();
            }
            comment &= !ends;
        }
        out.declarations(&code);
        assert!(!out.symbols.is_empty() && !out.structs.is_empty());
        out
    }

    fn declarations(&mut self, code: &str) {
        let mut rest = code;
        while let Some(at) = rest.find([';', '{']) {
            let head = rest[..at].trim();
            let open = rest[at..].starts_with('{');
            rest = &rest[at + 1..];
            if let (true, Some(name)) = (open, head.strip_prefix("typedef struct ")) {
                let (body, after) = rest.split_once('}').unwrap();
                rest = after.split_once(';').unwrap().1;
                let fields = body.split(';').map(str::trim).filter(|f| !f.is_empty());
                let fields = fields.map(|f| {
                    let (kind, name) = split(f);
                    Field { kind, name }
                });
                self.structs
                    .push((name.trim().to_owned(), fields.collect()));
            } else if let Some(alias) = head.strip_prefix("typedef ") {
                // A callback: "void (*name)(int a)".
                let (name, kind) = match alias.split_once("(*") {
                    Some((result, rest)) => {
                        let (name, arguments) = rest.split_once(")(").unwrap();
                        let result = result.trim_end();
                        (
                            name.to_owned(),
                            format!("{result} (*)({})", kinds(arguments)),
                        )
                    }
                    None => {
                        let (kind, name) = split(alias);
                        (name, kind)
                    }
                };
                self.aliases.push((name, kind));
            } else if let Some((left, arguments)) = head.split_once('(') {
                let (kind, name) = split(left);
                self.symbols
                    .push((name, format!("{kind} ({})", kinds(arguments))));
            }
        }
    }

    /// Structs that begin with their size.
    pub fn sized(&self) -> impl Iterator<Item = &str> {
        let sized = |fields: &[Field]| fields.first().is_some_and(|f| f.name == "size");
        let all = self.structs.iter().filter(move |s| sized(&s.1));
        all.map(|s| s.0.as_str())
    }

    /// Functions on a handle of this kind.
    pub fn on(&self, kind: &str) -> impl Iterator<Item = &str> {
        let (handle, constant) = (format!("({kind} *"), format!("(const {kind} *"));
        let all = self.symbols.iter().filter(move |(_, signature)| {
            let after = [&handle, &constant]
                .into_iter()
                .find_map(|h| signature.split_once(h.as_str()));
            after.is_some_and(|(_, rest)| !rest.starts_with('*'))
        });
        all.map(|s| s.0.as_str())
    }

    pub fn functions(&self) -> impl Iterator<Item = &str> {
        self.symbols.iter().map(|s| s.0.as_str())
    }

    /// Numbers and layouts are the compiler's; it is asked.
    pub fn measure(&self, text: &str, dir: &Path) -> Abi {
        let mut c = "#include \"drex.h\"\n#include <stdio.h>\nint main(void) {\n".to_owned();
        for name in &self.numbers {
            writeln!(
                c,
                "  printf(\"number {name} = %lld\\n\", (long long)({name}));"
            )
            .unwrap();
        }
        for (name, fields) in &self.structs {
            let end = match self.sized().any(|s| s == name) {
                true => ", sized",
                false => "",
            };
            writeln!(
                c,
                "  printf(\"struct {name} = bytes %u{end}\\n\", (unsigned)sizeof({name}));"
            )
            .unwrap();
            for field in fields {
                let f = &field.name;
                writeln!(
                    c,
                    "  printf(\"field {name}.{f} = offset %u bytes %u: {}\\n\", \
                     (unsigned)offsetof({name}, {f}), (unsigned)sizeof((({name} *)0)->{f}));",
                    field.kind
                )
                .unwrap();
            }
        }
        c.push_str("  return 0;\n}\n");
        std::fs::write(dir.join("drex.h"), text).unwrap();
        std::fs::write(dir.join("measure.c"), c).unwrap();
        let run = |command: &mut Command| {
            let out = command.output().expect("a C compiler is needed");
            let said = String::from_utf8_lossy(&out.stderr);
            assert!(out.status.success(), "{said}");
            String::from_utf8(out.stdout).unwrap()
        };
        let exe = dir.join("measure");
        run(Command::new("cc")
            .args(["-std=c99", "-w"])
            .arg(dir.join("measure.c"))
            .arg("-o")
            .arg(&exe));
        let mut abi = Abi::parse(&run(&mut Command::new(exe)));
        for (name, kind) in &self.aliases {
            abi.0.insert(format!("type {name}"), kind.clone());
        }
        for name in &self.initializers {
            abi.0
                .insert(format!("macro {name}"), "an initializer".to_owned());
        }
        for (name, signature) in &self.symbols {
            abi.0.insert(format!("symbol {name}"), signature.clone());
        }
        abi
    }

    /// The header as it was when the struct had this size: without the fields
    /// from there on, and without their values in the initializer.
    pub fn cut(&self, text: &str, name: &str, size: usize, dir: &Path) -> String {
        let abi = self.measure(text, dir);
        let (_, fields) = self.structs.iter().find(|s| s.0 == name).unwrap();
        let offset = |field: &Field| -> usize {
            let value = &abi.0[&format!("field {name}.{}", field.name)];
            value.split(' ').nth(1).unwrap().parse().unwrap()
        };
        let kept = fields.iter().take_while(|f| offset(f) < size).count();
        assert!(kept < fields.len(), "{name} has not grown");

        let head = format!("typedef struct {name} {{");
        let start = text.find(&head).unwrap();
        let end = start + text[start..].find(&format!("}} {name};")).unwrap();
        let body = &text[start + head.len()..end];
        let mut left = kept;
        let mut lines = Vec::new();
        for line in body.lines() {
            let declares = line.ends_with(';') && !line.trim_start().starts_with("//");
            if left == 0 {
                break;
            }
            left -= usize::from(declares);
            lines.push(line);
        }
        let body = lines.join("\n") + "\n";

        let initializer = format!("#define {}_INITIALIZER", name.to_uppercase());
        let values = text.find(&initializer).unwrap();
        let values = values + text[values..].find('{').unwrap() + 1;
        let (mut depth, mut commas, mut at) = (1, 0, values);
        while depth > 0 {
            match text.as_bytes()[at] {
                b'{' => depth += 1,
                b'}' => depth -= 1,
                b',' if depth == 1 => commas += 1,
                _ => {}
            }
            if commas == kept {
                break;
            }
            at += 1;
        }
        // Values that are left out are 0: it may end before.
        let ends = if depth > 0 { " }" } else { "" };
        let mut close = at;
        while depth > 0 {
            match text.as_bytes()[close] {
                b'{' => depth += 1,
                b'}' => depth -= 1,
                _ => {}
            }
            close += 1;
        }
        // The initializers come before the structs.
        assert!(close < start);
        format!(
            "{}{ends}{}{head}{body}{}",
            &text[..at],
            &text[close..start],
            &text[end..]
        )
    }
}
