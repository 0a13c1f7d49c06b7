//! `hapax dlq`: messages that failed for good, and those that wait. Asks and prints; what may be done is core's to say.

use std::process::ExitCode;

use hapax_transport::{Ask, Chosen, LetterFilter, StandingName};
use serde_json::Value;

use crate::exit::{Failed, REFUSED};
use crate::host::operations::rfc3339;
use crate::commands::target::Place;
use crate::commands::records;
use crate::output::run_printer::line;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// List kept messages in the order of their keys.
    List {
        #[command(flatten)]
        filter: Filter,
        /// Start after this key.
        #[arg(long, value_name = "KEY")]
        after: Option<String>,
        #[command(flatten)]
        place: Place,
    },
    /// Show one: body, attributes, error, attempts, history, what it waits for and what it blocks.
    Show {
        /// The key: tenant/processor/source/key#fingerprint, as `list` prints it.
        key: String,
        #[command(flatten)]
        place: Place,
    },
    /// Run dead letters again, with all their attempts before them: at once where the host runs, else when it is started.
    Redrive(Deed),
    /// Forget kept messages. Their records stay: a duplicate still gets the stored error.
    Discard(Deed),
}

#[derive(clap::Args)]
pub(crate) struct Filter {
    /// Only this processor's.
    #[arg(long, value_name = "NAME")]
    processor: Option<String>,
    /// Only of this type.
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// Only from this source.
    #[arg(long)]
    source: Option<String>,
    /// Only those whose error contains this text.
    #[arg(long, value_name = "TEXT")]
    error: Option<String>,
    /// Only those kept since then: RFC 3339, or how long ago, such as 2h.
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Only those kept before then, likewise.
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Only those that wait for this.
    #[arg(long)]
    standing: Option<Standing>,
    /// So many, at most: 1000 are listed, 10000 redriven or discarded, unless told otherwise.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Standing {
    /// They failed for good and wait for an operator.
    Dead,
    /// They wait for the message before them.
    Parked,
    /// They are to run again.
    Redriven,
}

#[derive(clap::Args)]
pub(crate) struct Deed {
    /// The key of one, as `list` prints it.
    #[arg(conflicts_with = "all")]
    key: Option<String>,
    /// All that the filters find; without `--standing`, only those that are dead.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    filter: Filter,
    #[command(flatten)]
    audit: Audited,
    #[command(flatten)]
    place: Place,
}

/// What the audit trail is told.
#[derive(clap::Args)]
pub(crate) struct Audited {
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
    /// Why, for the audit trail.
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    /// Who, for the audit trail; the user unless given.
    #[arg(long, value_name = "NAME")]
    actor: Option<String>,
}

impl Audited {
    /// The same, to be done to what has these keys.
    pub(crate) fn to(self, keys: Vec<String>) -> Chosen {
        let user = || std::env::var("USER").ok().filter(|user| !user.is_empty());
        let actor = self.actor.or_else(user).unwrap_or_else(|| "unknown".to_owned());
        Chosen { keys, filter: None, dry_run: self.dry_run, actor, reason: self.reason }
    }
}

impl From<Filter> for LetterFilter {
    fn from(filter: Filter) -> Self {
        let standing = filter.standing.map(|standing| match standing {
            Standing::Dead => StandingName::Dead,
            Standing::Parked => StandingName::Parked,
            Standing::Redriven => StandingName::Redriven,
        });
        let Filter { processor, kind, source, error, since, until, limit, .. } = filter;
        Self { processor, kind, source, error, since, until, standing, limit, after: None }
    }
}

impl Deed {
    fn chosen(self) -> anyhow::Result<(Place, Chosen)> {
        let filter = LetterFilter::from(self.filter);
        if self.key.is_none() && !self.all {
            return Err(Failed::usage("name one message by its KEY, or say --all, with filters or without"));
        }
        if self.key.is_some() && filter != LetterFilter::default() {
            return Err(Failed::usage("a KEY names one message: give filters with --all only"));
        }
        let chosen = self.audit.to(self.key.into_iter().collect());
        Ok((self.place, Chosen { filter: self.all.then_some(filter), ..chosen }))
    }
}

pub(crate) fn command(command: Command, json: bool) -> anyhow::Result<ExitCode> {
    match command {
        Command::List { filter, after, place } => {
            let answer = place.ask(Ask::Letters(LetterFilter { after, ..filter.into() }))?;
            print_list(&answer, "letters", json, |letter| {
                let waits = letter["awaits"].as_u64().map_or_else(String::new, |version| {
                    format!(" (until {})", moment(&letter["until_ms"], &format!("version {version}")))
                });
                let (standing, at) = (text(&letter["standing"]), rfc3339(letter["at_ms"].as_u64().unwrap_or(0)));
                format!("{standing:<8} {at:<24} {}: {}{waits}", text(&letter["key"]), text(&letter["error"]))
            });
            Ok(ExitCode::SUCCESS)
        }
        Command::Show { key, place } => {
            let letter = place.ask(Ask::Letter(key))?;
            if json {
                line(&letter.to_string())
            } else {
                print(&letter)
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Redrive(deed) => {
            let (place, chosen) = deed.chosen()?;
            Ok(print_deed(&place.ask(Ask::Redrive(chosen))?, json))
        }
        Command::Discard(deed) => {
            let (place, chosen) = deed.chosen()?;
            Ok(print_deed(&place.ask(Ask::Discard(chosen))?, json))
        }
    }
}

/// Text as it is; anything else as JSON.
pub(crate) fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn moment(at_ms: &Value, otherwise: &str) -> String {
    at_ms.as_u64().map_or_else(|| otherwise.to_owned(), rfc3339)
}

/// A line an item, and how to go on if there are more.
pub(crate) fn print_list(answer: &Value, name: &str, json: bool, as_line: impl Fn(&Value) -> String) {
    for item in answer[name].as_array().into_iter().flatten() {
        line(&if json { item.to_string() } else { as_line(item) });
    }
    if let Some(next) = answer["next"].as_str() {
        eprintln!("there are more: go on with --after '{next}'");
    }
}

/// One kept message, for people.
fn print(letter: &Value) {
    let show = |name: &str, value: String| line(&format!("{:<12} {value}", format!("{name}:")));
    show("key", text(&letter["key"]));
    show("standing", text(&letter["standing"]));
    show("error", text(&letter["error"]));
    if letter["awaits"].is_u64() {
        show("waits for", format!("version {}, until {}", letter["awaits"], moment(&letter["until_ms"], "?")));
    }
    for (index, behind) in letter["blocks"].as_array().into_iter().flatten().enumerate() {
        show(if index == 0 { "blocks" } else { "" }, text(behind));
    }
    show("attempts", text(&letter["attempts"]));
    show("component", text(&letter["component"]));
    show("kept", moment(&letter["at_ms"], "?"));
    for name in ["position", "idempotency_key", "headers"].iter().filter(|name| !letter[**name].is_null()) {
        show(name, text(&letter[*name]));
    }
    for (name, value) in letter["attributes"].as_object().into_iter().flatten() {
        show(name, text(value));
    }
    for name in ["data", "data_base64"].iter().filter(|name| !letter[**name].is_null()) {
        show(name, text(&letter[*name]));
    }
    match letter["state"].as_str() {
        Some(state) => show("record", format!("{state}, {}", text(&letter["record"]))),
        None => show("record", "none".to_owned()),
    }
    letter["history"].as_array().into_iter().flatten().for_each(|event| line(&records::event_line(event)));
}

/// What was done, a line each; fails if something was refused.
pub(crate) fn print_deed(answer: &Value, json: bool) -> ExitCode {
    let listed = |name: &str| answer[name].as_array().cloned().unwrap_or_default();
    let (done, refused) = (listed("done"), listed("refused"));
    if json {
        line(&answer.to_string());
    } else {
        let (verb, dry_run) = (text(&answer["action"]), answer["dry_run"] == true);
        done.iter().for_each(|key| line(&format!("{verb} {}", text(key))));
        refused.iter().for_each(|one| line(&format!("refused {}: {}", text(&one["key"]), text(&one["error"]))));
        let nothing = if dry_run { "; this was a dry run: nothing was done" } else { "" };
        let more = if answer["more"] == true { "; there are more: say it again" } else { "" };
        line(&format!("{verb}: {} done, {} refused{nothing}{more}", done.len(), refused.len()));
    }
    if refused.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(REFUSED) }
}
