//! The shape of a processor's function. Runs it; decides nothing.

use crate::{Context, Failure, FromMessage, Message, Outcome};

/// A function that handles one message.
#[diagnostic::on_unimplemented(
    message = "this is no processor",
    label = "write `fn(message, &mut Context) -> Result<Outcome, Failure>`, where `message` is a `Message` or a `Json<T>`"
)]
pub trait Handler<M> {
    /// Handles `message`.
    fn handle(&self, message: Message, context: &mut Context) -> Result<Outcome, Failure>;
}

impl<F, M> Handler<M> for F
where
    F: Fn(M, &mut Context) -> Result<Outcome, Failure>,
    M: FromMessage,
{
    fn handle(&self, message: Message, context: &mut Context) -> Result<Outcome, Failure> {
        self(M::from_message(message)?, context)
    }
}

/// Calls a function of any shape a processor may have.
pub fn call<M>(handler: impl Handler<M>, message: Message, context: &mut Context) -> Result<Outcome, Failure> {
    handler.handle(message, context)
}
