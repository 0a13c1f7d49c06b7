//! Named fault points and mutations for the crash tests. Compiled to nothing without the feature
//! `faults`; decides nothing about messages.

/// Kills the process at the fault point `name` if the environment asks for it: `HAPAX_FAULT=name`
/// at the first passage, `HAPAX_FAULT=name:7` at the seventh. The death is `abort`: no destructor
/// runs, nothing is flushed.
#[inline]
pub fn point(name: &str) {
    #[cfg(feature = "faults")]
    armed::pass(name);
    let _ = name;
}

/// Kills the process at the fault point `name` if the environment asks for it at the message `id`:
/// `HAPAX_FAULT=name=id`, or several ids with commas between them, at every passage.
#[inline]
pub fn point_of(name: &str, id: &str) {
    #[cfg(feature = "faults")]
    armed::pass_of(name, id);
    let _ = (name, id);
}

/// Returns `true` if the mutation `name` is switched on (`HAPAX_MUTATION=name`): a small fault put
/// into the code on purpose, to see that a test turns red. Always `false` without the feature
/// `faults`.
#[inline]
pub fn mutated(name: &str) -> bool {
    #[cfg(feature = "faults")]
    return armed::mutation() == Some(name);
    #[cfg(not(feature = "faults"))]
    {
        let _ = name;
        false
    }
}

#[cfg(feature = "faults")]
mod armed {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static LEFT: OnceLock<Option<(String, AtomicU64)>> = OnceLock::new();
    static MUTATION: OnceLock<Option<String>> = OnceLock::new();

    pub(super) fn pass(name: &str) {
        let armed = LEFT.get_or_init(|| {
            let text = std::env::var("HAPAX_FAULT").ok()?;
            let (name, count) = text.split_once(':').unwrap_or((&text, "1"));
            Some((name.to_owned(), AtomicU64::new(count.parse().ok()?)))
        });
        if let Some((armed, left)) = armed
            && armed == name
            && left.fetch_sub(1, Ordering::Relaxed) == 1
        {
            std::process::abort();
        }
    }

    pub(super) fn pass_of(name: &str, id: &str) {
        static ARMED: OnceLock<Option<(String, String)>> = OnceLock::new();
        let armed = ARMED.get_or_init(|| {
            let text = std::env::var("HAPAX_FAULT").ok()?;
            text.split_once('=').map(|(name, id)| (name.to_owned(), id.to_owned()))
        });
        if armed.as_ref().is_some_and(|(at, of)| at == name && of.split(',').any(|of| of == id)) {
            std::process::abort();
        }
    }

    pub(super) fn mutation() -> Option<&'static str> {
        MUTATION.get_or_init(|| std::env::var("HAPAX_MUTATION").ok()).as_deref()
    }
}
