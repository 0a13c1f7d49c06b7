//! A native processor that does what its message says, and the outside that it calls: what a test
//! of sagas is made of.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use hapax_core::{
    Acquired, Compensation, Context, Failure, Invocation, Message, MessageProcessor, Outbound, OutboundError,
    OutboundRequest, OutboundResponse, Outgoing, Output, StepToCompensate,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

/// One thing to do. A plan is a list of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// Registers a step; its compensation calls `/undo/<name>` and sets `undone/<name>`.
    Step(String),
    /// Calls a path; a status of 5xx is a retry, one of 4xx a refusal for good.
    Call(String),
    /// Calls a path with a body, and takes any answer but 5xx.
    Ask(String, String),
    /// There is no way back.
    Pivot,
    /// Joins a saga.
    Join(String),
    /// The saga is complete.
    Complete,
    /// Sets a key.
    Set(String, String),
    /// Adds one to a key, after having read it.
    Count(String),
    /// Acquires a lock; asks for a retry if another owner holds it.
    Lock(String, u64),
    /// Sends a message of this type.
    Send(String),
    /// Fails until this attempt.
    RetryUntil(u32),
    /// Fails for good.
    Reject,
}

/// Begins a step.
pub fn step(name: &str) -> Op {
    Op::Step(name.into())
}

/// Begins a call.
pub fn call(path: &str) -> Op {
    Op::Call(path.into())
}

/// A message with a plan.
pub fn plan(id: &str, ops: &[Op]) -> Message {
    Message {
        content_type: Some("application/json".into()),
        data: serde_json::to_vec(ops).unwrap().into(),
        ..Message::new(id, "/plans", "plan")
    }
}

/// Does what messages say. Undoes the steps `a` to `e`.
pub struct Planned {
    digest: &'static str,
    steps: Vec<String>,
    /// Put before each path that messages have called.
    prefix: &'static str,
}

impl Planned {
    /// With the digest given.
    pub fn new(digest: &'static str) -> Arc<Self> {
        Self::calling_below(digest, "")
    }

    /// One that calls other paths than its messages say: below `prefix`.
    pub fn calling_below(digest: &'static str, prefix: &'static str) -> Arc<Self> {
        Arc::new(Self { digest, steps: ["a", "b", "c", "d", "e"].map(str::to_owned).to_vec(), prefix })
    }
}

impl MessageProcessor for Planned {
    fn process<'a>(&'a self, run: &'a Invocation, context: &'a mut Context) -> BoxFuture<'a, Result<Output, Failure>> {
        Box::pin(async move {
            let ops: Vec<Op> =
                serde_json::from_slice(&run.message.data).map_err(|error| Failure::Invalid(error.to_string()))?;
            let mut answers = Vec::new();
            for op in &ops {
                answers.extend(perform(op, run, context, self.prefix).await?);
            }
            Ok(Output { content_type: None, data: answers.join(" ").into() })
        })
    }

    fn digest(&self) -> &str {
        self.digest
    }

    fn compensation(&self) -> Option<&dyn Compensation> {
        Some(self)
    }
}

impl Compensation for Planned {
    fn steps(&self) -> &[String] {
        &self.steps
    }

    fn compensate<'a>(
        &'a self,
        step: &'a StepToCompensate,
        context: &'a mut Context,
    ) -> BoxFuture<'a, Result<(), Failure>> {
        Box::pin(async move {
            let text = String::from_utf8_lossy(&step.payload).into_owned();
            let key = step.invocation.step_key.as_deref();
            asked(context, &format!("/undo/{}", step.name), &text, true, key).await?;
            context.set(&format!("undone/{}", step.name), text)?;
            context.send(Outgoing { kind: format!("undone.{}", step.name), ..Outgoing::default() })?;
            Ok(())
        })
    }
}

async fn perform(op: &Op, run: &Invocation, context: &mut Context, prefix: &str) -> Result<Option<String>, Failure> {
    match op {
        Op::Step(name) => context.step(name, run.message.id.clone()).await?,
        Op::Call(path) => {
            return asked(context, &format!("{prefix}{path}"), &run.message.id, true, None).await.map(Some);
        }
        Op::Ask(path, body) => return asked(context, path, body, false, None).await.map(Some),
        Op::Pivot => context.pivot().await?,
        Op::Join(saga) => context.join_saga(saga).await?,
        Op::Complete => context.complete_saga().await?,
        Op::Set(key, value) => context.set(key, value.clone())?,
        Op::Count(key) => {
            let before = context.get(key).await?.map_or(0, |text| String::from_utf8_lossy(&text).parse().unwrap());
            let now: u64 = before + 1;
            context.set(key, now.to_string())?;
        }
        Op::Lock(name, ttl_ms) => match context.acquire(name, *ttl_ms).await? {
            Acquired::Held(lock) => return Ok(Some(lock.fence.to_string())),
            Acquired::Busy { retry_after_ms } => {
                return Err(Failure::Retry { reason: "busy".into(), after_ms: Some(retry_after_ms) });
            }
        },
        Op::Send(kind) => context.send(Outgoing { kind: kind.clone(), ..Outgoing::default() })?,
        Op::RetryUntil(attempt) if run.attempt < *attempt => return Err(Failure::retry("not yet")),
        Op::RetryUntil(_) => {}
        Op::Reject => return Err(Failure::Reject("as it was told".into())),
    }
    Ok(None)
}

async fn asked(
    context: &mut Context,
    path: &str,
    body: &str,
    refuses: bool,
    step_key: Option<&str>,
) -> Result<String, Failure> {
    let call = context.caller().expect("a message's context").next();
    let request = OutboundRequest {
        method: "POST".into(),
        url: format!("http://outside{path}"),
        headers: step_key.map(|key| ("step-key".into(), key.to_owned().into())).into_iter().collect(),
        body: Bytes::copy_from_slice(body.as_bytes()),
        timeout_ms: None,
    };
    match call.send(request).await.map_err(|error| Failure::retry(error.to_string()))?.status {
        status @ 500.. => Err(Failure::retry(format!("{path} answers {status}"))),
        status @ 400.. if refuses => Err(Failure::Reject(format!("{path} answers {status}"))),
        status => Ok(status.to_string()),
    }
}

/// A call that arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrived {
    /// The path.
    pub path: String,
    /// The body.
    pub body: String,
    /// `idempotency-key`.
    pub key: String,
    /// `traceparent`.
    pub trace: String,
    /// `step-key`: of a compensation, the key of the call that took the step.
    pub step_key: String,
    /// Returns true if the request took effect: once per key.
    pub applied: bool,
}

/// Next answer of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// This status, without effect.
    Status(u16),
    /// It takes effect, and the answer never comes.
    Silence,
    /// It takes effect, and is answered once [`Books::let_go`] says so.
    Held,
    /// It takes effect, and is answered, only once [`Books::let_go_of`] says so: until then, the
    /// service knows nothing of it.
    Late,
}

/// An outside that remembers keys and keeps books.
#[derive(Debug)]
pub struct Books {
    arrived: Mutex<Vec<Arrived>>,
    replies: Mutex<BTreeMap<String, Vec<Reply>>>,
    held: Arc<Semaphore>,
    late: Mutex<BTreeMap<String, Arc<Semaphore>>>,
}

impl Default for Books {
    fn default() -> Self {
        let held = Arc::new(Semaphore::new(0));
        Self { arrived: Mutex::default(), replies: Mutex::default(), held, late: Mutex::default() }
    }
}

impl Books {
    /// Has the next calls of `path` answered so.
    pub fn reply(&self, path: &str, replies: &[Reply]) {
        self.replies.lock().entry(path.to_owned()).or_default().extend(replies);
    }

    /// Answers one call that is held, or the next one that would be.
    pub fn let_go(&self) {
        self.held.add_permits(1);
    }

    /// Lets one late call of `path` take effect, or the next one that comes.
    pub fn let_go_of(&self, path: &str) {
        self.late_of(path).add_permits(1);
    }

    fn late_of(&self, path: &str) -> Arc<Semaphore> {
        self.late.lock().entry(path.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(0))).clone()
    }

    /// Completes once a call of `path` has arrived.
    pub async fn arrival(&self, path: &str) {
        let has_arrived = || self.arrived.lock().iter().any(|call| call.path == path);
        for _ in 0..10_000 {
            if has_arrived() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("{path} was not called");
    }

    /// All that arrived, in order.
    pub fn arrived(&self) -> Vec<Arrived> {
        self.arrived.lock().clone()
    }

    /// Paths and bodies of what took effect, in order: `/undo/a m-1`.
    pub fn applied(&self) -> Vec<String> {
        let arrived = self.arrived.lock();
        arrived.iter().filter(|call| call.applied).map(|call| format!("{} {}", call.path, call.body)).collect()
    }

    /// The way back, as it took effect.
    pub fn undone(&self) -> Vec<String> {
        self.applied().iter().filter_map(|call| call.strip_prefix("/undo/").map(str::to_owned)).collect()
    }
}

impl Books {
    /// Lets a late call take effect when its time has come, and answers it.
    async fn late_answer(&self, call: Arrived) -> Result<OutboundResponse, OutboundError> {
        self.late_of(&call.path).acquire_owned().await.expect("it is never closed").forget();
        let mut arrived = self.arrived.lock();
        let applied = !arrived.iter().any(|before| before.applied && before.key == call.key);
        arrived.push(Arrived { applied, ..call });
        Ok(OutboundResponse { status: 200, headers: Vec::new(), body: Bytes::new() })
    }
}

impl Outbound for Books {
    fn call<'a>(&'a self, request: &'a OutboundRequest) -> BoxFuture<'a, Result<OutboundResponse, OutboundError>> {
        let header = |name: &str| {
            let found = request.headers.iter().find(|(of, _)| of == name);
            found.map(|(_, value)| String::from_utf8_lossy(value).into_owned()).unwrap_or_default()
        };
        let path = request.url.trim_start_matches("http://outside").to_owned();
        let key = header("idempotency-key");
        let reply = {
            let mut replies = self.replies.lock();
            replies.get_mut(&path).filter(|replies| !replies.is_empty()).map(|replies| replies.remove(0))
        };
        let mut arrived = self.arrived.lock();
        let known = arrived.iter().any(|before| before.applied && before.key == key);
        let is_late = matches!(reply, Some(Reply::Late));
        let applied = !known && !is_late && !matches!(reply, Some(Reply::Status(_)));
        let body = String::from_utf8_lossy(&request.body).into_owned();
        let call = Arrived { path, body, key, trace: header("traceparent"), step_key: header("step-key"), applied };
        arrived.push(call.clone());
        if is_late {
            drop(arrived);
            return Box::pin(self.late_answer(call));
        }
        let status = match reply {
            Some(Reply::Silence) => return Box::pin(std::future::pending()),
            Some(Reply::Held) => {
                let held = self.held.clone();
                return Box::pin(async move {
                    held.acquire().await.expect("it is never closed").forget();
                    Ok(OutboundResponse { status: 200, headers: Vec::new(), body: Bytes::new() })
                });
            }
            Some(Reply::Status(status)) => status,
            Some(Reply::Late) | None => 200,
        };
        Box::pin(std::future::ready(Ok(OutboundResponse { status, headers: Vec::new(), body: Bytes::new() })))
    }
}
