//! The bench works: its quick form measures, judges nothing, and writes a page whose plots are
//! there. No test asserts its measurements.

use std::path::Path;
use std::process::{Command, Output};

fn bench(folder: &Path, arguments: &[&str]) -> Output {
    let out = folder.join("report");
    Command::new(env!("CARGO_BIN_EXE_hapax-bench"))
        .args(arguments)
        .arg("--store")
        .arg(folder)
        .arg("--out")
        .arg(out)
        .env_remove("HAPAX_BIN")
        .output()
        .expect("the bench runs")
}

/// A folder on the disk that the build is on: the bench refuses one in memory.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder")
}

#[test]
fn the_quick_form_writes_a_report() {
    let folder = folder();
    let output = bench(folder.path(), &["throughput", "duplicates", "restart", "--quick", "--rounds", "1"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let page = std::fs::read_to_string(folder.path().join("report/README.md")).expect("the page");
    for words in [
        "| native, 64 in flight | >= 5 x redb direct | ",
        "## throughput: ",
        "## duplicates: ",
        "## restart: ",
        "quick form",
        "not measured; `cargo xtask bench -- growth`",
    ] {
        assert!(page.contains(words), "{words} is not in\n{page}");
    }
    let judged = page.lines().filter(|line| line.ends_with("| yes |") || line.ends_with("| **no** |"));
    assert_eq!(judged.count(), 0, "a quick run judges nothing:\n{page}");
    let plots: Vec<_> = page.split("](").skip(1).filter_map(|rest| rest.split_once(')')).collect();
    assert_eq!(plots.len(), 6, "{plots:?}");
    for (file, _) in plots {
        let plot = std::fs::read_to_string(folder.path().join("report").join(file)).expect(file);
        assert!(plot.starts_with("<svg") && plot.contains("<polyline"), "{file}");
    }
}

#[test]
fn a_second_run_keeps_what_the_first_found() {
    let folder = folder();
    for scenario in ["memory", "duplicates"] {
        let output = bench(folder.path(), &[scenario, "--quick", "--rounds", "1"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let page = std::fs::read_to_string(folder.path().join("report/README.md")).expect("the page");
    assert!(page.contains("## memory: ") && page.contains("## duplicates: "), "{page}");
    let left: Vec<_> =
        std::fs::read_dir(folder.path()).expect("the folder").map(|file| file.expect("a file")).collect();
    assert_eq!(left.len(), 1, "only the report stays: {left:?}");
}

#[test]
fn a_scenario_that_is_not_there_is_refused_by_name() {
    let output = bench(folder().path(), &["troughput"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("`troughput`"));
}

#[test]
fn what_a_scenario_misses_is_said_in_its_row() {
    let folder = folder();
    let output = bench(folder.path(), &["start", "--quick"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let page = std::fs::read_to_string(folder.path().join("report/README.md")).expect("the page");
    let row = page.lines().find(|line| line.starts_with("| start with 100 processors")).expect("a row");
    assert!(row.contains("not measured: HAPAX_BIN names nothing"), "{row}");
}

#[test]
fn two_builds_are_compared_and_one_alone_is_not() {
    let folder = folder();
    let output = bench(folder.path(), &["builds", "--quick"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("give --against the bench of another build"), "{said}");
    let this = env!("CARGO_BIN_EXE_hapax-bench");
    let output = bench(folder.path(), &["builds", "--quick", "--rounds", "1", "--against", this]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let page = std::fs::read_to_string(folder.path().join("report/README.md")).expect("the page");
    let (_, section) = page.split_once("## builds: ").expect("its section");
    let ratios = section.lines().filter(|line| line.starts_with("| 1 |") || line.starts_with("| 1024 |"));
    assert_eq!(ratios.count(), 4, "a row for each number in flight, with random and with ordered ids: {section}");
}
