//! Mutations: runs a test of this binary once more with a fault in the code that was put there on
//! purpose, and sees that it turns red. The mutation is read once a process, and so the test runs
//! in a process of its own.

use std::process::Command;

/// Runs the test `name` of the module that calls this (`module_path!()`), without and with
/// `mutation` in the code: with it, the test must fail, and by an assertion.
pub fn turns_red(module: &str, name: &str, mutation: &str) {
    // A test is named by its path below the test binary.
    let name = &module.split_once("::").map_or_else(|| name.to_owned(), |(_, module)| format!("{module}::{name}"));
    let run = |mutation: Option<&str>| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", name, "--test-threads", "1"]).env_remove("HAPAX_MUTATION");
        command.envs(mutation.map(|mutation| ("HAPAX_MUTATION", mutation)));
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output.status.success(), text)
    };
    let (green, text) = run(None);
    assert!(green && text.contains("1 passed"), "{name} must pass without the mutation {mutation}:\n{text}");
    let (green, text) = run(Some(mutation));
    assert!(!green && text.contains("1 failed"), "{name} did not find the mutation {mutation}:\n{text}");
    assert!(text.contains("panicked at"), "{name} failed by no assertion with the mutation {mutation}:\n{text}");
}

/// Tests that run another test of their binary with a mutation: `name: test is red with
/// "gap-runs";`.
#[macro_export]
macro_rules! mutations {
    ($($name:ident: $test:ident is red with $mutation:literal;)*) => {$(
        #[test]
        fn $name() {
            $crate::mutation::turns_red(module_path!(), stringify!($test), $mutation);
        }
    )*};
}
