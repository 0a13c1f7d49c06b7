//! Check that a component fits the contract in `wit/`: exports, versions, function types, imports.
//! Reads the component's types only; compiles and links nothing.

use std::sync::LazyLock;

use wit_parser::decoding::{DecodedWasm, decode};
use wit_parser::{Function, Interface, Resolve, WorldItem, WorldKey};

use crate::error::LoadError;
use crate::signature::{Depth, same_types, signature};

const NAMESPACE: &str = "hapax";
const PACKAGE: &str = "processor";
/// Imports that work, as they are granted to every processor. `types` is the message itself.
const GRANTED: [&str; 9] = ["types", "state", "events", "outbox", "saga", "lock", "batch", "log", "config"];
/// Interfaces of WASI 0.2 that the host offers. Linked, but with calls only where they are granted,
/// and without files, sockets, environment or arguments behind it.
const WASI: [(&str, &[&str]); 7] = [
    ("http", &["types", "outgoing-handler"]),
    ("io", &["error", "poll", "streams"]),
    ("clocks", &["monotonic-clock", "wall-clock"]),
    ("random", &["random", "insecure", "insecure-seed"]),
    (
        "cli",
        &[
            "environment",
            "exit",
            "stdin",
            "stdout",
            "stderr",
            "terminal-input",
            "terminal-output",
            "terminal-stdin",
            "terminal-stdout",
            "terminal-stderr",
        ],
    ),
    ("filesystem", &["types", "preopens"]),
    (
        "sockets",
        &["network", "instance-network", "ip-name-lookup", "tcp", "tcp-create-socket", "udp", "udp-create-socket"],
    ),
];

/// The contract as this host speaks it.
static CONTRACT: LazyLock<Resolve> = LazyLock::new(|| {
    let mut resolve = Resolve::new();
    resolve
        .push_source("processor.wit", include_str!("../../../wit/processor.wit"))
        .expect("the contract is valid WIT: the bindings are made from it");
    resolve
});

/// Requirements of a fitting component on the linker.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    /// It imports something of WASI.
    pub(crate) wasi: bool,
    /// It calls over HTTP.
    pub(crate) http: bool,
    /// It registers steps.
    pub(crate) saga: bool,
    /// It handles many messages in one call.
    pub(crate) batches: bool,
    /// It undoes steps.
    pub(crate) compensates: bool,
}

/// Checks `bytes` from the outside in: file, component, exports, imports.
pub(crate) fn check(bytes: &[u8]) -> Result<Needs, LoadError> {
    check_preamble(bytes)?;
    let decoded = decode(bytes).map_err(|error| LoadError::Malformed(one_line(&format!("{error:#}"))))?;
    let DecodedWasm::Component(resolve, world) = decoded else {
        return Err(LoadError::Malformed("it holds a WIT package and no code".into()));
    };
    let guest = Guest::of(&resolve, world)?;
    let exports = check_exports(&guest)?;
    let needs = Needs { batches: exports.batches, compensates: exports.compensates, ..check_imports(&guest)? };
    check_combination(&needs)?;
    Ok(needs)
}

/// A step needs a way back, and a message of its own to belong to.
fn check_combination(needs: &Needs) -> Result<(), LoadError> {
    let text = match needs {
        Needs { batches: true, saga: true, .. } | Needs { batches: true, compensates: true, .. } => {
            "it takes batches, and steps of sagas belong to one message: export `handler` and not `batch-handler`, or \
             register no steps"
        }
        Needs { saga: true, compensates: false, .. } => {
            "it imports `saga`, by which it registers steps, and exports no `compensation` that would undo them: export \
             it (world `compensating-processor`; in Rust `#[hapax_sdk::compensation]`), or register no steps"
        }
        _ => return Ok(()),
    };
    Err(LoadError::Combination(text))
}

fn check_preamble(bytes: &[u8]) -> Result<(), LoadError> {
    const MODULE: [u8; 4] = [1, 0, 0, 0];
    const COMPONENT: [u8; 4] = [0x0d, 0, 1, 0];
    match bytes {
        [] => Err(LoadError::Empty),
        [b'\0', b'a', b's', b'm', rest @ ..] => match rest.first_chunk() {
            Some(&COMPONENT) => Ok(()),
            Some(&MODULE) => Err(LoadError::CoreModule),
            Some(version) => Err(LoadError::Malformed(format!("version {version:?} of the format is not known"))),
            None => Err(LoadError::Malformed("it ends within the first 8 bytes".into())),
        },
        _ => Err(LoadError::NotWasm),
    }
}

/// A component's world, flattened to named interfaces.
struct Guest<'a> {
    resolve: &'a Resolve,
    imports: Vec<&'a Interface>,
    exports: Vec<&'a Interface>,
    /// Exports outside any interface, for the error text.
    loose_exports: Vec<&'a str>,
}

impl<'a> Guest<'a> {
    fn of(resolve: &'a Resolve, world: wit_parser::WorldId) -> Result<Self, LoadError> {
        let world = &resolve.worlds[world];
        let (mut imports, mut exports, mut loose_exports) = (Vec::new(), Vec::new(), Vec::new());
        for (key, item) in &world.imports {
            match (key, item) {
                (WorldKey::Interface(_), WorldItem::Interface { id, .. }) => imports.push(&resolve.interfaces[*id]),
                // Types at the top of a world are not asked of anyone.
                (_, WorldItem::Type { .. }) => {}
                (key, _) => return Err(no_such_import(format!("`{}`", resolve.name_world_key(key)))),
            }
        }
        for (key, item) in &world.exports {
            match (key, item) {
                (WorldKey::Interface(_), WorldItem::Interface { id, .. }) => exports.push(&resolve.interfaces[*id]),
                (WorldKey::Name(name), _) => loose_exports.push(name.as_str()),
                _ => {}
            }
        }
        Ok(Self { resolve, imports, exports, loose_exports })
    }

    fn package(&self, interface: &Interface) -> Option<&wit_parser::PackageName> {
        interface.package.map(|package| &self.resolve.packages[package].name)
    }

    fn is_ours(&self, interface: &Interface) -> bool {
        self.package(interface).is_some_and(|package| package.namespace == NAMESPACE && package.name == PACKAGE)
    }

    /// `hapax:processor/handler@0.1.0`.
    fn id(&self, interface: &Interface) -> String {
        match self.package(interface) {
            Some(package) => package.interface_id(name(interface)),
            None => name(interface).to_owned(),
        }
    }
}

/// Capabilities of a component.
struct Exports {
    /// It handles batches: who can, does.
    batches: bool,
    compensates: bool,
}

fn check_exports(guest: &Guest<'_>) -> Result<Exports, LoadError> {
    let ours = || guest.exports.iter().filter(|interface| guest.is_ours(interface));
    for interface in ours() {
        check_version(guest, interface)?;
    }
    let exported = |wanted| ours().find(|interface| name(interface) == wanted);
    let handler = exported("batch-handler").or_else(|| exported("handler")).ok_or_else(|| no_handler(guest))?;
    let compensation = exported("compensation");
    for interface in [Some(handler), compensation].into_iter().flatten() {
        check_export(guest, interface)?;
    }
    Ok(Exports { batches: name(handler) == "batch-handler", compensates: compensation.is_some() })
}

fn check_export(guest: &Guest<'_>, exported: &Interface) -> Result<(), LoadError> {
    let (host_id, host) = host_interface(name(exported)).expect("the contract has all that is looked for");
    for (function_name, function) in &host.functions {
        let missing = || LoadError::MissingFunction {
            interface: host_id.clone(),
            function: signature(&CONTRACT, function, Depth::Short),
        };
        let theirs = exported.functions.get(function_name).ok_or_else(missing)?;
        check_types(guest, &host_id, theirs, function)?;
    }
    Ok(())
}

/// Requirements of the component on the linker.
fn check_imports(guest: &Guest<'_>) -> Result<Needs, LoadError> {
    let mut needs = Needs::default();
    for interface in &guest.imports {
        if guest.is_ours(interface) {
            check_version(guest, interface)?;
            check_import(guest, interface)?;
            needs.saga |= name(interface) == "saga";
        } else if is_granted_wasi(guest, interface) {
            needs.wasi = true;
            needs.http |= guest.package(interface).is_some_and(|package| package.name == "http");
        } else {
            return Err(no_such_import(format!("`{}`", guest.id(interface))));
        }
    }
    Ok(needs)
}

fn check_import(guest: &Guest<'_>, interface: &Interface) -> Result<(), LoadError> {
    let granted = GRANTED.contains(&name(interface)).then(|| host_interface(name(interface))).flatten();
    let Some((host_id, host)) = granted else {
        return Err(no_such_import(format!("`{}`", guest.id(interface))));
    };
    for (function_name, function) in &interface.functions {
        match host.functions.get(function_name) {
            Some(host_function) => check_types(guest, &host_id, function, host_function)?,
            None => return Err(no_such_import(format!("the function `{function_name}` of `{}`", guest.id(interface)))),
        }
    }
    Ok(())
}

/// Versions fit as semver has it: before 1.0 the second number must agree, from then on the first.
fn check_version(guest: &Guest<'_>, interface: &Interface) -> Result<(), LoadError> {
    let host = &host_package().name;
    let fits = match (guest.package(interface).and_then(|package| package.version.as_ref()), &host.version) {
        (Some(theirs), Some(ours)) => {
            theirs.major == ours.major && (ours.major > 0 || theirs.minor == ours.minor) && theirs.pre == ours.pre
        }
        (theirs, ours) => theirs.is_none() && ours.is_none(),
    };
    if fits {
        return Ok(());
    }
    Err(LoadError::Version { component: guest.id(interface), host: host.interface_id(name(interface)) })
}

fn check_types(guest: &Guest<'_>, interface: &str, theirs: &Function, ours: &Function) -> Result<(), LoadError> {
    if same_types((guest.resolve, theirs), (&CONTRACT, ours)) {
        return Ok(());
    }
    let texts = |depth| (signature(guest.resolve, theirs, depth), signature(&CONTRACT, ours, depth));
    let (mut component, mut host) = texts(Depth::Short);
    if component == host {
        // The difference is inside a named type.
        (component, host) = texts(Depth::Deep);
    }
    Err(LoadError::Types { interface: interface.to_owned(), function: ours.name.clone(), component, host })
}

fn is_granted_wasi(guest: &Guest<'_>, interface: &Interface) -> bool {
    guest.package(interface).is_some_and(|package| {
        package.namespace == "wasi"
            && package.version.as_ref().is_some_and(|version| version.major == 0 && version.minor == 2)
            && WASI.iter().any(|(wasi, interfaces)| *wasi == package.name && interfaces.contains(&name(interface)))
    })
}

fn host_package() -> &'static wit_parser::Package {
    CONTRACT.packages.iter().map(|(_, package)| package).next().expect("the contract is one package")
}

fn host_interface(name: &str) -> Option<(String, &'static Interface)> {
    let package = host_package();
    let id = package.interfaces.get(name)?;
    Some((package.name.interface_id(name), &CONTRACT.interfaces[*id]))
}

fn no_handler(guest: &Guest<'_>) -> LoadError {
    let (expected, handler) = host_interface("handler").expect("the contract has a handler");
    let function = handler.functions.values().next().expect("the handler has a function");
    let mut found: Vec<String> =
        guest.exports.iter().map(|interface| format!("`{}`", exported(guest, interface))).collect();
    found.extend(guest.loose_exports.iter().map(|name| format!("`{name}`")));
    let found = if found.is_empty() { "nothing".to_owned() } else { found.join(", ") };
    LoadError::NoHandler { expected, function: signature(&CONTRACT, function, Depth::Short), found }
}

/// An interface with its functions: `example:greeter/greet@1.0.0` (hello: func() -> string).
fn exported(guest: &Guest<'_>, interface: &Interface) -> String {
    let functions: Vec<String> =
        interface.functions.values().map(|function| signature(guest.resolve, function, Depth::Short)).collect();
    format!("{} {{ {} }}", guest.id(interface), functions.join("; "))
}

fn no_such_import(import: String) -> LoadError {
    let package = &host_package().name;
    let own = GRANTED.iter().filter(|name| **name != "types").map(|name| format!("`{}`", package.interface_id(name)));
    let wasi = WASI.iter().map(|(name, _)| format!("`wasi:{name}@0.2`"));
    LoadError::Import { import, granted: own.chain(wasi).collect::<Vec<_>>().join(", ") }
}

fn name(interface: &Interface) -> &str {
    interface.name.as_deref().unwrap_or_default()
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
