//! Outbound calls of a run: each under a key of its own, answered once and then from the journal.
//! The implementation of `Outbound` sends them.

use bytes::Bytes;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::run::answer_journal::Answered;
use crate::run::checkpoint::Checkpoints;
use crate::run::failure::{ContextError, Failure};
use crate::run::outbound::{OutboundError, OutboundRequest, OutboundResponse};
use crate::store::commit::Verdict;
use crate::support::fault;

/// Calls that one run may make, at most.
pub(super) const CALLS_MAX: u32 = 1_000;

/// Makes a run's outbound calls. Independent of the context, so that calls may be under way at the
/// same time.
#[derive(Clone)]
pub struct OutboundCaller(pub(crate) Arc<Checkpoints>);

/// An outbound call, with its index among those of its run: the same on every re-run.
pub struct OutboundCall {
    checkpoints: Arc<Checkpoints>,
    index: u32,
}

impl OutboundCaller {
    /// Gives the next call its index. Called in the order in which the processor makes its calls.
    pub fn next(&self) -> OutboundCall {
        OutboundCall { checkpoints: self.0.clone(), index: self.0.calls.fetch_add(1, Ordering::Relaxed) }
    }
}

impl OutboundCall {
    /// Returns the step key: the same on every re-run of the message, and no other call's. 32 hex
    /// digits.
    pub fn key(&self) -> String {
        self.checkpoints.identity.message_key.call_id(self.index)
    }

    /// Makes the call, or returns the answer that an earlier run of the message got. Adds
    /// `idempotency-key` and `traceparent` where the processor has set none.
    ///
    /// Answers are stored, except those that ask for another try (408, 425, 429 and 5xx): a retry
    /// makes these calls again, under the same key.
    pub async fn send(&self, mut request: OutboundRequest) -> Result<OutboundResponse, OutboundError> {
        let checkpoints = &*self.checkpoints;
        let Some(outbound) = &checkpoints.parts.outbound else {
            return Err(OutboundError::Denied(
                "the processor was granted no outbound calls (`http` in its settings)".into(),
            ));
        };
        if self.index >= CALLS_MAX {
            checkpoints.fail(Failure::Reject(format!("calls of one message are over their limit of {CALLS_MAX}")));
            return Err(OutboundError::Ended("too many calls".into()));
        }
        let asked = Asked::of(&request);
        if let Some(response) = self.answered_before(&asked).await? {
            return Ok(response);
        }
        checkpoints.check_lease().map_err(ended)?;
        self.complete_headers(&mut request);
        fault::point("call-out");
        let response = outbound.call(&request).await?;
        fault::point("call-answered");
        if is_final(response.status) && !fault::mutated("answer-not-journalled") {
            self.keep(asked, response.clone()).await?;
            fault::point("answer-kept");
        }
        Ok(response)
    }

    async fn answered_before(&self, asked: &Asked) -> Result<Option<OutboundResponse>, OutboundError> {
        let checkpoints = &*self.checkpoints;
        let mut journal = checkpoints.journal.lock().await;
        if journal.is_none() {
            *journal = Some(checkpoints.read_journal().await.map_err(|error| ended(error.into()))?);
        }
        let Some(kept) = journal.as_ref().and_then(|journal| journal.get(&self.index)) else { return Ok(None) };
        let now = (&asked.method, &asked.url, &asked.body);
        if now == (&kept.method, &kept.url, &kept.body) || fault::mutated("divergence-unchecked") {
            return Ok(Some(kept.response.clone()));
        }
        let what = if (now.0, now.1) == (&kept.method, &kept.url) { " with another body" } else { "" };
        let text = format!(
            "diverged at its call {}: an earlier run of this message called {} {}, this one calls {} {}{what}; what was \
             answered then does not answer this",
            self.index + 1,
            kept.method,
            kept.url,
            asked.method,
            asked.url,
        );
        checkpoints.fail(Failure::Reject(text.clone()));
        Err(OutboundError::Diverged(text))
    }

    fn complete_headers(&self, request: &mut OutboundRequest) {
        let has = |name: &str| request.headers.iter().any(|(is, _)| is.eq_ignore_ascii_case(name));
        let (keyed, traced) = (has("idempotency-key"), has("traceparent"));
        if !keyed {
            let key = if fault::mutated("step-key-of-the-attempt") { format!("{:p}", self) } else { self.key() };
            request.headers.push(("idempotency-key".into(), key.into()));
        }
        if !traced {
            request.headers.push(("traceparent".into(), self.traceparent().into()));
            let state = self.checkpoints.identity.message.extensions.get("tracestate");
            request.headers.extend(state.map(|state| ("tracestate".into(), Bytes::copy_from_slice(state.as_bytes()))));
        }
    }

    /// Returns the W3C trace context: the trace of the message where it has one, and the call as a
    /// span of its own, the same on every re-run.
    fn traceparent(&self) -> String {
        let key = self.key();
        let given = self.checkpoints.identity.message.extensions.get("traceparent").map(String::as_str);
        let (trace, flags) = given.and_then(trace_of).unwrap_or_else(|| {
            let trace = self.checkpoints.identity.trace.max(1);
            (format!("{trace:032x}"), "01".to_owned())
        });
        format!("00-{trace}-{}-{flags}", &key[..16])
    }

    async fn keep(&self, asked: Asked, response: OutboundResponse) -> Result<(), OutboundError> {
        let checkpoints = &*self.checkpoints;
        let Asked { method, url, body } = asked;
        let answered = Answered { method, url, body, response };
        let value = postcard::to_stdvec(&answered).expect("an answer can be encoded");
        let mut commit = checkpoints.empty_commit();
        commit.effects.writes.insert(checkpoints.journal_key(self.index), Some(value.into()));
        match checkpoints.write(commit).await.map_err(ended)? {
            Verdict::Committed => {
                checkpoints.journal.lock().await.get_or_insert_default().insert(self.index, answered);
                Ok(())
            }
            Verdict::Conflict | Verdict::EpochMismatch(_) => Err(ended(checkpoints.lost())),
        }
    }
}

/// Identity of a call: a call that has all of it in common with an earlier one is the same call.
struct Asked {
    method: String,
    url: String,
    body: [u8; 16],
}

impl Asked {
    fn of(request: &OutboundRequest) -> Self {
        let hash = blake3::hash(&request.body);
        let body = *hash.as_bytes().first_chunk().expect("a hash has 32 bytes");
        Self { method: request.method.clone(), url: request.url.clone(), body }
    }
}

/// Returns whether an answer with this status is final. Any other answer asks for the call to be
/// made again.
fn is_final(status: u16) -> bool {
    !matches!(status, 408 | 425 | 429 | 500..)
}

/// Returns trace id and flags of a `traceparent`.
fn trace_of(text: &str) -> Option<(String, String)> {
    let mut parts = text.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let hex = |text: &str, digits: usize| text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let fits =
        hex(version, 2) && hex(trace, 32) && hex(span, 16) && hex(flags, 2) && trace.bytes().any(|byte| byte != b'0');
    fits.then(|| (trace.to_ascii_lowercase(), flags.to_owned()))
}

fn ended(error: ContextError) -> OutboundError {
    OutboundError::Ended(error.to_string())
}
