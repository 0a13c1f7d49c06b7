//! `hapax build`: a guest's folder to a component that runs, from the real binary.

use std::path::{Path, PathBuf};
use std::process::Command;

use hapax_tests::process::{guest, hapax};
use serde_json::Value;

const SOURCE: &str = r#"
use hapax_sdk::{Context, Failure, Message, Outcome};

#[hapax_sdk::processor]
fn greet(message: Message, ctx: &mut Context) -> Result<Outcome, Failure> {
    let name: String = message.json()?;
    ctx.state().set_text("last", &name);
    Outcome::json(&format!("good morning, {name}"))
}
"#;

/// A crate of its own, outside this workspace, as a user has one. It is the same folder at each
/// run, in the target folder, so that what it needs is not compiled again.
fn greeter(source: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let folder = target().join("build-test");
    std::fs::create_dir_all(folder.join("src")).unwrap();
    let manifest = format!(
        "[package]\nname = \"greeter\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n[workspace]\n\n\
         [lib]\ncrate-type = [\"cdylib\", \"rlib\"]\n\n[dependencies]\nhapax-sdk = {{ path = {:?} }}\n",
        root.join("guest-sdk")
    );
    std::fs::write(folder.join("Cargo.toml"), manifest).unwrap();
    // Nothing is to be fetched that is not there.
    std::fs::copy(root.join("Cargo.lock"), folder.join("Cargo.lock")).unwrap();
    std::fs::write(folder.join("src/lib.rs"), source).unwrap();
    folder
}

fn target() -> PathBuf {
    guest("any").ancestors().nth(3).unwrap().to_owned()
}

fn build(folder: &Path, out: &Path) -> Command {
    let mut command = hapax();
    command.args(["build", "--json"]).arg(folder).arg("--out").arg(out).env("CARGO_TARGET_DIR", target());
    command
}

#[test]
fn a_guests_folder_becomes_a_component_that_runs() {
    let out = tempfile::tempdir().unwrap();
    let folder = greeter("this is no Rust");
    let refused = build(&folder, out.path()).output().unwrap();
    let told = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(4), "{told}");
    assert!(
        told.contains("cargo could not build greeter; correct what it says") && told.contains("lib.rs:1:"),
        "{told}"
    );

    let built = build(&greeter(SOURCE), out.path()).output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let line: Value = serde_json::from_slice(&built.stdout).unwrap();
    assert_eq!(line["component"], out.path().join("greeter.wasm").display().to_string());

    let input = out.path().join("input.jsonl");
    std::fs::write(&input, r#"{"id":"1","source":"/s","type":"t","data":"Ada"}"#).unwrap();
    let mut run = hapax();
    run.args(["run", "--json", "--component"]).arg(out.path().join("greeter.wasm"));
    run.arg("--input").arg(input).arg("--store").arg(out.path().join("store"));
    let ran = run.output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let first: Value = serde_json::from_slice(ran.stdout.split(|byte| *byte == b'\n').next().unwrap()).unwrap();
    assert_eq!(first["result"], "good morning, Ada");
}

#[test]
fn a_folder_that_is_no_guest_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = build(folder.path(), folder.path()).output().unwrap();
    let told = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(4), "{told}");
    assert!(told.contains("has no Cargo.toml: name the folder of the processor's crate"), "{told}");
}
