//! The `outbox` import: messages to send once this one has committed. Refuses what would be no
//! CloudEvent.

use hapax_core::Outgoing;
use wasmtime::Error;

use super::HostState;
use crate::bindings::hapax::processor::outbox::{self, Host};

/// Attribute names that CloudEvents keeps for itself.
const RESERVED: [&str; 9] =
    ["id", "source", "specversion", "type", "subject", "time", "datacontenttype", "dataschema", "data"];

/// A message that cannot be sent. Would be the same at the next attempt: rejects the message being
/// handled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotSendable {
    #[error("an outgoing message has no type")]
    NoType,
    #[error(
        "an outgoing message has the extension `{0}`: names are lower-case letters and digits, and not CloudEvents' own"
    )]
    Extension(String),
}

impl Host for HostState {
    fn send(&mut self, message: outbox::Outgoing) -> wasmtime::Result<()> {
        let outgoing = checked(message).map_err(Error::new)?;
        self.context()?.send(outgoing).map_err(Error::new)
    }
}

fn checked(message: outbox::Outgoing) -> Result<Outgoing, NotSendable> {
    if message.type_.is_empty() {
        return Err(NotSendable::NoType);
    }
    if let Some((name, _)) = message.extensions.iter().find(|(name, _)| !is_extension(name)) {
        return Err(NotSendable::Extension(name.clone()));
    }
    Ok(Outgoing {
        kind: message.type_,
        subject: message.subject,
        content_type: message.content_type,
        data: message.data.into(),
        extensions: message.extensions.into_iter().collect(),
    })
}

fn is_extension(name: &str) -> bool {
    !name.is_empty()
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
        && !RESERVED.contains(&name)
}
