//! Commits of a group: checks that the expectations of each commit still hold, then makes the valid
//! commits durable with one append to the journal and one sync. The applier brings the tables up to
//! date later.

use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasherDefault;

use hapax_core::{
    Commit, DigestHasher, Group, RangeRead, ReadSet, Record, RecordChange, Scope, StoreError, Verdict, Version, fault,
};

use crate::format::frame::Builder;
use crate::format::layout;
use crate::journal::Journal;
use crate::redb::core::Core;
use crate::redb::open::io_store_error;
use crate::redb::read;

/// Writes a group and makes it visible. Called by one thread at a time.
pub(crate) fn commit(core: &Core, journal: &mut Journal, group: &Group) -> Result<Vec<Verdict>, StoreError> {
    core.failure()?;
    let mut frame = Builder::new(group.commits.len());
    let mut validator = Validator::new(core, group);
    let mut verdicts = Vec::with_capacity(group.commits.len());
    for commit in &group.commits {
        let verdict = validator.verdict(commit)?;
        if verdict == Verdict::Committed {
            frame.push(commit);
            validator.add(commit);
        }
        verdicts.push(verdict);
    }
    for sent in &group.sent {
        frame.push_sent(*sent);
    }
    for entry in &group.feed_entries {
        frame.push_event(entry);
    }
    if !frame.is_empty() {
        if fault::mutated("split-commit") {
            return in_two(core, journal, group, verdicts);
        }
        write(core, journal, frame)?;
    }
    Ok(verdicts)
}

/// Appends one frame, syncs, and makes it visible.
pub(crate) fn write(core: &Core, journal: &mut Journal, frame: Builder) -> Result<(), StoreError> {
    let offset = make_room(core, journal, frame.len())?;
    fault::point("group-written");
    let (frame, after) = journal.append(frame, offset).map_err(|error| {
        let error = io_store_error(&error);
        // The frame may or may not be on the disk, so nothing may be appended after it.
        core.fail(error.clone());
        error
    })?;
    let wake = {
        let mut view = core.view.write();
        let first = view.active.is_empty();
        view.active.insert(&frame, after).map_err(|_| StoreError::Damaged("a frame cannot be read back".into()))?;
        let full = view.active.bytes() >= core.options.memtable_bytes;
        if full {
            view.freeze();
        }
        first || full
    };
    if wake {
        core.wake();
    }
    Ok(())
}

/// Waits until the memtables are within their bound and the journal has room: when the applier is
/// behind, commits wait.
fn make_room(core: &Core, journal: &mut Journal, length: usize) -> Result<u64, StoreError> {
    core.wait_for(|view| {
        let applied = view.snapshot.applied.sequence;
        let within = view.frozen.is_empty() || view.unapplied_bytes() < core.options.unapplied_bytes_max;
        let offset = journal.room(length, applied).filter(|_| within);
        if offset.is_none() {
            view.freeze();
        }
        offset
    })
}

/// The mutation "the commit is split in two": records first, their effects afterwards.
fn in_two(
    core: &Core,
    journal: &mut Journal,
    group: &Group,
    verdicts: Vec<Verdict>,
) -> Result<Vec<Verdict>, StoreError> {
    let (mut records, mut effects) = (Builder::new(group.commits.len()), Builder::new(group.commits.len()));
    for (commit, _) in group.commits.iter().zip(&verdicts).filter(|(_, verdict)| **verdict == Verdict::Committed) {
        records.push(&Commit { effects: Default::default(), held_message: None, shared: None, ..commit.clone() });
        effects.push(&Commit { record: RecordChange::Keep, ..commit.clone() });
    }
    group.sent.iter().for_each(|sent| effects.push_sent(*sent));
    group.feed_entries.iter().for_each(|entry| effects.push_event(entry));
    write(core, journal, records)?;
    write(core, journal, effects)?;
    Ok(verdicts)
}

/// Checks each commit of a group against the store and the earlier commits of the group.
struct Validator<'a> {
    core: &'a Core,
    /// Records that the group wrote, by digest of the key; `None` if removed.
    records: HashMap<u128, Option<&'a Record>, BuildHasherDefault<DigestHasher>>,
    /// Versions that the group's commits wrote, 0 where they deleted. Collected only if a commit of
    /// the group has reads.
    written: Option<BTreeMap<(&'a Scope, &'a str), Version>>,
    /// Versions that the group's commits wrote to the tenants' shared state, by tenant and key.
    shared: BTreeMap<(&'a str, &'a str), Version>,
}

impl<'a> Validator<'a> {
    fn new(core: &'a Core, group: &Group) -> Self {
        let has_read = |commit: &Commit| {
            let reads = &commit.reads;
            !(reads.keys.is_empty() && reads.ranges.is_empty()) || commit.shared.is_some()
        };
        let any_read = group.commits.iter().any(has_read);
        Self { core, records: HashMap::default(), written: any_read.then(BTreeMap::new), shared: BTreeMap::new() }
    }

    fn verdict(&self, commit: &Commit) -> Result<Verdict, StoreError> {
        let found = match self.records.get(&commit.key.digest()) {
            Some(record) => record.cloned(),
            None => read::record(self.core, &commit.key)?,
        };
        if !commit.expected.holds(found.as_ref().map(|record| record.epoch)) {
            return Ok(Verdict::EpochMismatch(found.map(Box::new)));
        }
        Ok(if self.holds(commit)? && self.shared_holds(commit)? { Verdict::Committed } else { Verdict::Conflict })
    }

    fn add(&mut self, commit: &'a Commit) {
        if commit.record != RecordChange::Keep {
            self.records.insert(commit.key.digest(), commit.record.put().map(|record| &**record));
        }
        if let Some(written) = &mut self.written {
            let scope = &commit.key.scope;
            let version = |value: &Option<_>| if value.is_some() { commit.version } else { 0 };
            written.extend(commit.effects.writes.iter().map(|(key, value)| ((scope, key.as_str()), version(value))));
            let shared = commit.shared.iter().flat_map(|shared| &shared.writes);
            self.shared.extend(shared.map(|(key, value)| ((&*scope.tenant, key.as_str()), version(value))));
        }
    }

    /// Returns true if everything that the run read of its processor's state still holds.
    fn holds(&self, commit: &Commit) -> Result<bool, StoreError> {
        let Some(written) = &self.written else { return Ok(true) };
        let scope = &commit.key.scope;
        let prefix = layout::scope_prefix(scope);
        commit.reads.holds(
            |key| self.version(written.get(&(scope, key)), &prefix, key),
            |range| self.range_holds(written, scope, &prefix, range),
        )
    }

    /// Returns true if everything that the commit read of the tenant's shared state still holds.
    fn shared_holds(&self, commit: &Commit) -> Result<bool, StoreError> {
        let Some(shared) = &commit.shared else { return Ok(true) };
        if fault::mutated("shared-unchecked") {
            return Ok(true);
        }
        let scope = commit.key.scope.shared();
        let prefix = layout::scope_prefix(&scope);
        ReadSet::keys_hold(&shared.reads, |key| self.version(self.shared.get(&(&*scope.tenant, key)), &prefix, key))
    }

    /// Returns the current version of `key`: the one that the group wrote, or else the store's.
    fn version(&self, written: Option<&Version>, prefix: &[u8], key: &str) -> Result<Option<Version>, StoreError> {
        match written {
            Some(version) => Ok(Some(*version)),
            None => Ok(Some(read::state(self.core, prefix, key)?.0)),
        }
    }

    /// Returns true if a scan of `range` over the store and the group's writes returns the same as
    /// it did in the run.
    fn range_holds(
        &self,
        written: &BTreeMap<(&Scope, &str), Version>,
        scope: &Scope,
        prefix: &[u8],
        range: &RangeRead,
    ) -> Result<bool, StoreError> {
        if range.end.as_deref().is_some_and(|end| end <= range.start.as_str()) {
            return Ok(range.seen.is_empty());
        }
        let inside = |key: &str| range.end.as_deref().is_none_or(|end| key < end);
        let above: Vec<(&str, Version)> = written
            .range((scope, range.start.as_str())..)
            .take_while(|((of, key), _)| *of == scope && inside(key))
            .map(|((_, key), version)| (*key, *version))
            .collect();
        // Deletes of the group hide entries of the store: read that many more.
        let limit = range.limit.saturating_add(above.len());
        let below = read::scan(self.core, prefix, &range.start, range.end.as_deref(), limit)?;
        let mut now: BTreeMap<&str, Version> = below.iter().map(|(key, version, _)| (key.as_str(), *version)).collect();
        now.extend(above);
        Ok(range.matches(now.into_iter()))
    }
}
