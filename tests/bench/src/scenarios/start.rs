//! Start of the binary with a hundred processors whose compiled code is cached.

use std::path::PathBuf;
use std::time::Instant;

use crate::hapax::Hapax;
use crate::measure::{Spread, memory_of, short};
use crate::report::Section;
use crate::workbench::Workbench;
use crate::{Missing, Scenario};

pub(crate) const SCENARIO: Scenario = Scenario {
    name: "start",
    about: "start of `hapax up` with 100 processors whose compiled code is cached",
    by_default: true,
    run,
};

fn run(bench: &Workbench, section: &mut Section) -> Result<(), Missing> {
    let hapax = Hapax::find()?;
    let folder = tempfile::tempdir_in(bench.folder()).unwrap();
    let component = std::fs::read(&hapax.component).unwrap();
    let processors: Vec<_> = (0..bench.pick(3, 100, 100))
        .map(|number| {
            let path = folder.path().join(format!("processor-{number}.wasm"));
            std::fs::write(&path, distinct(&component, number)).unwrap();
            (format!("processor-{number}"), path)
        })
        .collect();
    let cold = seconds(&hapax, folder.path(), &processors).0;
    let (mut warm, mut memory) = (Vec::new(), 0);
    for _ in 0..bench.rounds(5) {
        let (seconds, bytes) = seconds(&hapax, folder.path(), &processors);
        warm.push(seconds);
        memory = bytes;
    }
    let warm = Spread::of(warm);
    section.table(&["processors", "first start, compiling, s", "later starts, s", "VmRSS then, MiB"]);
    let memory = short(memory as f64 / f64::from(1 << 20));
    section.row(vec![processors.len().to_string(), short(cold), warm.to_string(), memory]);
    section.text("From the start of the process until it listens. Every processor is a component of its own digest.");
    section.judge("start", format!("{warm} s"), warm.median <= 1.0);
    Ok(())
}

fn seconds(hapax: &Hapax, folder: &std::path::Path, processors: &[(String, PathBuf)]) -> (f64, u64) {
    let since = Instant::now();
    let serving = hapax.up(folder, processors);
    (since.elapsed().as_secs_f64(), memory_of(serving.id(), "VmRSS"))
}

/// The component with a custom section of its own, so that no two share their compiled code.
fn distinct(component: &[u8], number: u8) -> Vec<u8> {
    let name = b"bench";
    let section = [&[0, name.len() as u8 + 2, name.len() as u8], &name[..], &[number]].concat();
    [component, &section].concat()
}
