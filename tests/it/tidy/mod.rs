//! The house rules that no compiler checks.
//!
//! Each rule is a function from text to the faults it finds, so that a test can show that the rule fires;
//! the last test applies all of them to this repository. Run alone: `cargo tidy`.
//!
//! Rules look at code with comments and literals blanked out (`code_only`), so prose may name anything.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rooms;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Modules from the bottom up. A module may use its own group and the groups before it.
///
/// The first group is one layer: an error names element types and byte counts, and parsing either fails
/// with an error.
const LAYERS: [&[&str]; 10] = [
    &["error", "units", "sync", "dtype", "fuzz"],
    &["driver"],
    &["launch"],
    &["memory"],
    &["storage"],
    &["ops"],
    &["optim"],
    &["amp"],
    &["checkpoint"],
    &["telemetry"],
];
const FILE_LINES_MAX: usize = 600;
const FUNCTION_LINES_MAX: usize = 70;

// Text, without what the rules must not see.

/// `source` with comments, strings and character literals blanked; lines keep their numbers.
fn code_only(source: &str) -> String {
    let chars: Vec<char> = source.chars().collect();
    let mut code = String::with_capacity(source.len());
    let mut at = 0;
    while at < chars.len() {
        let end = literal_end(&chars, at);
        if end == at {
            code.push(chars[at]);
            at += 1;
            continue;
        }
        code.extend(
            chars[at..end]
                .iter()
                .map(|&c| if c == '\n' { '\n' } else { ' ' }),
        );
        at = end;
    }
    code
}

/// Where the comment, string or character literal that begins at `at` ends; `at` if none begins there.
fn literal_end(chars: &[char], at: usize) -> usize {
    let next = chars.get(at + 1).copied();
    match chars[at] {
        '/' if next == Some('/') => find(chars, at, "\n"),
        '/' if next == Some('*') => block_comment_end(chars, at),
        '"' => quoted_end(chars, at, '"'),
        // No name can stand directly before a quote, so this `r` makes a raw string.
        'r' => {
            let hashes = chars[at + 1..].iter().take_while(|&&c| c == '#').count();
            if chars.get(at + 1 + hashes) != Some(&'"') {
                return at;
            }
            let close = format!("\"{}", "#".repeat(hashes));
            find(chars, at + 2 + hashes, &close) + close.len()
        }
        // A lifetime has no closing quote two characters on, and no escape.
        '\'' if next == Some('\\') || chars.get(at + 2) == Some(&'\'') => {
            quoted_end(chars, at, '\'')
        }
        _ => at,
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The index of the next `needle` from `from` on, or the end of the text.
fn find(chars: &[char], from: usize, needle: &str) -> usize {
    let needle: Vec<char> = needle.chars().collect();
    (from..chars.len())
        .find(|&at| chars[at..].starts_with(&needle))
        .unwrap_or(chars.len())
}

fn block_comment_end(chars: &[char], from: usize) -> usize {
    let (mut at, mut depth) = (from + 2, 1);
    while at < chars.len() && depth > 0 {
        match chars[at..] {
            ['*', '/', ..] => (at, depth) = (at + 2, depth - 1),
            ['/', '*', ..] => (at, depth) = (at + 2, depth + 1),
            _ => at += 1,
        }
    }
    at
}

fn quoted_end(chars: &[char], from: usize, quote: char) -> usize {
    let mut at = from + 1;
    while at < chars.len() && chars[at] != quote {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(chars.len())
}

/// The words of `text` with the byte offset behind each.
fn words(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.split(|c: char| !is_word(c))
        .filter(|word| !word.is_empty())
        .map(|word| {
            let start = word.as_ptr() as usize - text.as_ptr() as usize;
            (start + word.len(), word)
        })
}

fn line_at(text: &str, offset: usize) -> usize {
    text[..offset].matches('\n').count() + 1
}

// The rules. Each returns its faults as `line: what`.

/// No reference to a module of a higher layer, neither by its path nor by a name `lib.rs` re-exports.
///
/// `reexports` maps such a name to the module it comes from.
fn upward_references(
    module: &str,
    source: &str,
    reexports: &BTreeMap<String, String>,
) -> Vec<String> {
    let rank = |name: &str| LAYERS.iter().position(|layer| layer.contains(&name));
    let Some(own) = rank(module) else {
        return vec![format!(
            "1: module `{module}` has no place in LAYERS of tests/it/tidy/mod.rs"
        )];
    };
    let code = code_only(source);
    let mut faults = Vec::new();
    for (end, _) in words(&code).filter(|(_, word)| *word == "crate") {
        let Some(path) = code[end..].trim_start().strip_prefix("::") else {
            continue;
        };
        for target in first_names(path.trim_start()) {
            let home = reexports.get(target).map_or(target, String::as_str);
            if rank(home).is_some_and(|rank| rank > own) {
                faults.push(format!(
                    "{}: `{module}` uses `{home}`, a layer above it",
                    line_at(&code, end)
                ));
            }
        }
    }
    faults
}

/// The names a path begins with: one, or those of a brace list such as `{a::b, c}`.
fn first_names(path: &str) -> Vec<&str> {
    let name = |text| words(text).next().map(|(_, word)| word);
    let Some(list) = path.strip_prefix('{') else {
        return name(path).into_iter().collect();
    };
    let (mut names, mut depth, mut start) = (Vec::new(), 0, 0);
    for (at, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                names.extend(name(&list[start..at]));
                start = at + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    names
}

/// The names that `pub use module::…;` lines of `lib.rs` lift to the root, with their modules.
fn reexports(lib: &str) -> BTreeMap<String, String> {
    let code = code_only(lib);
    let mut names = BTreeMap::new();
    for statement in code.split(';') {
        let Some((_, path)) = statement.split_once("pub use ") else {
            continue;
        };
        let mut parts = words(path).map(|(_, word)| word);
        if let Some(module) = parts.next() {
            names.extend(parts.map(|name| (name.to_owned(), module.to_owned())));
        }
    }
    names
}

fn file_too_long(source: &str) -> Vec<String> {
    let lines = source.lines().count();
    if lines <= FILE_LINES_MAX {
        return Vec::new();
    }
    vec![format!("1: {lines} lines, more than {FILE_LINES_MAX}")]
}

/// Functions with more than `FUNCTION_LINES_MAX` lines of code between their braces.
fn functions_too_long(source: &str) -> Vec<String> {
    let code = code_only(source);
    let mut faults = Vec::new();
    for (end, _) in words(&code).filter(|(_, word)| *word == "fn") {
        let Some(body) = braces(&code[end..]) else {
            continue;
        };
        let lines = body.lines().filter(|line| !line.trim().is_empty()).count();
        // The lines of the two braces are not counted.
        if lines > FUNCTION_LINES_MAX + 2 {
            faults.push(format!(
                "{}: a function of {} lines, more than {FUNCTION_LINES_MAX}",
                line_at(&code, end),
                lines - 2
            ));
        }
    }
    faults
}

/// The first `{…}` of `code`; `None` if a `;` outside brackets comes first (a declaration, a type).
fn braces(code: &str) -> Option<&str> {
    let (mut start, mut depth, mut brackets) = (None, 0, 0);
    for (at, c) in code.char_indices() {
        match c {
            '(' | '[' => brackets += 1,
            ')' | ']' => brackets -= 1,
            ';' if start.is_none() && brackets <= 0 => return None,
            '{' => {
                start.get_or_insert(at);
                depth += 1;
            }
            '}' if start.is_some() => {
                depth -= 1;
                if depth == 0 {
                    return start.map(|start| &code[start..=at]);
                }
            }
            // The function type ended with its surroundings.
            '}' => return None,
            _ => {}
        }
    }
    None
}

fn no_module_head(source: &str) -> Vec<String> {
    if source.starts_with("//!") {
        return Vec::new();
    }
    vec!["1: does not begin with `//!`: what the module is for".to_owned()]
}

/// Marks of unfinished work, in comments too, and debugging macros in code.
fn leftovers(source: &str) -> Vec<String> {
    // Spelled apart, so that this file passes its own rule.
    let marks = [["FIX", "ME"], ["TO", "DO"], ["XX", "X"]].map(|mark| mark.concat());
    let code = code_only(source);
    let marked = words(source).filter(|(_, word)| marks.iter().any(|mark| mark == word));
    let debugged =
        words(&code).filter(|(end, word)| *word == "dbg" && code[*end..].starts_with('!'));
    marked
        .map(|(end, word)| format!("{}: left over: {word}", line_at(source, end)))
        .chain(debugged.map(|(end, _)| format!("{}: left over: dbg!", line_at(&code, end))))
        .collect()
}

/// Targets of relative links in `markdown` that `exists` denies: of `[text](target)`, and of lines `[text]: target`.
fn dead_links(markdown: &str, exists: impl Fn(&str) -> bool) -> Vec<String> {
    let mut faults = Vec::new();
    let begins_line = |at: usize| {
        let line = &markdown[markdown[..at].rfind('\n').map_or(0, |end| end + 1)..at];
        line.starts_with('[') && !line[1..].contains('[')
    };
    let apart = markdown
        .match_indices("]: ")
        .filter(|(at, _)| begins_line(*at));
    for (at, mark) in markdown.match_indices("](").chain(apart) {
        let rest = &markdown[at + mark.len()..];
        let link = &rest[..rest.find([')', ' ', '\n']).unwrap_or(rest.len())];
        let file = link.split('#').next().unwrap_or(link);
        let outside = link.contains("://") || link.starts_with("mailto:");
        if !file.is_empty() && !outside && !exists(file) {
            faults.push(format!(
                "{}: link to `{file}`, which does not exist",
                line_at(markdown, at)
            ));
        }
    }
    faults
}

/// Kernels (`kernels/<op>.cu`) whose twin `src/launch/<op>.rs` is missing.
fn kernels_without_twin<'a>(kernels: &[&'a str], launchers: &[&str]) -> Vec<&'a str> {
    let missing = |op: &&&str| !launchers.contains(*op);
    kernels.iter().filter(missing).copied().collect()
}

/// The `rust-version` of a manifest.
fn manifest_msrv(manifest: &str) -> Option<&str> {
    let line = manifest
        .lines()
        .find(|line| line.starts_with("rust-version"))?;
    line.split('"').nth(1)
}

/// Statements `Rust 1.n` in `text` that differ from `msrv`; also when there is none at all.
fn wrong_msrv(text: &str, msrv: &str) -> Vec<String> {
    let stated = text.match_indices("Rust 1.").map(|(at, _)| {
        let version = &text[at + "Rust ".len()..];
        let end = version.find(|c: char| !c.is_ascii_digit() && c != '.');
        let version = &version[..end.unwrap_or(version.len())];
        (at, version.trim_end_matches('.'))
    });
    let stated: Vec<_> = stated.collect();
    if stated.is_empty() {
        return vec![format!("1: does not say that it needs Rust {msrv}")];
    }
    stated
        .into_iter()
        .filter(|(_, version)| *version != msrv)
        .map(|(at, version)| {
            format!(
                "{}: says Rust {version}, the manifest says {msrv}",
                line_at(text, at)
            )
        })
        .collect()
}

// This repository.

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Files below `folder` of this repository with the ending `.extension`, sorted; paths from the root.
fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else {
            continue;
        };
        for path in entries.map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == extension) {
                found.push(path.strip_prefix(root()).unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

fn read(path: &Path) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path:?}: {error}"))
}

/// The module of a file below `src/`: the folder, or the file's stem; `None` for `lib.rs`.
fn module_of(path: &Path) -> Option<String> {
    let first = path.strip_prefix("src").ok()?.components().next()?;
    let name = Path::new(first.as_os_str()).file_stem()?.to_str()?;
    (name != "lib").then(|| name.to_owned())
}

fn stems(folder: &str, extension: &str) -> Vec<String> {
    let stem = |path: PathBuf| path.file_stem().unwrap().to_str().unwrap().to_owned();
    files(folder, extension).into_iter().map(stem).collect()
}

#[test]
fn this_repository_is_tidy() {
    let mut faults = Vec::new();
    let mut report = |path: &Path, found: Vec<String>| {
        faults.extend(
            found
                .iter()
                .map(|fault| format!("{}:{fault}", path.display())),
        );
    };

    let reexports = reexports(&read(Path::new("src/lib.rs")));
    for folder in ["src", "crates", "tests", "benches", "examples"] {
        for path in files(folder, "rs") {
            let source = read(&path);
            if let Some(module) = module_of(&path) {
                report(&path, upward_references(&module, &source, &reexports));
            }
            report(&path, no_module_head(&source));
            report(&path, file_too_long(&source));
            report(&path, functions_too_long(&source));
            report(&path, leftovers(&source));
        }
    }

    for (path, found) in rooms::faults() {
        report(&path, found);
    }

    let (kernels, launchers) = (stems("kernels", "cu"), stems("src/launch", "rs"));
    let kernels: Vec<_> = kernels.iter().map(String::as_str).collect();
    let launchers: Vec<_> = launchers.iter().map(String::as_str).collect();
    for op in kernels_without_twin(&kernels, &launchers) {
        let fault = format!("1: has no twin src/launch/{op}.rs");
        report(Path::new(&format!("kernels/{op}.cu")), vec![fault]);
    }

    let manifest = read(Path::new("Cargo.toml"));
    let msrv = manifest_msrv(&manifest).expect("the manifest states rust-version");
    let pages = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(PathBuf::from);
    for path in pages
        .into_iter()
        .chain(files("docs", "md"))
        .chain(files("crates", "md"))
    {
        let text = read(&path);
        let folder = root().join(path.parent().unwrap());
        report(&path, dead_links(&text, |link| folder.join(link).exists()));
        if ["README.md", "CONTRIBUTING.md"]
            .iter()
            .any(|page| path == Path::new(page))
        {
            report(&path, wrong_msrv(&text, msrv));
        }
    }
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

#[test]
fn blanking_leaves_code_alone() {
    let blank = code_only(
        "a /* b /* c */ d */ e // f\ng(\"h\\\" {\", 'i', '\\'', r#\"j\"k\"#, &'l str, br\"m\")",
    );
    let words: Vec<_> = words(&blank).map(|(_, word)| word).collect();
    assert_eq!(words, ["a", "e", "g", "l", "str", "b"]);
    assert_eq!(blank.matches('\n').count(), 1);
}

#[test]
fn upward_references_are_found() {
    let reexports = reexports("pub use memory::{Pool, PoolConfig};\npub use units::KIB;");
    let faults = |module, source: &str| upward_references(module, source, &reexports);
    assert_eq!(faults("driver", "\nuse crate::memory::Pool;").len(), 1);
    assert!(faults("driver", "\nuse crate::memory::Pool;")[0].starts_with("2: "));
    assert_eq!(
        faults("driver", "use crate::{units::{a, memory}, amp::b};").len(),
        1
    );
    assert_eq!(faults("driver", "fn f(_: crate::Pool) {}").len(), 1);
    assert_eq!(faults("driver", "use crate::{KIB, Pool};").len(), 1);
    assert_eq!(faults("newcomer", "").len(), 1);
    assert!(faults("amp", "use crate::{Pool, memory::x}; //! [`crate::optim`]").is_empty());
    assert!(faults("error", "use crate::units::Bytes; use crate::dtype;").is_empty());
}

#[test]
fn long_files_and_functions_are_found() {
    assert!(file_too_long(&"\n".repeat(FILE_LINES_MAX)).is_empty());
    assert_eq!(file_too_long(&"\n".repeat(FILE_LINES_MAX + 1)).len(), 1);

    let function = |lines| {
        format!(
            "fn f(_: [u8; 2]) {{\n{}}}\n",
            "    g({});\n\n".repeat(lines)
        )
    };
    assert!(functions_too_long(&function(FUNCTION_LINES_MAX)).is_empty());
    let faults = functions_too_long(&function(FUNCTION_LINES_MAX + 1));
    assert_eq!(faults, ["1: a function of 71 lines, more than 70"]);
    let declaration = format!(
        "trait T {{ fn f();\n}}\nmod m {{\n{}}}",
        "a();\n".repeat(100)
    );
    assert!(functions_too_long(&declaration).is_empty());
}

#[test]
fn missing_heads_and_leftovers_are_found() {
    assert_eq!(no_module_head("use std::fmt;").len(), 1);
    assert!(no_module_head("//! Bytes.").is_empty());
    let marks = [["FIX", "ME"], ["TO", "DO"], ["XX", "X"]].map(|mark| mark.concat());
    for mark in marks {
        assert_eq!(
            leftovers(&format!("a\n// {mark}: b")),
            [format!("2: left over: {mark}")]
        );
    }
    assert_eq!(leftovers("dbg!(a)").len(), 1);
    assert!(leftovers("// dbg! is refused").is_empty());
}

#[test]
fn dead_links_are_found() {
    let exists = |link: &str| link == "docs/here.md";
    let text = "[a](docs/here.md#part) [b](https://example.org/x) [c](#part)";
    assert!(dead_links(text, exists).is_empty());
    assert!(dead_links("\n[a]: docs/here.md\nlet x: [u8]: gone", exists).is_empty());
    for text in ["\n[d](docs/gone.md)", "\n[d]: docs/gone.md\n"] {
        assert_eq!(dead_links(text, exists).len(), 1, "{text}");
    }
}

#[test]
fn kernels_without_twin_are_found() {
    assert_eq!(
        kernels_without_twin(&["cast", "adamw"], &["cast", "mod"]),
        ["adamw"]
    );
}

#[test]
fn differing_versions_are_found() {
    assert_eq!(
        manifest_msrv("name = \"x\"\nrust-version = \"1.88\""),
        Some("1.88")
    );
    assert!(wrong_msrv("Needs Rust 1.88.", "1.88").is_empty());
    assert_eq!(wrong_msrv("Needs Rust 1.87 or later.", "1.88").len(), 1);
    assert_eq!(wrong_msrv("Needs a compiler.", "1.88").len(), 1);
}
