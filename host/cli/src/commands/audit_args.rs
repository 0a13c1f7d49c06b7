//! Arguments that every operator action takes: actor and reason for the audit trail, and the dry run.

use hapax_transport::Selection;

/// Actor, reason and dry run of an operator action.
#[derive(clap::Args)]
pub(crate) struct AuditArgs {
    /// Print the changes and refusals that the action would make, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Reason for the action, for the audit trail.
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    /// Name of the operator, for the audit trail [default: $USER]
    #[arg(long, value_name = "NAME")]
    actor: Option<String>,
}

impl AuditArgs {
    /// Makes the selection of `keys` that the action is performed on.
    pub(crate) fn select(self, keys: Vec<String>) -> Selection {
        let user = || std::env::var("USER").ok().filter(|user| !user.is_empty());
        let actor = self.actor.or_else(user).unwrap_or_else(|| "unknown".to_owned());
        Selection { keys, filter: None, dry_run: self.dry_run, actor, reason: self.reason }
    }
}
