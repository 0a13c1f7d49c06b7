//! The rules of Hapax: message, idempotency key, record state machine, pipeline, and the traits at
//! the seams. No runtime, no wasmtime, no driver, no I/O.
//!
//! The folders are in the order of their imports: each uses only those above it. `cargo xtask tidy`
//! checks that.

mod support;

mod state;

mod message;

mod observe;

mod record;

mod store;

mod saga;

mod outbox;

mod commit;

mod run;

mod circuit_breaker;

mod transport;

mod pipeline;

mod workers;

mod operator;

#[cfg(all(test, feature = "shuttle"))]
mod shuttle_tests;

pub use circuit_breaker::state_machine::BreakerPolicy;
pub use circuit_breaker::{CircuitBreaker, CircuitBreakerParts};
pub use commit::committer::{Committer, Pending};
pub use message::fingerprint::Fingerprint;
pub use message::identity::{HeldKey, Identity, ParseHeldKeyError, Position, Unidentified};
pub use message::key::{DigestHasher, ParseRecordKeyError, RecordKey, RecordKeyParts, Scope};
pub use message::strategy::{Fields, GapPolicy, Gaps, Select, Strategy, VersionOrder};
pub use message::{Message, is_json_type, parse_rfc3339_ms, parse_rfc3339_ns};
pub use observe::metrics::{Counted, Counters, IdempotencyMetrics, OUTCOMES};
pub use observe::status::{BreakerState, BreakerStatus, ConsumerStatus, OutboxTrouble};
pub use operator::audit::AuditEntry;
pub use operator::{Actor, Operator, OperatorAction, OperatorError, OutboxAction, SagaAction};
pub use outbox::{AfterRefusal, RefusedMessage, RefusedMessages};
pub use pipeline::compensate::ComponentVersions;
pub use pipeline::delivery::{Accepted, Handling};
pub use pipeline::options::{ATTEMPTS_MAX, MismatchPolicy, Options, Ordering};
pub use pipeline::outcome::{Outcome, StoredOutcome};
pub use pipeline::{IdempotentConsumer, Parts};
pub use record::history::{RecordOrigin, rebuild_record, record_history};
pub use record::{HistoryEntry, IllegalRecordEvent, Output, Record, RecordEvent, RecordState, next_state};
pub use run::context::Context;
pub use run::event_stream::{AppendConflict, NewEvent, StreamEvent, list_streams, read_stream};
pub use run::failure::{ContextError, Failure};
pub use run::lock::{Acquired, DistributedLock, LOCK_NAME_BYTES, Lock, LockRequest, StoreLocks};
pub use run::outbound::{Outbound, OutboundError, OutboundRequest, OutboundResponse};
pub use run::outbound_call::{OutboundCall, OutboundCaller};
pub use run::processor::{Compensation, Invocation, MessageProcessor, NativeProcessor, StepToCompensate};
pub use saga::log::{ReadSaga, SagaListing, SagaLog};
pub use saga::{
    IllegalSagaEvent, InvalidSagaName, Member, SAGA_NAME_BYTES, Saga, SagaEvent, SagaId, SagaLogEntry, SagaState, Step,
    StepState,
};
pub use state::{EffectLimits, Effects, Entry, Outgoing, RESERVED, RangeRead, ReadSet, StateView, Version, list_state};
pub use store::commit::{
    Commit, Expected, Group, HeldChange, OutboxPosition, OutboxRow, RecordChange, SharedChange, Verdict,
};
pub use store::crash_tracker::{CrashTracker, NoCrashTracker};
pub use store::feed::{Cursor, Feed, FeedEntry, FeedEvent, FeedEventKind, FeedPage, ParseCursorError};
pub use store::held_message::{HeldMessage, HoldKind, HoldReason};
pub use store::unfinished::{Unfinished, UnfinishedEntry, unfinished_messages};
pub use store::{IdempotencyStorage, Inspect, Outbox, Store, StoreFacts};
pub use support::clock::{Clock, SystemClock};
pub use support::error::StoreError;
pub use support::fault;
pub use transport::{
    Delivery, Published, Publisher, Received, Refusal, SendAnswer, Source, TransportError, Unavailable,
};
pub use workers::abandoned::{AbandonedParts, run_abandoned};
pub use workers::compensator::{CompensatorParts, run_compensator, settle_compensations};
pub use workers::deferred::run_deferred;
pub use workers::outbox_relay::{BATCH_BYTES_MAX, BATCH_MESSAGES_MAX, OutboxRelay, RelayError, RelayStatus};
pub use workers::source::{Observer, Report, SourceError, run_source};
pub use workers::sweeper::{SWEEP_EVERY_MS, run_sweeper};
