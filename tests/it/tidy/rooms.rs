//! The rooms of `src/memory`: each uses only rooms declared before it, and modules of one room form no large cycle.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::{code_only, files, first_names, line_at, read, reexports, words};

/// Most modules of one room that may depend on each other in a cycle.
const CYCLE_MAX: usize = 3;

/// The modules that `mod.rs` declares, in order.
fn declared(source: &str) -> Vec<String> {
    let code = code_only(source);
    let declared = words(&code).filter(|(_, word)| *word == "mod");
    let name = |end: usize| words(&code[end..]).next().map(|(_, name)| name.to_owned());
    declared.filter_map(|(end, _)| name(end)).collect()
}

/// The code of a module without its tests, which may use anything.
fn without_tests(source: &str) -> String {
    let code = code_only(source);
    let end = code.find("#[cfg(test)]\nmod ").unwrap_or(code.len());
    code[..end].to_owned()
}

/// The names that `prefix::` leads to in `code`, with the offset of each path.
fn names_behind<'a>(code: &'a str, prefix: &'a str) -> impl Iterator<Item = (usize, &'a str)> {
    code.match_indices(prefix)
        .filter(|(at, _)| {
            !code[..*at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':')
        })
        .flat_map(move |(at, _)| {
            let names = first_names(code[at + prefix.len()..].trim_start());
            names.into_iter().map(move |name| (at, name))
        })
}

/// References of a file in `room` to rooms declared after it. `lifted` has the rooms of names that `memory/mod.rs`
/// re-exports. `is_room_file` says that the file is the room's only one, so that `super` is `memory`.
fn upward_rooms(
    room: &str,
    is_room_file: bool,
    source: &str,
    rooms: &[String],
    lifted: &BTreeMap<String, String>,
) -> Vec<String> {
    let code = without_tests(source);
    let rank = |name: &str| rooms.iter().position(|room| room == name);
    let own = rank(room);
    let mut faults = Vec::new();
    let mut prefixes = vec!["crate::memory::"];
    prefixes.extend(is_room_file.then_some("super::"));
    for prefix in prefixes {
        for (at, name) in names_behind(&code, prefix) {
            let target = lifted.get(name).map_or(name, String::as_str);
            if rank(target) > own {
                let line = line_at(&code, at);
                faults.push(format!(
                    "{line}: room `{room}` uses `{target}`, which is declared after it"
                ));
            }
        }
    }
    for (at, _) in code.match_indices("super::super::") {
        let line = line_at(&code, at);
        faults.push(format!(
            "{line}: `super::super` in a room; write `crate::memory::`"
        ));
    }
    faults
}

/// The largest set of modules of one room that all reach each other. Re-exports in `mod.rs` do not count: they are the
/// room's door.
fn largest_cycle(room: &str, sources: &BTreeMap<String, String>) -> BTreeSet<String> {
    let lifted = sources
        .get("mod")
        .map(|source| reexports_of_children(source));
    let lifted = lifted.unwrap_or_default();
    let mut reaches: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (module, source) in sources {
        let code = without_tests(source);
        let code: String = match module.as_str() {
            "mod" => code
                .split_inclusive(';')
                .filter(|part| !is_reexport(part))
                .collect(),
            _ => code,
        };
        let behind_room = format!("crate::memory::{room}::");
        let mut targets = BTreeSet::new();
        for prefix in ["super::", "self::", behind_room.as_str()] {
            if module == "mod" && prefix == "super::" {
                continue;
            }
            targets.extend(names_behind(&code, prefix).map(|(_, name)| name.to_owned()));
        }
        if module == "mod" {
            let paths = words(&code).filter(|(end, _)| code[*end..].starts_with("::"));
            targets.extend(paths.map(|(_, word)| word.to_owned()));
        }
        let resolve = |name: &String| {
            let target = lifted.get(name).unwrap_or(name);
            let known = sources.get_key_value(target.as_str());
            let is_item_of_mod = module != "mod" && known.is_none();
            known.map_or(is_item_of_mod.then_some("mod"), |(known, _)| {
                Some(known.as_str())
            })
        };
        let targets = targets
            .iter()
            .filter_map(resolve)
            .filter(|target| target != module);
        reaches.insert(module, targets.collect());
    }
    // As often as there are modules, each learns what those reach that it reaches.
    for _ in 0..sources.len() {
        for module in sources.keys() {
            let further: Vec<_> = reaches[module.as_str()]
                .iter()
                .flat_map(|next| reaches[next].iter().copied())
                .collect();
            reaches.entry(module).or_default().extend(further);
        }
    }
    let cycle = |module: &&String| {
        let back = |other: &&&str| reaches[**other].contains(module.as_str());
        let all = reaches[module.as_str()].iter().filter(back);
        all.map(|other| (*other).to_owned())
            .collect::<BTreeSet<String>>()
    };
    sources
        .keys()
        .map(|module| cycle(&module))
        .max_by_key(BTreeSet::len)
        .unwrap_or_default()
}

fn is_reexport(statement: &str) -> bool {
    let statement = statement.trim_start();
    let at = statement.find("use ");
    at.is_some_and(|at| at > 0 && statement[..at].trim_end().starts_with("pub"))
}

/// The names that `pub use child::…;` and `pub(crate) use child::…;` lift into a room, with their modules.
fn reexports_of_children(source: &str) -> BTreeMap<String, String> {
    reexports(
        &code_only(source)
            .replace("pub(crate) use ", "pub use ")
            .replace("pub(super) use ", "pub use "),
    )
}

/// The room of a file below `src/memory`, and whether it is the room's only file.
fn room_of(path: &Path) -> Option<(String, bool)> {
    let inner = path.strip_prefix("src/memory").ok()?;
    let first = Path::new(inner.components().next()?.as_os_str());
    let room = first.file_stem()?.to_str()?.to_owned();
    (room != "mod").then(|| (room, first == inner))
}

/// The rooms that each room uses, in the order of declaration.
fn arrows(rooms: &[String], lifted: &BTreeMap<String, String>) -> BTreeMap<String, Vec<String>> {
    let mut used: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for path in files("src/memory", "rs") {
        let Some((room, _)) = room_of(&path).filter(|_| !path.ends_with("tests.rs")) else {
            continue;
        };
        let code = without_tests(&read(&path));
        let names = names_behind(&code, "crate::memory::").map(|(_, name)| name);
        let targets = names.map(|name| lifted.get(name).map_or(name, String::as_str).to_owned());
        let of_room = used.entry(room.clone()).or_default();
        of_room.extend(targets.filter(|target| *target != room));
    }
    let in_order = |used: BTreeSet<String>| {
        rooms
            .iter()
            .filter(|room| used.contains(*room))
            .cloned()
            .collect()
    };
    used.into_iter()
        .map(|(room, used)| (room, in_order(used)))
        .collect()
}

/// Rows of the table in `docs/architecture.md` that do not say which rooms a room uses.
fn wrong_arrows(page: &str, arrows: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let row_of = |room: &str| {
        let mut lines = page.lines();
        lines.find(|line| line.starts_with(&format!("| `{room}` | ")))
    };
    let fault = |(room, used): (&String, &Vec<String>)| {
        let used: Vec<_> = used.iter().map(|room| format!("`{room}`")).collect();
        let used = match used.len() {
            0 => "nothing".to_owned(),
            _ => used.join(", "),
        };
        let is_right = row_of(room).is_some_and(|row| row.ends_with(&format!(" | {used} |")));
        (!is_right).then(|| format!("1: the row of room `{room}` should end with: {used}"))
    };
    arrows.iter().filter_map(fault).collect()
}

/// Faults of this repository's rooms, by file.
pub(super) fn faults() -> Vec<(PathBuf, Vec<String>)> {
    let head = read(Path::new("src/memory/mod.rs"));
    let (rooms, lifted) = (declared(&head), reexports_of_children(&head));
    let mut by_room: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    let mut faults = Vec::new();
    for path in files("src/memory", "rs") {
        let Some((room, is_room_file)) = room_of(&path) else {
            continue;
        };
        let source = read(&path);
        let found = upward_rooms(&room, is_room_file, &source, &rooms, &lifted);
        let module = path
            .file_stem()
            .and_then(|stem| stem.to_str())
            .unwrap_or_default();
        if module != "tests" {
            by_room
                .entry(room)
                .or_default()
                .insert(module.to_owned(), source);
        }
        faults.push((path, found));
    }
    let page = Path::new("docs/architecture.md");
    let wrong = wrong_arrows(&read(page), &arrows(&rooms, &lifted));
    faults.push((page.to_owned(), wrong));
    for (room, sources) in by_room {
        let cycle = largest_cycle(&room, &sources);
        if cycle.len() > CYCLE_MAX {
            let path = Path::new("src/memory").join(&room).join("mod.rs");
            let cycle: Vec<_> = cycle.into_iter().collect();
            let fault = format!(
                "1: {} modules of one cycle: {}",
                cycle.len(),
                cycle.join(", ")
            );
            faults.push((path, vec![fault]));
        }
    }
    faults
}

#[test]
fn rooms_are_read_in_the_order_of_their_declarations() {
    let head = "//! mod not;\nmod b;\n\n// a room\npub(crate) mod a;\npub use a::{X, Y};\n";
    assert_eq!(declared(head), ["b", "a"]);
    assert_eq!(reexports_of_children(head)["Y"], "a");
}

#[test]
fn references_to_later_rooms_are_found() {
    let rooms = ["types", "streams", "pool"].map(str::to_owned);
    let lifted = BTreeMap::from([("Pool".to_owned(), "pool".to_owned())]);
    let faults = |room, source: &str| upward_rooms(room, false, source, &rooms, &lifted).len();
    assert_eq!(faults("streams", "use crate::memory::pool::Core;"), 1);
    assert_eq!(
        faults("streams", "use crate::memory::{types::A, pool::Core};"),
        1
    );
    assert_eq!(faults("streams", "fn f(_: crate::memory::Pool) {}"), 1);
    assert_eq!(faults("streams", "use super::super::types::A;"), 1);
    assert_eq!(
        faults(
            "streams",
            "use crate::memory::types::A; // crate::memory::pool"
        ),
        0
    );
    assert_eq!(faults("pool", "use crate::memory::{streams, types};"), 0);
    assert_eq!(
        faults(
            "types",
            "#[cfg(test)]\nmod tests { use crate::memory::pool::A; }"
        ),
        0
    );
    assert_eq!(
        upward_rooms("types", true, "use super::pool::A;", &rooms, &lifted).len(),
        1
    );
}

#[test]
fn cycles_in_a_room_are_found() {
    let room = |sources: &[(&str, &str)]| {
        let owned = |(name, source): &(&str, &str)| ((*name).to_owned(), (*source).to_owned());
        largest_cycle("room", &sources.iter().map(owned).collect())
    };
    let mut sources = vec![
        (
            "mod",
            "mod a; mod b; pub(crate) use a::A; pub(crate) use b::B; struct M;",
        ),
        ("a", "use super::b::B;"),
        ("b", "use super::c::C;"),
        ("c", "fn c() {}"),
    ];
    assert!(room(&sources).is_empty());
    sources[3].1 = "use crate::memory::room::A;";
    assert_eq!(
        room(&sources).into_iter().collect::<Vec<_>>(),
        ["a", "b", "c"]
    );
    sources[3].1 = "use super::M;";
    assert!(room(&sources).is_empty());
    sources[0].1 = "mod a; use a::A; struct M;";
    assert_eq!(room(&sources).len(), 4);
}

#[test]
fn rows_that_say_other_arrows_than_the_code_are_found() {
    let arrows = BTreeMap::from([
        ("a".to_owned(), vec![]),
        ("b".to_owned(), vec!["a".to_owned()]),
    ]);
    assert!(wrong_arrows("| `a` | x | nothing |\n| `b` | y | `a` |\n", &arrows).is_empty());
    assert_eq!(
        wrong_arrows("| `a` | x | nothing |\n| `b` | y | nothing |\n", &arrows).len(),
        1
    );
    assert_eq!(wrong_arrows("| `b` | y | `a` |\n", &arrows).len(), 1);
}
