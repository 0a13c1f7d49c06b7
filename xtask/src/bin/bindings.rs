//! `cargo xtask bindings`: bindings from WIT, checked in so that guests need not compile a WIT parser.
//! Takes of the contract the worlds that this host runs. A program of its own: what it is made of takes long to compile,
//! and no other chore needs it.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use wit_bindgen_core::wit_parser::Resolve;
use wit_bindgen_core::{Files, WorldGenerator as _};
use wit_bindgen_rust::{Opts, WithOption};

/// Generated files and their sources.
const ALL: [Bindings; 4] = [
    Bindings {
        wit: "wit/processor.wit",
        world: "processor",
        path: "guest-sdk/src/bindings.rs",
        module: "::hapax_sdk::bindings",
        shared: &[],
    },
    Bindings {
        wit: "wit/processor.wit",
        world: "compensator",
        path: "guest-sdk/src/compensator_bindings.rs",
        module: "::hapax_sdk::compensator_bindings",
        shared: &["types"],
    },
    Bindings {
        wit: "wit/processor.wit",
        world: "batch-processor",
        path: "guest-sdk/src/batch_bindings.rs",
        module: "::hapax_sdk::batch_bindings",
        shared: &SHARED,
    },
    Bindings {
        wit: "tests/fixtures/wrong-world/world.wit",
        world: "wrong",
        path: "tests/fixtures/wrong-world/src/bindings.rs",
        module: "crate::bindings",
        shared: &[],
    },
];

struct Bindings {
    wit: &'static str,
    world: &'static str,
    path: &'static str,
    /// Where the macro that exports a component finds them.
    module: &'static str,
    /// Interfaces that more than one world imports: the bindings of the plain world already hold
    /// them.
    shared: &'static [&'static str],
}

/// Where that is.
const SHARED_MODULE: &str = "crate::bindings::hapax::processor";

/// Imports of every world of the contract.
const SHARED: [&str; 8] = ["types", "state", "events", "outbox", "saga", "lock", "log", "config"];

const HEADER: &str = "\
//! A world in WIT, as Rust. Made by `cargo xtask bindings`: holds nothing written by hand.
#![allow(clippy::all, missing_docs, unreachable_pub, unused_qualifications, rust_2018_idioms)]
// The ABI of a component is raw memory; this file alone may touch it.
#![allow(unsafe_code)]

";

fn main() -> ExitCode {
    let check = std::env::args().skip(1).any(|argument| argument == "--check");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the repository");
    match run(root, check) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Writes the bindings; with `check`, only says whether those that are there are stale.
fn run(root: &Path, check: bool) -> Result<()> {
    for bindings in &ALL {
        let Bindings { wit, path, .. } = bindings;
        let fresh = bindings.generate(root)?;
        let is_fresh = std::fs::read_to_string(root.join(path)).is_ok_and(|present| present == fresh);
        match (is_fresh, check) {
            (true, _) => println!("{path} is as {wit} wants it"),
            (false, true) => bail!("{path} is stale: run `cargo xtask bindings` and commit it"),
            (false, false) => {
                std::fs::write(root.join(path), fresh).context(*path)?;
                println!("{path} made again from {wit}");
            }
        }
    }
    Ok(())
}

impl Bindings {
    fn generate(&self, root: &Path) -> Result<String> {
        let mut resolve = Resolve::default();
        let text = std::fs::read_to_string(root.join(self.wit)).context(self.wit)?;
        let package = resolve.push_source(self.wit, &text)?;
        let world = resolve.select_world(&[package], Some(self.world))?;
        let with = self.shared.iter().map(|name| {
            (format!("hapax:processor/{name}@0.1.0"), WithOption::Path(format!("{SHARED_MODULE}::{name}")))
        });
        let options = Opts {
            with: with.collect(),
            format: true,
            generate_all: true,
            pub_export_macro: true,
            export_macro_name: Some(format!("export_{}", self.world.replace('-', "_"))),
            default_bindings_module: Some(self.module.to_owned()),
            runtime_path: Some("wit_bindgen::rt".to_owned()),
            ..Opts::default()
        };
        let mut files = Files::default();
        options.build().generate(&mut resolve, world, &mut files)?;
        let (_, bindings) = files.iter().next().context("the generator made no file")?;
        Ok(format!("{HEADER}{}", String::from_utf8(bindings.to_vec())?))
    }
}
