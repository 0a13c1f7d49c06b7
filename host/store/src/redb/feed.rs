//! The feed of record events: memtables pack them into blocks as they come, the applier writes the
//! blocks, and the oldest go when there are too many. Reads go through the tables first, then
//! through what is not applied yet: the order of the feed.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use hapax_core::{Cursor, FeedEntry, FeedEvent, FeedPage, RecordKey, StoreError, fault};
use redb::{Table, WriteTransaction};

use crate::format::layout::{self, BLOCK_BYTES, FeedFacts};
use crate::format::seal::{Sealed, seal_of};
use crate::redb::core::Core;
use crate::redb::open::running_error;
use crate::redb::read;
use crate::redb::sums::{Changes, write_fact};
use crate::redb::view::{Snapshot, View};

/// An event with its position.
pub(crate) type Placed = (Cursor, FeedEntry);

/// Events in order, packed as the table has them.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    /// The blocks that are full, and the one that is being filled; each with the position of its
    /// first event.
    blocks: Vec<(Cursor, Vec<u8>)>,
    /// Events in all of them.
    count: u64,
}

impl Blocks {
    /// Adds an event, as a frame has it, behind all others. Returns the bytes that it takes.
    pub(crate) fn push(&mut self, cursor: Cursor, event: &[u8]) -> usize {
        let full = |block: &Vec<u8>| block.len() + PLACE_BYTES_MAX + event.len() > BLOCK_BYTES;
        if self.blocks.last().is_none_or(|(_, block)| full(block)) {
            self.blocks.push((cursor, Vec::with_capacity(BLOCK_BYTES)));
        }
        let (first, block) = self.blocks.last_mut().expect("there is one by now");
        let before = block.len();
        layout::push_placed(block, first.sequence, cursor, event);
        self.count += 1;
        block.len() - before
    }

    /// Returns the events behind the position `after`, in order.
    fn after(&self, after: Cursor) -> Result<Vec<Placed>, StoreError> {
        let from = self.blocks.partition_point(|(first, _)| *first <= after).saturating_sub(1);
        let mut found = Vec::new();
        for (first, block) in &self.blocks[from..] {
            found.extend(layout::parse_block(first.sequence, block).ok_or_else(damaged)?);
        }
        found.retain(|(cursor, _)| *cursor > after);
        Ok(found)
    }
}

/// Most bytes that an event's position takes in a block: two varints.
const PLACE_BYTES_MAX: usize = 10 + 5;

/// Filter of a reader of the feed.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    /// Of one record.
    of: Option<u128>,
    after: Cursor,
    limit: usize,
}

impl Wanted {
    fn wants(&self, (cursor, entry): &Placed) -> bool {
        *cursor > self.after && self.of.is_none_or(|digest| entry.digest == digest)
    }
}

/// Adds a memtable's events to the table, drops the oldest above the limit, and stores the table's
/// new extent.
pub(crate) fn write(
    txn: &WriteTransaction,
    mut facts: FeedFacts,
    events: &Blocks,
    core: &Core,
    sums: &mut Changes,
) -> Result<(), StoreError> {
    if fault::mutated("feed-not-applied") {
        return Ok(());
    }
    if events.count == 0 {
        return Ok(());
    }
    let mut table = txn.open_table(layout::FEED).map_err(running_error)?;
    let mut sealed = Vec::new();
    for (first, block) in &events.blocks {
        let key = (first.sequence, first.index);
        let sealed = core.seals.seal(Sealed::Feed, &[&layout::pair_key(key)], block, &mut sealed);
        sums.note("feed", seal_of(sealed));
        let old = table.insert(key, sealed).map_err(running_error)?;
        sums.note_old("feed", old.as_ref().map(|old| old.value()));
    }
    facts.events += events.count;
    trim(&mut table, &mut facts, core, sums)?;
    write_fact(txn, &core.seals, layout::META_FEED, &facts.encode())
}

/// Drops the oldest blocks until no more than `events_max` events are left.
fn trim(
    table: &mut Table<'_, (u64, u32), &'static [u8]>,
    facts: &mut FeedFacts,
    core: &Core,
    sums: &mut Changes,
) -> Result<(), StoreError> {
    while facts.events > core.options.events_max {
        let Some((key, block)) = table.pop_first().map_err(running_error)? else {
            return Err(StoreError::Damaged("the feed has fewer events than it says".into()));
        };
        let opened = core.seals.open(Sealed::Feed, &[&layout::pair_key(key.value())], block.value())?;
        let gone = layout::parse_block(key.value().0, opened).ok_or_else(damaged)?;
        sums.note("feed", seal_of(block.value()));
        facts.events = facts.events.saturating_sub(gone.len() as u64);
        if let Some((last, _)) = gone.last().filter(|_| !fault::mutated("feed-end-forgotten")) {
            facts.dropped = *last;
        }
    }
    Ok(())
}

fn damaged() -> StoreError {
    StoreError::Damaged("a block of the feed cannot be decoded".into())
}

/// Up to `limit` events after `after`, of one record if given; see [`hapax_core::Feed::events`].
pub(crate) fn events(
    core: &Core,
    of: Option<u128>,
    after: Option<Cursor>,
    limit: usize,
) -> Result<FeedPage, StoreError> {
    let wanted = Wanted { of, after: after.unwrap_or_default(), limit };
    if of.is_some() {
        // All events are looked at: in the tables, where nobody waits for it.
        core.flush()?;
    }
    let (above, end, snapshot) = {
        let view = core.view.read();
        (above(&view, &wanted)?, view.last_sequence(), view.snapshot.clone())
    };
    let mut found = below(&snapshot, &wanted)?;
    found.extend(above);
    found.truncate(limit);
    let truncated = wanted.after < snapshot.feed_facts.dropped || wanted.after.sequence > end;
    let mut keys: HashMap<u128, Option<RecordKey>> = HashMap::new();
    for (_, entry) in &found {
        if let Entry::Vacant(place) = keys.entry(entry.digest) {
            place.insert(key(core, entry.digest)?);
        }
    }
    let event = |(cursor, entry): Placed| FeedEvent { cursor, key: keys[&entry.digest].clone(), entry };
    Ok(FeedPage { events: found.into_iter().map(event).collect(), truncated })
}

/// Returns the key of the record with that digest, if there is one.
fn key(core: &Core, digest: u128) -> Result<Option<RecordKey>, StoreError> {
    if digest == 0 { Ok(None) } else { read::key_of(core, digest) }
}

/// Returns the memtables' events, oldest first.
fn above(view: &View, wanted: &Wanted) -> Result<Vec<Placed>, StoreError> {
    let mut found = Vec::new();
    for memtable in view.frozen.iter().map(|memtable| &**memtable).chain(std::iter::once(&view.active)) {
        found.extend(memtable.events.after(wanted.after)?.into_iter().filter(|placed| wanted.wants(placed)));
        if found.len() >= wanted.limit {
            break;
        }
    }
    found.truncate(wanted.limit);
    Ok(found)
}

/// Returns the table's events.
fn below(snapshot: &Snapshot, wanted: &Wanted) -> Result<Vec<Placed>, StoreError> {
    let after = (wanted.after.sequence, wanted.after.index);
    // The block that contains the position begins before it.
    let start = snapshot.feed.range(..=after).map_err(running_error)?.next_back().transpose().map_err(running_error)?;
    let start = start.map_or(after, |(key, _)| key.value());
    let mut found = Vec::new();
    for row in snapshot.feed.range(start..).map_err(running_error)? {
        if found.len() >= wanted.limit {
            break;
        }
        let (key, block) = row.map_err(running_error)?;
        let block = snapshot.seals.open(Sealed::Feed, &[&layout::pair_key(key.value())], block.value())?;
        let block = layout::parse_block(key.value().0, block).ok_or_else(damaged)?;
        found.extend(block.into_iter().filter(|placed| wanted.wants(placed)));
    }
    Ok(found)
}
