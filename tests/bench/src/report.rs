//! The report: the results, stored as JSON per scenario, and one page of Markdown over all of them.
//! So scenarios may run one by one, and the page says of each when and at which commit it ran.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::SCENARIOS;
use crate::plot::Plot;
use crate::targets::TARGETS;

/// The page's name in the report's folder.
pub(crate) const PAGE: &str = "README.md";

/// Results of one scenario.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Section {
    /// The scenario.
    pub(crate) name: String,
    stamp: Stamp,
    /// By target.
    verdicts: BTreeMap<String, Verdict>,
    /// Figures that other scenarios build on, by name with its unit.
    facts: BTreeMap<String, f64>,
    blocks: Vec<Block>,
    #[serde(skip)]
    folder: PathBuf,
}

/// When, where and how it ran.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Stamp {
    pub(crate) commit: String,
    pub(crate) day: String,
    pub(crate) machine: String,
    pub(crate) size: String,
    pub(crate) sync_ms: f64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Verdict {
    measured: String,
    met: Met,
}

/// Verdict on a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Met {
    Yes,
    No,
    /// The run measured less than the target asks for.
    NotJudged,
}

impl From<bool> for Met {
    fn from(met: bool) -> Self {
        if met { Self::Yes } else { Self::No }
    }
}

#[derive(Debug, Serialize, Deserialize)]
enum Block {
    Text(String),
    Table { head: Vec<String>, rows: Vec<Vec<String>> },
    Plot { file: String, title: String },
}

impl Section {
    pub(crate) fn new(name: &str, stamp: Stamp, folder: &Path) -> Self {
        let (verdicts, facts) = (BTreeMap::new(), BTreeMap::new());
        Self { name: name.into(), stamp, verdicts, facts, blocks: Vec::new(), folder: folder.to_owned() }
    }

    /// Says what was measured of a target. The target must be one of the report's.
    pub(crate) fn judge(&mut self, target: &str, measured: impl Into<String>, met: impl Into<Met>) {
        assert!(TARGETS.iter().any(|row| row.id == target), "{target} is no target");
        // Seconds say nothing about what is asked of minutes.
        let met = if self.stamp.size == "quick" { Met::NotJudged } else { met.into() };
        self.verdicts.insert(target.into(), Verdict { measured: measured.into(), met });
    }

    /// Says that the scenario could not be measured, in every row that it was to fill.
    pub(crate) fn not_measured(&mut self, why: &str) {
        self.text(format!("Not measured: {why}."));
        for row in TARGETS.iter().filter(|row| row.scenario == Some(self.name.as_str())) {
            let verdict = Verdict { measured: format!("not measured: {why}"), met: Met::NotJudged };
            self.verdicts.entry(row.id.into()).or_insert(verdict);
        }
    }

    /// Keeps a figure that another scenario builds on.
    #[cfg_attr(not(feature = "engine"), expect(dead_code, reason = "the engine scenario's"))]
    pub(crate) fn fact(&mut self, name: &str, value: f64) {
        self.facts.insert(name.into(), value);
    }

    /// A figure that another scenario stored when it last ran.
    pub(crate) fn fact_of(&self, scenario: &str, name: &str) -> Option<f64> {
        Self::load(&self.folder, scenario)?.facts.get(name).copied()
    }

    /// Adds a paragraph.
    pub(crate) fn text(&mut self, text: impl Into<String>) {
        self.blocks.push(Block::Text(text.into()));
    }

    /// Adds a table without rows.
    pub(crate) fn table(&mut self, head: &[&str]) {
        self.blocks.push(Block::Table { head: head.iter().map(|&cell| cell.into()).collect(), rows: Vec::new() });
    }

    /// Adds a row to the table that was added last, and shows it to who waits.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        eprintln!("  {}", cells.join(" | "));
        if let Some(Block::Table { rows, .. }) = self.blocks.iter_mut().rfind(|b| matches!(b, Block::Table { .. })) {
            rows.push(cells);
        }
    }

    /// Draws a plot and adds it.
    pub(crate) fn plot(&mut self, name: &str, plot: &Plot<'_>) {
        let file = format!("{}-{name}.svg", self.name);
        plot.draw(&self.folder.join(&file));
        self.blocks.push(Block::Plot { file, title: plot.title.into() });
    }

    /// Keeps what was found, for the page.
    pub(crate) fn save(&self) {
        let text = serde_json::to_string_pretty(self).unwrap();
        std::fs::write(self.folder.join(format!("{}.json", self.name)), text + "\n").unwrap();
    }

    fn load(folder: &Path, name: &str) -> Option<Self> {
        let text = std::fs::read_to_string(folder.join(format!("{name}.json"))).ok()?;
        let section = serde_json::from_str(&text);
        section.inspect_err(|error| eprintln!("{name}.json is left out, another version wrote it: {error}")).ok()
    }

    fn markdown(&self, out: &mut String) -> std::fmt::Result {
        let Stamp { commit, day, machine, size, sync_ms } = &self.stamp;
        writeln!(out, "Commit {commit}, {day}; {machine}; append + `fdatasync` {sync_ms:.2} ms; {size} form.\n")?;
        for block in &self.blocks {
            match block {
                Block::Text(text) => writeln!(out, "{text}\n")?,
                Block::Plot { file, title } => writeln!(out, "![{title}]({file})\n")?,
                Block::Table { head, rows } => {
                    table_line(out, head)?;
                    table_line(out, &vec!["---".to_owned(); head.len()])?;
                    rows.iter().try_for_each(|row| table_line(out, row))?;
                    writeln!(out)?;
                }
            }
        }
        Ok(())
    }
}

fn table_line(out: &mut String, cells: &[String]) -> std::fmt::Result {
    writeln!(out, "| {} |", cells.join(" | "))
}

/// Writes the page over all results stored in the folder; returns its path.
pub(crate) fn write(folder: &Path) -> PathBuf {
    let sections: Vec<_> = SCENARIOS.iter().filter_map(|scenario| Section::load(folder, scenario.name)).collect();
    let mut page = String::from(PREFACE);
    targets(&mut page, &sections).unwrap();
    for (scenario, section) in
        SCENARIOS.iter().filter_map(|scenario| Some((scenario, sections.iter().find(|s| s.name == scenario.name)?)))
    {
        writeln!(page, "\n## {}: {}\n", scenario.name, scenario.about).unwrap();
        section.markdown(&mut page).unwrap();
    }
    let file = folder.join(PAGE);
    std::fs::write(&file, page.trim_end().to_owned() + "\n").unwrap();
    file
}

fn targets(out: &mut String, sections: &[Section]) -> std::fmt::Result {
    writeln!(out, "| what | target | measured | met? |\n|---|---|---|---|")?;
    for row in TARGETS {
        let found = sections.iter().find_map(|section| section.verdicts.get(row.id));
        let (measured, met) = match (found, row.scenario) {
            (Some(verdict), _) => (verdict.measured.clone(), verdict.met),
            (None, Some(scenario)) => (format!("not measured; `cargo xtask bench -- {scenario}`"), Met::NotJudged),
            (None, None) => ("not measured: cannot be had where this is built".to_owned(), Met::NotJudged),
        };
        let met = match met {
            Met::Yes => "yes",
            Met::No => "**no**",
            Met::NotJudged => "not judged",
        };
        writeln!(out, "| {} | {} | {measured} | {met} |", row.what, row.target)?;
    }
    Ok(())
}

const PREFACE: &str = "\
# Bench report

Made by `cargo xtask bench`, which prints again what it kept of scenarios that were not run this time; each says its commit, its
day and the disk's sync time just before it. To run it again:

```sh
cargo xtask bench                          # all that needs nothing but this machine; minutes each
cargo xtask bench -- throughput growth     # some of it
cargo xtask bench -- --quick               # seconds each: shows that it works, judges nothing
cargo xtask bench -- --long growth memory  # with 10 million records
cargo xtask bench -- --list                # what there is
```

Everything compared was measured in one run, in turn, in a release build with thin LTO, on the machine's disk, with every commit
synced unless it says otherwise. The load generator runs on the same cores as what it measures. Ratios are of paired rounds;
figures are medians, with the least and the greatest behind them. Read ratios, not absolutes: the machine is shared.

A message has 256 bytes, a record key of 64 and a record of about 100; its processor is compiled in (\"native\") and makes one
state write of 16 bytes under a key of its own. Bare loops write keys and values of the same sizes. After a round of the host the
next loop waits until the process works no more, so that no loop pays for another's work behind its answers.

## Targets

";
