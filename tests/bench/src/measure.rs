//! Measurements of a loop: latencies, pauses, processor time, the disk's sync time. Measures;
//! judges nothing.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// One message, or one group of a loop that works in groups.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    /// End of the operation, in microseconds since its loop began.
    pub(crate) at_us: u32,
    /// Duration of the operation, in microseconds.
    pub(crate) took_us: u32,
}

impl Sample {
    pub(crate) fn of(loop_began: Instant, began: Instant) -> Self {
        let now = Instant::now();
        Self { at_us: (now - loop_began).as_micros() as u32, took_us: (now - began).as_micros() as u32 }
    }
}

/// One run of one loop.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    /// In the order in which they ended; every sample stands for the same number of messages.
    samples: Vec<Sample>,
    /// Durations of the operations, sorted, in microseconds.
    sorted_us: Vec<u32>,
    /// Messages done.
    pub(crate) messages: u64,
    /// From the first to the last.
    pub(crate) elapsed: Duration,
    /// Messages a commit.
    pub(crate) group: f64,
}

impl Run {
    pub(crate) fn new(mut samples: Vec<Sample>, messages: u64, elapsed: Duration, group: f64) -> Self {
        samples.sort_unstable_by_key(|sample| sample.at_us);
        let mut sorted_us: Vec<_> = samples.iter().map(|sample| sample.took_us).collect();
        sorted_us.sort_unstable();
        Self { samples, sorted_us, messages, elapsed, group }
    }

    /// Messages a second.
    pub(crate) fn rate(&self) -> f64 {
        self.messages as f64 / self.elapsed.as_secs_f64()
    }

    /// The latency that a `share` of the messages did not exceed, in milliseconds.
    pub(crate) fn latency_ms(&self, share: f64) -> f64 {
        let at = ((self.sorted_us.len() - 1) as f64 * share) as usize;
        f64::from(self.sorted_us[at]) / 1e3
    }

    /// Longest time without any message ending, in milliseconds.
    pub(crate) fn longest_pause_ms(&self) -> f64 {
        let ends = self.samples.iter().map(|sample| sample.at_us);
        let begins = std::iter::once(0).chain(ends.clone());
        ends.zip(begins).map(|(end, begin)| f64::from(end - begin) / 1e3).fold(0.0, f64::max)
    }

    /// Messages a second over time: second from the start, rate in the window that ends there.
    pub(crate) fn over_time(&self, window: Duration) -> Vec<(f64, f64)> {
        let window_us = window.as_micros() as usize;
        let windows = (self.elapsed.as_micros() as usize / window_us).max(1);
        let mut counts = vec![0.0; windows];
        let weight = self.messages as f64 / self.samples.len() as f64;
        for sample in &self.samples {
            if let Some(count) = counts.get_mut(sample.at_us as usize / window_us) {
                *count += weight;
            }
        }
        let seconds = window.as_secs_f64();
        counts.iter().enumerate().map(|(at, count)| ((at + 1) as f64 * seconds, count / seconds)).collect()
    }

    /// Latency in milliseconds against the percentage of messages in its bin; bins grow by a
    /// seventh or so.
    pub(crate) fn histogram(&self) -> Vec<(f64, f64)> {
        let bin = |us: u32| (f64::from(us.max(1)).log2() * 5.0) as usize;
        let mut bins = vec![0u32; bin(u32::MAX) + 1];
        self.sorted_us.iter().for_each(|us| bins[bin(*us)] += 1);
        let total = self.sorted_us.len() as f64;
        let first = bins.iter().position(|count| *count > 0).unwrap_or(0);
        let last = bins.iter().rposition(|count| *count > 0).unwrap_or(0);
        let point = |at: usize| (2f64.powf((at as f64 + 0.5) / 5.0) / 1e3, f64::from(bins[at]) / total * 100.0);
        (first..=last).map(point).collect()
    }
}

/// Least, median, greatest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spread {
    pub(crate) least: f64,
    pub(crate) median: f64,
    pub(crate) greatest: f64,
}

impl Spread {
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        Self { least: values[0], median: values[values.len() / 2], greatest: values[values.len() - 1] }
    }

    /// Of the ratios of paired rounds.
    pub(crate) fn ratio(ours: &[f64], theirs: &[f64]) -> Self {
        Self::of(ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs))
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({} - {})", short(self.median), short(self.least), short(self.greatest))
    }
}

/// A number with about three digits that say something.
pub(crate) fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// Processor time of this thread.
pub(crate) fn thread_cpu() -> Duration {
    cpu_by(ClockId::ThreadCPUTime)
}

/// Processor time of this process.
pub(crate) fn process_cpu() -> Duration {
    cpu_by(ClockId::ProcessCPUTime)
}

fn cpu_by(clock: ClockId) -> Duration {
    let now = clock_gettime(clock);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Processor time of a process, to a hundredth of a second.
pub(crate) fn cpu_of(pid: u32) -> Duration {
    ticks(&format!("/proc/{pid}/stat"), 13)
}

/// Processor time of the children that ended and were waited for, to a hundredth of a second.
pub(crate) fn children_cpu() -> Duration {
    ticks("/proc/self/stat", 15)
}

/// Two neighbouring fields of a process's `stat`, counted from 0: time in user mode and in the
/// kernel.
fn ticks(file: &str, field: usize) -> Duration {
    let text = std::fs::read_to_string(file).unwrap();
    // The name, in brackets, may hold spaces; the fields after it are numbers.
    let (_, fields) = text.rsplit_once(") ").unwrap();
    let ticks: u64 = fields.split(' ').skip(field - 2).take(2).map(|field| field.parse::<u64>().unwrap()).sum();
    Duration::from_millis(ticks * 1_000 / rustix::param::clock_ticks_per_second())
}

/// Median time of an append of 256 bytes and its `fdatasync`, in milliseconds, just now.
pub(crate) fn sync_ms(folder: &Path) -> f64 {
    let mut file = tempfile::tempfile_in(folder).unwrap();
    Spread::of((0..15).map(|_| {
        let since = Instant::now();
        append_synced(&mut file, &[7; 256]);
        since.elapsed().as_secs_f64() * 1e3
    }))
    .median
}

pub(crate) fn append_synced(file: &mut File, bytes: &[u8]) {
    file.write_all(bytes).unwrap();
    file.sync_data().unwrap();
}

/// Waits until this process works no more: what a store does behind an answer belongs to the loop
/// that was answered, not to the next one. Answers how long that took.
pub(crate) fn settle() -> Duration {
    settle_of(std::process::id())
}

/// Waits until the process `pid` is quiet; returns the time that this took.
pub(crate) fn settle_of(pid: u32) -> Duration {
    const QUIET: u32 = 3;
    const STEP: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(300);
    let since = Instant::now();
    let mut quiet = 0;
    while quiet < QUIET && since.elapsed() < LONGEST {
        let before = (cpu_of(pid), written_bytes(pid));
        std::thread::sleep(STEP);
        let idle = cpu_of(pid) - before.0 <= STEP / 10 && written_bytes(pid) == before.1;
        quiet = if idle { quiet + 1 } else { 0 };
    }
    since.elapsed().saturating_sub(STEP * QUIET)
}

/// Bytes that a process has had written to disks.
fn written_bytes(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    line.and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
}

/// `VmRSS` or `VmHWM` of a process, in bytes.
pub(crate) fn memory_of(pid: u32, line: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let kibi = text.lines().find_map(|found| found.strip_prefix(line)?.strip_prefix(':')?.trim().split(' ').next());
    kibi.and_then(|kibi| kibi.parse::<u64>().ok()).unwrap() * 1024
}

/// Bytes of all files in a folder.
pub(crate) fn folder_bytes(folder: &Path) -> u64 {
    let files = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
    files
        .map(|file| if file.path().is_dir() { folder_bytes(&file.path()) } else { file.metadata().unwrap().len() })
        .sum()
}
