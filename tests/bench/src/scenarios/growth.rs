//! Effect of the number of records on throughput and duplicates.

use std::time::Instant;

use hapax_core::{Handling, Outcome};

use crate::measure::{Run, Spread, settle, short};
use crate::pipeline::Host;
use crate::plot::{Axis, Plot};
use crate::report::{Met, Section};
use crate::work::{self, Ids, Item};
use crate::workbench::{Size, Workbench};
use crate::{Missing, Scenario};

pub(crate) const SCENARIO: Scenario = Scenario {
    name: "growth",
    about: "throughput and duplicates at 100 thousand, 1 million and (--long) 10 million records",
    by_default: true,
    run,
};

const IN_FLIGHT: usize = 1_024;

/// Results of one size, round by round.
#[derive(Default)]
struct Figures {
    rate: Vec<f64>,
    /// Rate with what was done behind the answers.
    rate_all: Vec<f64>,
    p99_ms: Vec<f64>,
    duplicates: Vec<f64>,
    sync_ms: Vec<f64>,
}

fn run(bench: &Workbench, section: &mut Section) -> Result<(), Missing> {
    let sizes = bench.pick(vec![1_000, 4_000], vec![100_000, 1_000_000], vec![100_000, 1_000_000, 10_000_000]);
    let messages = bench.pick(2_048, 100_000, 100_000);
    // The larger stores hardly change by a round; the smallest is made anew each time.
    let mut large: Vec<_> = sizes[1..].iter().map(|records| (*records, bench.filled(*records))).collect();
    let mut figures: Vec<_> = sizes.iter().map(|_| Figures::default()).collect();
    for _ in 0..bench.rounds(5) {
        let small = bench.filled(sizes[0]);
        measure(bench, &mut figures[0], &mut Host::open(small.path(), Ids::Random, sizes[0]), messages);
        for ((records, folder), figures) in large.iter_mut().zip(&mut figures[1..]) {
            let mut host = Host::open(folder.path(), Ids::Random, *records);
            measure(bench, figures, &mut host, messages);
            *records = host.records;
        }
    }
    section.text(format!(
        "{messages} messages a round at {IN_FLIGHT} in flight, random ids, then as many duplicates one after the other, without \
         a cache."
    ));
    table(section, &sizes, &figures);
    plot(section, &sizes, &figures);
    judge(bench, section, &figures);
    Ok(())
}

fn measure(bench: &Workbench, figures: &mut Figures, host: &mut Host, messages: u64) {
    let known = host.records;
    settle();
    figures.sync_ms.push(bench.sync_ms());
    let since = Instant::now();
    let fresh = host.fresh(messages);
    let made = since.elapsed();
    let run: Run = host.run(&host.consumer(hapax_core::Options::default().cache_bytes), IN_FLIGHT, fresh);
    let behind = settle();
    eprintln!("  {known} records: {} a second (made ready in {made:.1?})", short(run.rate()));
    figures.rate.push(run.rate());
    figures.rate_all.push(messages as f64 / (run.elapsed + behind).as_secs_f64());
    figures.p99_ms.push(run.latency_ms(0.99));
    figures.duplicates.push(duplicates(host, known, messages));
}

/// Duplicates a second, one after the other.
fn duplicates(host: &Host, known: u64, count: u64) -> f64 {
    let consumer = host.consumer(0);
    let messages: Vec<_> = work::picked(count, known).map(|number| Item::new(Ids::Random, number).message()).collect();
    let since = Instant::now();
    host.runtime.block_on(async {
        for message in messages {
            let outcome = consumer.handle(message, Handling::default()).await.unwrap();
            assert!(matches!(outcome, Outcome::Duplicate(_)), "{outcome:?}");
        }
    });
    count as f64 / since.elapsed().as_secs_f64()
}

fn table(section: &mut Section, sizes: &[u64], figures: &[Figures]) {
    section.table(&[
        "records",
        "messages a second",
        "with what was behind",
        "p99 ms",
        "duplicates a second",
        "sync ms",
    ]);
    for (records, figures) in sizes.iter().zip(figures) {
        let cell = |values: &[f64]| Spread::of(values.iter().copied()).to_string();
        section.row(vec![
            records.to_string(),
            cell(&figures.rate),
            cell(&figures.rate_all),
            cell(&figures.p99_ms),
            cell(&figures.duplicates),
            cell(&figures.sync_ms),
        ]);
    }
}

fn plot(section: &mut Section, sizes: &[u64], figures: &[Figures]) {
    let line = |name: &str, values: fn(&Figures) -> &Vec<f64>| {
        let point = |(records, figures): (&u64, &Figures)| {
            (*records as f64, Spread::of(values(figures).iter().copied()).median)
        };
        (name.to_owned(), sizes.iter().zip(figures).map(point).collect())
    };
    section.plot(
        "rate",
        &Plot {
            title: "Throughput and duplicates by records",
            x: Axis { label: "records", logarithmic: true },
            y: Axis { label: "a second", logarithmic: true },
            lines: vec![
                line("messages", |figures| &figures.rate),
                line("messages, with what was behind", |figures| &figures.rate_all),
                line("duplicates from the store", |figures| &figures.duplicates),
            ],
        },
    );
}

fn judge(bench: &Workbench, section: &mut Section, figures: &[Figures]) {
    let [small, .., large] = figures else { return };
    let mut row = |target: &str, of: fn(&Figures) -> &Vec<f64>| {
        let ratio = Spread::ratio(of(large), of(small));
        if bench.size == Size::Long {
            section.judge(target, format!("{ratio} x"), ratio.median >= 0.8);
        } else {
            section.judge(target, format!("{ratio} x at a tenth of that; --long has it all"), Met::NotJudged);
        }
    };
    row("growth", |figures| &figures.rate);
    row("growth-duplicates", |figures| &figures.duplicates);
}
