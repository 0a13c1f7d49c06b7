//! Library for authors of Hapax processors: messages, state, outbox, and a test kit that needs
//! neither wasm nor host. Reaches nothing outside the contract in `wit/`; every effect is part of
//! the message's transaction.
//!
//! A processor is one function. The host runs it once for each message, whatever is delivered
//! twice, and commits all it did or nothing:
//!
//! ```
//! use hapax_sdk::{Context, Failure, Json, Outcome, Outgoing};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Deserialize, Serialize)]
//! struct Order {
//!     customer: String,
//!     amount_cents: u64,
//! }
//!
//! #[hapax_sdk::processor]
//! fn take_order(order: Json<Order>, ctx: &mut Context) -> Result<Outcome, Failure> {
//!     if order.amount_cents == 0 {
//!         return Err(Failure::reject("an order of nothing"));
//!     }
//!     let key = format!("balance/{}", order.customer);
//!     let balance: u64 = ctx.state().get(&key)?.unwrap_or(0);
//!     ctx.state().set(&key, &(balance + order.amount_cents))?;
//!     ctx.send(Outgoing::new("order.taken").json(&*order)?);
//!     Outcome::json(&"thank you")
//! }
//!
//! // Its unit test: plain `cargo test`.
//! use hapax_sdk::testing::{Harness, message};
//!
//! let mut shop = Harness::new(take_order).state("balance/c-1", "5");
//! let order = Order { customer: "c-1".into(), amount_cents: 7 };
//! let outcome = shop.deliver(message("order.placed").json(&order)).unwrap();
//! assert_eq!(outcome.json_value::<String>().unwrap(), "thank you");
//! assert_eq!(shop.state_text("balance/c-1").as_deref(), Some("12"));
//! assert_eq!(shop.sent()[0].kind(), "order.taken");
//!
//! // What a failure wrote is gone.
//! let nothing = Order { customer: "c-1".into(), amount_cents: 0 };
//! let failure = shop.deliver(message("order.placed").json(&nothing)).unwrap_err();
//! assert_eq!(failure, Failure::reject("an order of nothing"));
//! ```
//!
//! The crate's `Cargo.toml` needs `crate-type = ["cdylib", "rlib"]` under `[lib]`; `hapax build`
//! makes the component.

#[cfg(any(target_arch = "wasm32", test))]
mod arena;
mod batch;
mod compensation;
mod context;
mod events;
mod failure;
mod handler;
mod host;
mod http;
mod lock;
mod message;
mod outcome;
mod outgoing;
mod rng;
mod saga;
mod state;

#[cfg(target_arch = "wasm32")]
#[doc(hidden)]
#[rustfmt::skip] // As its generator writes it.
pub mod batch_bindings;
#[cfg(target_arch = "wasm32")]
#[doc(hidden)]
pub mod bindings;
#[cfg(target_arch = "wasm32")]
#[doc(hidden)]
#[rustfmt::skip] // As its generator writes it.
pub mod compensator_bindings;
#[cfg(not(target_arch = "wasm32"))]
pub mod testing;
#[cfg(target_arch = "wasm32")]
mod wasm;
#[cfg(target_arch = "wasm32")]
mod wasm_http;
#[cfg(not(target_arch = "wasm32"))]
mod world;

pub use batch::{Answers, Batch, BatchHandler};
pub use compensation::Compensate;
pub use context::Context;
pub use events::{Conflict, Event, Events, NewEvent, Read};
pub use failure::Failure;
pub use handler::Handler;
pub use hapax_sdk_macros::{batch_processor, compensation, processor};
pub use host::Level;
pub use http::{Calling, Http, HttpError, Request, Response};
pub use lock::{Busy, Lock, Lost};
pub use message::{FromMessage, Json, Message};
pub use outcome::Outcome;
pub use outgoing::Outgoing;
pub use rng::Rng;
pub use saga::Saga;
pub use state::{Scan, State};

/// For the code that `#[processor]` writes. Not part of the API.
#[doc(hidden)]
pub mod __private {
    pub use crate::batch::call_batch;
    #[cfg(target_arch = "wasm32")]
    pub use crate::batch_bindings::export_batch_processor;
    #[cfg(target_arch = "wasm32")]
    pub use crate::batch_bindings::exports::hapax::processor::batch_handler::Guest as BatchGuest;
    #[cfg(target_arch = "wasm32")]
    pub use crate::bindings::export_processor;
    #[cfg(target_arch = "wasm32")]
    pub use crate::bindings::exports::hapax::processor::handler::{Failure, Guest, Message, Outcome};
    pub use crate::compensation::{Undoes, call_compensation};
    #[cfg(target_arch = "wasm32")]
    pub use crate::compensator_bindings::export_compensator;
    #[cfg(target_arch = "wasm32")]
    pub use crate::compensator_bindings::exports::hapax::processor::compensation::Guest as CompensationGuest;
    pub use crate::handler::call;
    #[cfg(target_arch = "wasm32")]
    pub use crate::wasm::{compensate, run, run_batch};
}
