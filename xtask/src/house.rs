//! The rules of the house that a text search can check: which way imports go between folders, how long a function may be, how
//! a doc comment begins, how wide a comment is. Reads sources, changes nothing.

use std::path::Path;

use anyhow::{Context as _, Result};

/// Folders of a crate in the order of their imports: each uses only those before it, and itself.
const FOLDERS: &[(&str, &[&str])] = &[
    (
        "host/core/src",
        &[
            "support",
            "state",
            "message",
            "record",
            "observe",
            "store",
            "saga",
            "outbox",
            "commit",
            "run",
            "circuit_breaker",
            "transport",
            "pipeline",
            "workers",
            "operator",
        ],
    ),
    ("host/store/src", &["format", "journal", "memory", "redb"]),
    ("host/transport/src", &["cloudevents", "source", "publisher", "outbound", "operator", "http"]),
    ("host/cli/src", &["exit", "output", "config", "host", "commands"]),
];

const FUNCTION_LINES_MAX: usize = 70;
const COMMENT_COLUMNS_MAX: usize = 100;

/// Words with which a doc comment does not begin: a clause that stands for a noun has neither an actor nor a verb.
const HEADLESS: &[&str] = &["What ", "Who ", "Whose ", "Whether ", "How ", "Which ", "Those ", "The same"];

/// Checks the source files among `files`, and names what is broken.
pub(crate) fn check(root: &Path, files: &[String], broken: &mut Vec<String>) -> Result<()> {
    let is_source =
        |file: &&String| file.starts_with("host/") && file.ends_with(".rs") && !file.ends_with("bindings.rs");
    for file in files.iter().filter(is_source) {
        let text = std::fs::read_to_string(root.join(file)).with_context(|| file.clone())?;
        imports(file, &text, broken);
        functions(file, &text, broken);
        comments(file, &text, broken);
        printing(file, &text, broken);
    }
    Ok(())
}

/// The binary prints in one folder, where control characters are escaped.
fn printing(file: &str, text: &str, broken: &mut Vec<String>) {
    const OUTPUT: &str = "host/cli/src/output/";
    if !file.starts_with("host/cli/src/") || file.starts_with(OUTPUT) {
        return;
    }
    for print in ["print!(", "println!(", "stdout()"] {
        if text.contains(print) {
            broken.push(format!("{file} prints by itself ({print}): use a function of {OUTPUT}mod.rs"));
        }
    }
}

/// Imports go one way between the folders of a crate. Tests may look anywhere.
fn imports(file: &str, text: &str, broken: &mut Vec<String>) {
    let Some((folders, inside)) = FOLDERS
        .iter()
        .find_map(|(crate_folder, folders)| Some((*folders, file.strip_prefix(crate_folder)?.strip_prefix('/')?)))
    else {
        return;
    };
    if inside.ends_with("tests.rs") {
        return;
    }
    let own = inside.split(['/', '.']).next().unwrap_or(inside);
    let Some(place) = folders.iter().position(|folder| *folder == own) else {
        if !matches!(own, "lib" | "main") {
            broken.push(format!("{file} is in no folder of the crate's order: add it to FOLDERS"));
        }
        return;
    };
    let code =
        text.lines().take_while(|line| !is_test_module(line)).filter(|line| !line.trim_start().starts_with("//"));
    for used in code.flat_map(|line| line.split("crate::").skip(1)) {
        let used = used.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap_or_default();
        if folders.iter().skip(place + 1).any(|later| *later == used) {
            broken.push(format!("{file} uses crate::{used}, which comes after {own}"));
        }
    }
}

fn is_test_module(line: &str) -> bool {
    line.starts_with("mod tests {")
}

/// A function fits on a screen.
fn functions(file: &str, text: &str, broken: &mut Vec<String>) {
    let lines: Vec<&str> = text.lines().collect();
    for (start, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let indent = &line[..line.len() - code.len()];
        let starts = [
            "fn ",
            "pub fn ",
            "async fn ",
            "pub async fn ",
            "pub(crate) fn ",
            "pub(crate) async fn ",
            "pub(super) fn ",
            "pub(super) async fn ",
        ];
        if !starts.iter().any(|word| code.starts_with(word)) {
            continue;
        }
        let rest = &lines[start..];
        let has_body = rest.iter().find(|line| line.ends_with(['{', ';', '}'])).is_some_and(|line| line.ends_with('{'));
        let end = format!("{indent}}}");
        let length = rest.iter().position(|line| *line == end).map_or(0, |last| last + 1);
        if has_body && length > FUNCTION_LINES_MAX {
            broken
                .push(format!("{file}:{}: a function of {length} lines; {FUNCTION_LINES_MAX} is the limit", start + 1));
        }
    }
}

/// A doc comment begins with a verb or a noun, and no comment is wider than a screen.
fn comments(file: &str, text: &str, broken: &mut Vec<String>) {
    let mut before = "";
    for (index, line) in text.lines().enumerate() {
        let comment = line.trim_start();
        let begins = ["/// ", "//! "].iter().find_map(|mark| comment.strip_prefix(mark));
        let is_first = !before.trim_start().starts_with("///") && !before.trim_start().starts_with("//!");
        if let Some(text) = begins.filter(|_| is_first)
            && HEADLESS.iter().any(|word| text.starts_with(word))
        {
            broken.push(format!("{file}:{}: begin the comment with a verb or a noun: {text}", index + 1));
        }
        if comment.starts_with("//") && line.chars().count() > COMMENT_COLUMNS_MAX {
            broken.push(format!("{file}:{}: a comment wider than {COMMENT_COLUMNS_MAX} columns", index + 1));
        }
        before = line;
    }
}
