//! `cargo xtask tidy`: the house rules that no compiler checks. Changes nothing.

use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::workspace::packages;

/// Allowed dependencies among the workspace's own crates. A dependency that is not listed is
/// refused.
const MAY_USE: &[(&str, &[&str])] = &[
    ("hapax-core", &[]),
    ("hapax-engine", &["hapax-core"]),
    ("hapax-store", &["hapax-core"]),
    ("hapax-transport", &["hapax-core"]),
    ("hapax", &["hapax-core", "hapax-engine", "hapax-store", "hapax-transport", "hapax-guest-build"]),
    ("hapax-sdk-macros", &[]),
    ("hapax-sdk", &["hapax-sdk-macros"]),
    ("hapax-guest-build", &[]),
    ("xtask", &[]),
];

/// Crates that only one of ours may use directly: each has one owner.
const OWNED: &[(&str, &str)] = &[
    ("wasmtime", "hapax-engine"),
    ("wasmtime-wasi", "hapax-engine"),
    ("anyhow", "hapax"),
    ("axum", "hapax-transport"),
];

const README_LINES_MAX: usize = 150;

/// Checks every rule, and names all that is broken.
pub(crate) fn run(root: &Path) -> Result<()> {
    let mut broken = Vec::new();
    dependencies(root, &mut broken)?;
    headers(root, &mut broken)?;
    readme(root, &mut broken)?;
    format_is_documented(root, &mut broken)?;
    guests_are_tested(root, &mut broken)?;
    crate::house::check(root, &git_files(root)?, &mut broken)?;
    if broken.is_empty() {
        println!("tidy: the house is in order");
        return Ok(());
    }
    bail!("tidy: {} rules broken:\n  {}", broken.len(), broken.join("\n  "))
}

fn dependencies(root: &Path, broken: &mut Vec<String>) -> Result<()> {
    let packages = packages(root)?;
    for package in &packages {
        let (name, folder) = (package.name.as_str(), &package.manifest_path);
        let allowed = MAY_USE.iter().find(|(of, _)| *of == name).map(|(_, allowed)| *allowed);
        for used in package.uses.iter().map(String::as_str) {
            if packages.iter().any(|our| our.name == used) {
                let fine = match allowed {
                    Some(allowed) => allowed.contains(&used),
                    None if folder.starts_with("plugins/") || folder.starts_with("tests/fixtures") => {
                        used == "hapax-sdk"
                    }
                    None => folder.starts_with("tests/"),
                };
                if !fine {
                    broken.push(format!("{name} must not depend on {used}"));
                }
            }
            let stranger = |(owned, owner): &&(&str, &str)| *owned == used && *owner != name;
            let tool = name == "xtask"
                || name == "hapax-tests"
                || name == "hapax-bench"
                || (name == "hapax" && used == "axum");
            if let Some((owned, owner)) = OWNED.iter().find(stranger).filter(|_| !tool) {
                broken.push(format!("{name} uses {owned}, which is {owner}'s alone"));
            }
        }
    }
    Ok(())
}

/// Every source file opens with what it owns and what it refuses.
fn headers(root: &Path, broken: &mut Vec<String>) -> Result<()> {
    for file in git_files(root)?.iter().filter(|file| file.ends_with(".rs") && !file.ends_with("bindings.rs")) {
        let text = std::fs::read_to_string(root.join(file)).with_context(|| file.clone())?;
        if !text.starts_with("//!") {
            broken.push(format!("{file} does not open with a //! header"));
        }
        let tests = file.contains("/tests/") || file.starts_with("tests/");
        if text.lines().count() > 600 && !tests {
            broken.push(format!("{file} is longer than 600 lines"));
        }
    }
    Ok(())
}

fn readme(root: &Path, broken: &mut Vec<String>) -> Result<()> {
    let lines = std::fs::read_to_string(root.join("README.md")).context("README.md")?.lines().count();
    if lines > README_LINES_MAX {
        broken.push(format!("README.md has {lines} lines; {README_LINES_MAX} is the limit"));
    }
    Ok(())
}

/// Checks that the document of the stored format names its version.
fn format_is_documented(root: &Path, broken: &mut Vec<String>) -> Result<()> {
    let layout = std::fs::read_to_string(root.join("host/store/src/format/layout.rs"))?;
    let version = layout.lines().find_map(|line| line.strip_prefix("pub(crate) const FORMAT: u32 = ")).unwrap_or("?");
    let wanted = format!("Format version {}", version.trim_end_matches(';'));
    let document = "docs/internals/storage-format.md";
    if !std::fs::read_to_string(root.join(document)).context(document)?.contains(&wanted) {
        broken.push(format!("{document} does not say `{wanted}`: the format changed without its document"));
    }
    Ok(())
}

/// Every guest, and every behaviour of the fixtures, is named in some test. What no test names, no
/// test runs.
fn guests_are_tested(root: &Path, broken: &mut Vec<String>) -> Result<()> {
    let is_test = |file: &&String| {
        let by_guests = ["tests/tests/", "tests/src/", "tests/bench/", "host/engine/tests/", "guest-build/tests/"];
        file.ends_with(".rs") && by_guests.iter().any(|folder| file.starts_with(folder))
    };
    let tests: Vec<String> = git_files(root)?
        .iter()
        .filter(is_test)
        .map(|file| std::fs::read_to_string(root.join(file)).with_context(|| file.clone()))
        .collect::<Result<_>>()?;
    let named = |name: &str| tests.iter().any(|test| test.contains(&format!("\"{name}\"")));
    for guest in packages(root)?.iter().filter(|package| package.is_guest && !named(&package.name)) {
        broken.push(format!("no test names the guest \"{}\"", guest.name));
    }
    let fixtures = std::fs::read_to_string(root.join("tests/fixtures/src/lib.rs"))?;
    for behaviour in fixtures.lines().filter_map(|line| Some(line.strip_prefix("        \"")?.split_once("\" =>")?.0)) {
        if !named(behaviour) {
            broken.push(format!("no test names the fixture \"{behaviour}\""));
        }
    }
    Ok(())
}

fn git_files(root: &Path) -> Result<Vec<String>> {
    let output =
        std::process::Command::new("git").arg("ls-files").current_dir(root).output().context("git ls-files")?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}
