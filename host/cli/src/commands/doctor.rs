//! `hapax doctor` and `hapax compact`: a store that no host has open.

use std::path::PathBuf;
use std::process::ExitCode;

use hapax_store::doctor;
use serde_json::json;

use crate::exit::{DAMAGED, SUCCESS};
use crate::output::line;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of the store.
    #[arg(long, value_name = "PATH", default_value = "hapax-store")]
    store: PathBuf,
    /// Make a damaged or missing journal readable: what was acknowledged after the damage is lost, and counts as new when
    /// it is delivered again. The journal as it was is kept.
    #[arg(long)]
    cut_journal: bool,
}

#[derive(clap::Args)]
pub(crate) struct CompactArgs {
    /// Folder of the store.
    #[arg(long, value_name = "PATH", default_value = "hapax-store")]
    store: PathBuf,
}

pub(crate) fn command(args: &Args, json: bool) -> anyhow::Result<ExitCode> {
    if args.cut_journal {
        cut(args, json)?;
    }
    let found = doctor::examine(&args.store)?;
    let whole = found.database_is_whole && found.journal_damage.is_none();
    if json {
        let findings = json!({
            "store": found.store_id, "ok": whole, "database_is_whole": found.database_is_whole,
            "applied_frames": found.applied_frames, "unapplied_frames": found.unapplied_frames,
            "journal_damage": found.journal_damage,
        });
        line(&findings.to_string());
    } else {
        line(&format!("store {}", found.store_id));
        line(match found.database_is_whole {
            true => "database: whole",
            false => "database: DAMAGED; put back a backup of the folder",
        });
        let (applied, unapplied) = (found.applied_frames, found.unapplied_frames);
        line(&match &found.journal_damage {
            None => format!("journal: whole; {applied} frames are in the tables, {unapplied} follow at the next start"),
            Some(damage) => format!(
                "journal: DAMAGED: {damage}. {unapplied} frames before that can be read. Put back a backup of the folder, or \
                 give up what comes after with `hapax doctor --cut-journal`"
            ),
        });
    }
    Ok(ExitCode::from(if whole { SUCCESS } else { DAMAGED }))
}

fn cut(args: &Args, json: bool) -> anyhow::Result<()> {
    let cut = doctor::cut_journal(&args.store)?;
    let damaged = cut.as_ref().and_then(|cut| cut.damaged.as_ref()).map(|path| path.display().to_string());
    if json {
        line(
            &json!({ "cut": cut.is_some(), "kept_frames": cut.map(|cut| cut.kept_frames), "damaged": damaged })
                .to_string(),
        );
        return Ok(());
    }
    line(&match cut {
        None => "the journal is whole: nothing was cut".to_owned(),
        Some(cut) => {
            let kept = damaged.map_or_else(String::new, |path| format!("; the journal as it was is {path}"));
            format!("the journal was cut after {} frames{kept}", cut.kept_frames)
        }
    });
    Ok(())
}

pub(crate) fn compact(args: &CompactArgs, json: bool) -> anyhow::Result<ExitCode> {
    let (before, after) = doctor::compact(&args.store)?;
    if json {
        line(&json!({ "bytes_before": before, "bytes_after": after }).to_string());
    } else {
        line(&format!("{before} bytes before, {after} bytes after"));
    }
    Ok(ExitCode::SUCCESS)
}
