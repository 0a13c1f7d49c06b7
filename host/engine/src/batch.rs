//! Calls with many messages: those that are ready at the same time are gathered, run in one
//! instance, and get each its own answer. A call that fails as a whole is forgotten, and each of
//! its messages runs again alone: what one of them does to a call, the others must not suffer. What
//! becomes of a message is decided elsewhere.

use std::sync::Arc;
use std::time::Duration;

use hapax_core::{Context, Failure, Invocation, Output, fault};
use tokio::sync::{Notify, oneshot};

use crate::component::WasmProcessor;
use crate::host::items::{Item, Items};
use crate::limits::Batching;

/// Where messages of one processor meet.
pub(crate) struct Gathering {
    limits: Batching,
    /// The batch that still takes messages.
    open: std::sync::Mutex<Option<Arc<Batch>>>,
}

/// Messages that are to go in one call.
#[derive(Default)]
struct Batch {
    waiting: std::sync::Mutex<Vec<Waiting>>,
    /// Told once it takes no more.
    full: Notify,
}

/// A message of a batch, and who waits for its answer. Dropping it tells them that there is none.
struct Waiting {
    item: Item,
    answer: oneshot::Sender<Answered>,
}

/// A message's own result, and the context it was made in.
struct Answered {
    context: Context,
    result: Result<Output, Failure>,
}

/// The message that came first: its future makes the call for all. If it is dropped, the others run
/// alone.
struct Leading<'a> {
    gathering: &'a Gathering,
    batch: Arc<Batch>,
}

/// Result of a call: its messages with their results, or the reason why it failed as a whole.
struct Called {
    items: Vec<Item>,
    result: Result<Vec<Result<Output, Failure>>, Failure>,
}

impl Gathering {
    pub(crate) fn new(limits: Batching) -> Self {
        Self { limits, open: std::sync::Mutex::default() }
    }

    /// Puts a message into the open batch; the message that opens a batch leads it.
    fn join(&self, item: Item) -> (oneshot::Receiver<Answered>, Option<Leading<'_>>) {
        let (answer, answered) = oneshot::channel();
        let mut open = lock(&self.open);
        let leads = open.is_none();
        let batch = open.get_or_insert_default().clone();
        let mut waiting = lock(&batch.waiting);
        waiting.push(Waiting { item, answer });
        if waiting.len() >= self.limits.messages_max.max(1) {
            *open = None;
            batch.full.notify_one();
        }
        drop(waiting);
        drop(open);
        // Made only where it leads: dropping one closes the batch.
        (answered, leads.then(|| Leading { gathering: self, batch }))
    }
}

impl Leading<'_> {
    /// Waits until the batch is full, or its time is over.
    async fn wait(&self) {
        let Duration::ZERO = self.gathering.limits.wait else {
            let _ = tokio::time::timeout(self.gathering.limits.wait, self.batch.full.notified()).await;
            return;
        };
        // Whoever is ready to run now comes first.
        tokio::task::yield_now().await;
    }

    /// Closes the batch and takes its messages out.
    fn take(&self) -> Vec<Waiting> {
        let mut open = lock(&self.gathering.open);
        if open.as_ref().is_some_and(|open| Arc::ptr_eq(open, &self.batch)) {
            *open = None;
        }
        std::mem::take(&mut *lock(&self.batch.waiting))
    }
}

impl Drop for Leading<'_> {
    fn drop(&mut self) {
        // Nobody else would: who is still in it is told, and runs alone.
        drop(self.take());
    }
}

impl WasmProcessor {
    /// Runs a message together with those that are ready too. If this is dropped before it ends,
    /// nothing is left in `context`, and the others are not disturbed.
    pub(crate) async fn run_in_batch(
        &self,
        gathering: &Gathering,
        invocation: &Invocation,
        context: &mut Context,
    ) -> Result<Output, Failure> {
        // A context in which nothing happened stays here: a run alone begins with it.
        let untouched = context.again();
        let lent = std::mem::replace(context, untouched);
        let (answered, leading) = gathering.join(Item { invocation: invocation.clone(), context: lent });
        if let Some(leading) = leading {
            self.lead(leading).await;
        }
        match answered.await {
            Ok(answered) => {
                *context = answered.context;
                answered.result
            }
            Err(_) => self.run_alone(invocation, context).await,
        }
    }

    /// Makes the call, once there is room for an instance, and hands out the answers. If it failed
    /// and there were several messages in it, no message is answered.
    async fn lead(&self, leading: Leading<'_>) {
        leading.wait().await;
        let _slots = self.slots().await;
        let (items, answers): (Vec<_>, Vec<_>) =
            leading.take().into_iter().map(|waiting| (waiting.item, waiting.answer)).unzip();
        let Called { items, result } = self.call(items).await;
        let results = match result {
            Ok(results) => results,
            Err(failure) if items.len() == 1 || fault::mutated("batch-fails-together") => {
                vec![Err(failure); items.len()]
            }
            Err(failure) => {
                let name = self.name();
                tracing::warn!("a call of {name} with {} messages failed, each runs alone: {failure}", items.len());
                return;
            }
        };
        for ((answer, item), result) in answers.into_iter().zip(items).zip(results) {
            // Who has gone needs no answer.
            let _ = answer.send(Answered { context: item.context, result });
        }
    }

    /// Runs one message in an instance of its own.
    async fn run_alone(&self, invocation: &Invocation, context: &mut Context) -> Result<Output, Failure> {
        let _slots = self.slots().await;
        let untouched = context.again();
        let lent = std::mem::replace(context, untouched);
        let Called { items, result } = self.call(vec![Item { invocation: invocation.clone(), context: lent }]).await;
        if let Some(item) = items.into_iter().next() {
            *context = item.context;
        }
        result?.pop().unwrap_or_else(|| Err(Failure::retry("the component answered nothing")))
    }

    /// One call of the guest.
    async fn call(&self, items: Vec<Item>) -> Called {
        let count = items.len();
        let mut instance = self.instance(Items::batch(items));
        let answers = self.within_deadline(instance.call_batch(self, count)).await;
        let result = match self.unless_it_failed(answers, instance.state()) {
            Ok(answers) if answers.len() == count => Ok(answers),
            Ok(answers) => {
                let answered = answers.len();
                Err(Failure::retry(format!("the component answered {answered} messages of a call that has {count}")))
            }
            Err(failure) => Err(failure),
        };
        let items = instance.take_items();
        let mut in_order = result.is_ok();
        let result = result.map(|answers| {
            answers
                .into_iter()
                .map(|answer| self.judged(answer))
                .map(|(result, fine)| {
                    in_order &= fine;
                    result
                })
                .collect()
        });
        if in_order {
            self.keep(instance);
        }
        Called { items, result }
    }
}

fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
