//! What the documents say a test shows is shown by a test that exists; and every fault that is put
//! into the code on purpose is found by one. Reads sources, runs nothing.

use std::collections::BTreeSet;
use std::path::Path;

/// The documents whose tables name tests.
const DOCUMENTS: [&str; 2] = ["docs/concepts/guarantees.md", "docs/concepts/outcomes.md"];

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// A source file, and whether it is a test's.
struct Source {
    /// Its path from the root.
    path: String,
    text: String,
    of_tests: bool,
}

fn sources() -> Vec<Source> {
    let mut found = Vec::new();
    for folder in ["host", "tests", "guest-sdk", "guest-build", "plugins"] {
        collect(&root().join(folder), &mut found);
    }
    found
}

fn collect(folder: &Path, found: &mut Vec<Source>) {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    for path in entries.filter(|path| !path.ends_with("target")) {
        if path.is_dir() {
            collect(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let inside = path.strip_prefix(root()).unwrap();
            let name = inside.file_stem().unwrap().to_string_lossy().into_owned();
            let of_tests = inside.starts_with("tests") || name.ends_with("tests") || parent_is_tests(inside);
            found.push(Source {
                path: inside.to_string_lossy().into_owned(),
                text: std::fs::read_to_string(&path).unwrap(),
                of_tests,
            });
        }
    }
}

fn parent_is_tests(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str() == "tests")
}

/// The texts between `before` and `after`, wherever they stand.
fn between<'a>(text: &'a str, before: &str, after: char) -> impl Iterator<Item = &'a str> {
    text.split(before).skip(1).filter_map(move |rest| Some(rest.split_once(after)?.0))
}

fn is_word(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
}

/// Functions that are tests, also those that a macro makes.
fn tests(sources: &[Source]) -> BTreeSet<&str> {
    let mut names = BTreeSet::new();
    for source in sources {
        names.extend(between(&source.text, "fn ", '(').filter(|name| is_word(name)));
        // The lines of `mutations!` and `explored!`: `name: ...`, or `test: scenario, name is ...`.
        let lines = source.text.lines().map(str::trim_start);
        names.extend(lines.filter_map(|line| line.split([':', ' ']).next()).filter(|name| is_word(name)));
    }
    names
}

/// Names of faults that are put into the code on purpose, and of places where the host can be made
/// to die.
fn faults(sources: &[Source], function: &str) -> BTreeSet<String> {
    let of_host = sources.iter().filter(|source| !source.of_tests);
    let call = format!("{function}(\"");
    of_host.flat_map(|source| between(&source.text, &call, '"').map(str::to_owned).collect::<Vec<_>>()).collect()
}

/// What stands in backticks in the third column of a table's rows, and after; in the second, where
/// there are two.
fn named(document: &str) -> Vec<String> {
    let rows = document.lines().filter_map(|line| line.strip_prefix('|')?.strip_suffix('|'));
    let cells = rows.flat_map(|row| row.split('|').skip(if row.matches('|').count() > 1 { 2 } else { 1 }));
    cells.flat_map(|cell| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>()).collect()
}

#[test]
fn every_test_that_the_documents_name_exists() {
    let sources = sources();
    let (tests, mutations, points) = (tests(&sources), faults(&sources, "mutated"), faults(&sources, "point"));
    let mut missing = Vec::new();
    let mut count = 0;
    for document in DOCUMENTS {
        for name in named(&std::fs::read_to_string(root().join(document)).unwrap()) {
            count += 1;
            let exists = match &*name {
                path if path.contains('/') => root().join(path).exists(),
                test if is_word(test) => tests.contains(test) || points.contains(test),
                fault => mutations.contains(fault) || points.contains(fault),
            };
            if !exists {
                missing.push(format!("{document}: {name}"));
            }
        }
    }
    assert!(count > 50, "only {count} names were found: the tables are not read");
    assert_eq!(missing, [""; 0], "named and not there");
}

#[test]
fn every_mutation_is_found_by_a_test() {
    let sources = sources();
    let of_tests: Vec<&str> = sources.iter().filter(|source| source.of_tests).map(|source| &*source.text).collect();
    let mutations = faults(&sources, "mutated");
    assert!(mutations.len() > 20, "only {} mutations were found", mutations.len());
    let used = |name: &&String| of_tests.iter().any(|text| text.contains(&format!("\"{name}\"")));
    let unused: Vec<_> = mutations.iter().filter(|name| !used(name)).collect();
    assert_eq!(unused, [""; 0], "mutations that no test looks for");
}

#[test]
fn every_mutation_of_a_test_is_in_the_code() {
    let sources = sources();
    let mutations = faults(&sources, "mutated");
    let wanted = sources.iter().filter(|source| source.of_tests).flat_map(|source| {
        let by_macro = between(&source.text, "is red with \"", '"');
        by_macro.chain(between(&source.text, "_is_found is \"", '"'))
    });
    let missing: Vec<_> = wanted.filter(|name| !name.starts_with('$') && !mutations.contains(*name)).collect();
    assert_eq!(missing, [""; 0], "looked for, and in no code");
}

/// A promise's id with the test, and the file, that proves it.
type Proof = (String, String, String);

/// The proofs that the tables list: rows `| G7 | ... | [`test`](../../file) ... |`. A row may name
/// a whole file.
fn listed_proofs() -> BTreeSet<Proof> {
    let mut proofs = BTreeSet::new();
    for document in DOCUMENTS {
        let text = std::fs::read_to_string(root().join(document)).unwrap();
        for row in text.lines().filter_map(|line| line.strip_prefix("| G")) {
            let id = format!("G{}", row.split(' ').next().unwrap());
            for link in between(row, "[`", ')') {
                let (name, file) = link.split_once("`](../../").unwrap_or_else(|| panic!("{document}: {link}"));
                proofs.insert((id.clone(), name.to_owned(), file.to_owned()));
            }
        }
    }
    proofs
}

/// The name of the test that follows: a test that runs, not another function and not one that is
/// ignored.
fn test_below<'a>(source: &Source, lines: &[&'a str]) -> &'a str {
    let function = lines.iter().position(|line| line.contains("fn ")).unwrap();
    let attributes = &lines[..function];
    let is_test = |line: &str| line.starts_with("#[test]") || line.starts_with("#[tokio::test");
    let at = format!("{}: {}", source.path, lines[function]);
    assert!(attributes.iter().any(|line| is_test(line)), "{at} says `Proves` and is no test");
    assert!(!attributes.iter().any(|line| line.starts_with("#[ignore")), "{at} says `Proves` and is ignored");
    lines[function].split_once("fn ").unwrap().1.split('(').next().unwrap()
}

/// Returns whether a file is compiled: one of a test binary must be declared by its main.rs. Files
/// elsewhere are taken to be.
fn is_compiled(source: &Source) -> bool {
    let Some((binary, file)) = source.path.strip_prefix("tests/tests/").and_then(|path| path.split_once('/')) else {
        return true;
    };
    let main = std::fs::read_to_string(root().join("tests/tests").join(binary).join("main.rs")).unwrap();
    file == "main.rs" || main.contains(&format!("\nmod {};", file.trim_end_matches(".rs")))
}

/// The proofs that tests carry: `/// Proves G7, G12.` above a test, or `//! Proves G7.` at the head
/// of a file.
fn carried_proofs() -> BTreeSet<Proof> {
    let mut proofs = BTreeSet::new();
    for source in sources() {
        let lines: Vec<&str> = source.text.lines().map(str::trim_start).collect();
        for (index, line) in lines.iter().enumerate() {
            let of_test = line.strip_prefix("/// Proves ");
            let Some(ids) = of_test.or(line.strip_prefix("//! Proves ")).and_then(|ids| ids.strip_suffix('.')) else {
                continue;
            };
            let name = match of_test {
                Some(_) => test_below(&source, &lines[index..]),
                None => &source.path,
            };
            assert!(is_compiled(&source), "{}: its binary's main.rs does not declare it", source.path);
            proofs.extend(ids.split(", ").map(|id| (id.to_owned(), name.to_owned(), source.path.clone())));
        }
    }
    proofs
}

#[test]
fn promises_and_their_tests_name_each_other() {
    let (listed, carried) = (listed_proofs(), carried_proofs());
    assert!(listed.len() > 100, "only {} proofs were found: the tables are not read", listed.len());
    let not_carried: Vec<_> = listed.difference(&carried).collect();
    assert!(not_carried.is_empty(), "listed in a table, and the test does not say `Proves`: {not_carried:?}");
    let not_listed: Vec<_> = carried.difference(&listed).collect();
    assert!(not_listed.is_empty(), "a test says `Proves`, and no table lists it: {not_listed:?}");
}

#[test]
fn ids_of_promises_have_no_gap_and_each_row_names_a_test() {
    let mut ids = Vec::new();
    for document in DOCUMENTS {
        let text = std::fs::read_to_string(root().join(document)).unwrap();
        for row in text.lines().filter(|line| line.starts_with("| G")) {
            let cells: Vec<&str> = row.trim_matches('|').split(" | ").collect();
            ids.push(cells[0].trim().strip_prefix('G').unwrap().parse::<usize>().unwrap());
            // A test under shuttle is made by a macro, and stands in the row by its bare name.
            let names_a_test = |cell: &str| cell.contains("[`") || cell.contains("`shuttle_");
            assert!(cells[2..].iter().any(|cell| names_a_test(cell)), "{document}: no test in {row}");
        }
    }
    ids.sort_unstable();
    // The last id of the list: a row that goes takes its number with it, and this one is changed by
    // hand.
    assert_eq!(ids, (1..=180).collect::<Vec<_>>(), "an id is missing, doubled or new");
}
