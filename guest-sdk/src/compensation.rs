//! The shape of a compensation's function. Runs it; decides nothing.

use crate::{Context, Failure, FromMessage, Message};

/// A function that undoes a step. It takes what was registered with the step, as `Json<T>`, or as
/// the `Message` that registered it with that as its data.
#[diagnostic::on_unimplemented(
    message = "this is no compensation",
    label = "write `fn(payload, &mut Context) -> Result<(), Failure>`, where `payload` is a `Json<T>` or a `Message`"
)]
pub trait Compensate<P> {
    /// Undoes a step of `message`, whose data is the step's payload.
    fn compensate(&self, message: Message, context: &mut Context) -> Result<(), Failure>;
}

impl<F, P> Compensate<P> for F
where
    F: Fn(P, &mut Context) -> Result<(), Failure>,
    P: FromMessage,
{
    fn compensate(&self, message: Message, context: &mut Context) -> Result<(), Failure> {
        self(P::from_message(message)?, context)
    }
}

/// Calls a function of any shape a compensation may have.
pub fn call_compensation<P>(
    compensation: impl Compensate<P>,
    message: Message,
    context: &mut Context,
) -> Result<(), Failure> {
    compensation.compensate(message, context)
}

/// A step's name, and what undoes it.
pub type Undoes = (&'static str, fn(Message, &mut Context) -> Result<(), Failure>);
