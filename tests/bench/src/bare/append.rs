//! Append and `fdatasync`: the floor under every durable store. Keeps nothing that could be looked
//! up.

use std::path::Path;
use std::time::Instant;

use crate::measure::{Run, Sample, append_synced};
use crate::work::{Ids, Item, RECORD, VALUE};

/// One append a group of what a message's commit holds, one sync a group.
pub(crate) fn run(folder: &Path, ids: Ids, group: u64, messages: u64) -> Run {
    let mut file = tempfile::tempfile_in(folder).unwrap();
    let mut samples = Vec::with_capacity((messages / group) as usize);
    let mut bytes = Vec::new();
    let since = Instant::now();
    for first in (0..messages).step_by(group as usize) {
        let began = Instant::now();
        bytes.clear();
        for number in first..first + group {
            let item = Item::new(ids, number);
            bytes.extend(item.record_key());
            bytes.extend(RECORD);
            bytes.extend(item.state_key());
            bytes.extend(VALUE);
        }
        append_synced(&mut file, &bytes);
        samples.push(Sample::of(since, began));
    }
    let messages = samples.len() as u64 * group;
    Run::new(samples, messages, since.elapsed(), group as f64)
}
