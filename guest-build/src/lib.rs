//! From a guest's source folder to a component: finds a compiler for the wasm target, runs cargo,
//! encodes the result. Knows nothing of the contract: whether a component fits the host is the
//! host's to say.
//!
//! ```no_run
//! use hapax_guest_build::{Toolchain, build};
//!
//! let mut progress = |text: &str| eprintln!("{text}");
//! let toolchain = Toolchain::find(&mut progress)?;
//! for component in build("plugins/order-intake".as_ref(), &toolchain, "out".as_ref(), &mut progress)? {
//!     println!("{}", component.path.display());
//! }
//! # Ok::<(), hapax_guest_build::BuildError>(())
//! ```

mod build;
mod command;
mod component;
mod debian;
mod error;
mod toolchain;

pub use build::{Component, build, build_many, guests_of};
pub use error::BuildError;
pub use toolchain::{Toolchain, Way};

/// Receiver of progress while something is built: one line of text per call.
pub type Progress<'a> = &'a mut dyn FnMut(&str);

/// Target that guests are compiled for. Guests import no WASI there: only the contract.
pub const TARGET: &str = "wasm32-unknown-unknown";
