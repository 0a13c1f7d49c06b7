//! From the start of a process over a store whose process was killed under load, to the first
//! message served.

use std::time::{Duration, Instant};

use crate::child::Child;
use crate::measure::{Spread, short};
use crate::report::{Met, Section};
use crate::workbench::{Size, Workbench};
use crate::{Missing, Scenario};

pub(crate) const SCENARIO: Scenario = Scenario {
    name: "restart",
    about: "after a SIGKILL under load: time to the first message, at 1 million or (--long) 10 million records",
    by_default: true,
    run,
};

/// Messages of one life at most; none lives so long.
const LIFE: u64 = 100_000_000;

fn run(bench: &Workbench, section: &mut Section) -> Result<(), Missing> {
    let records = bench.pick(2_000, 1_000_000, 10_000_000);
    let under_load = Duration::from_millis(bench.pick(200, 3_000, 3_000));
    let folder = bench.filled(records);
    let rounds = bench.rounds(5);
    let (mut seconds, mut sync_ms) = (Vec::new(), Vec::new());
    let mut first = records;
    let mut victim = Child::start("serve", folder.path(), first, LIFE).wait_for("served");
    for _ in 0..rounds {
        // Under load for a while: there is something to recover.
        std::thread::sleep(under_load);
        victim.kill();
        sync_ms.push(bench.sync_ms());
        first += LIFE;
        let since = Instant::now();
        victim = Child::start("serve", folder.path(), first, LIFE).wait_for("served");
        seconds.push(since.elapsed().as_secs_f64());
    }
    victim.kill();
    let time = Spread::of(seconds);
    section.text(format!(
        "{records} records; each process worked {} s at 1,024 in flight before it was killed; {rounds} kills.",
        under_load.as_secs_f64()
    ));
    section.table(&["from the start of the process to the first message, s", "sync ms"]);
    section.row(vec![time.to_string(), short(Spread::of(sync_ms).median)]);
    if bench.size == Size::Long {
        section.judge("restart", format!("{time} s"), time.greatest <= 1.0);
    } else {
        section.judge("restart", format!("{time} s at a tenth of the records"), Met::NotJudged);
    }
    Ok(())
}
