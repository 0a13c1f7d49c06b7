//! The targets that concern one host, in the order in which the report prints them. What they are
//! measured by is the scenarios'.

/// One row of the report's first table.
pub(crate) struct Target {
    /// Name of the target in scenarios.
    pub(crate) id: &'static str,
    /// The measured quantity.
    pub(crate) what: &'static str,
    /// The target value.
    pub(crate) target: &'static str,
    /// The scenario that measures it; `None`: nothing here does.
    pub(crate) scenario: Option<&'static str>,
}

const fn row(id: &'static str, what: &'static str, target: &'static str, scenario: &'static str) -> Target {
    Target { id, what, target, scenario: Some(scenario) }
}

/// Every row. A range or a pair of figures is a row for each, so that each is met or not.
pub(crate) const TARGETS: &[Target] = &[
    row("1-rate", "native, 1 in flight", ">= 0.8 x append + fdatasync", "throughput"),
    row("1-p50", "native, 1 in flight, p50", "<= 1.3 x that of append + fdatasync", "throughput"),
    row("64-rate", "native, 64 in flight", ">= 5 x redb direct", "throughput"),
    row("64-p99", "native, 64 in flight, p99", "<= 2 x its p50", "throughput"),
    row(
        "sustained",
        "native, 1,024 in flight, random ids, 1 million",
        ">= 5 x redb direct (stretch 10 x)",
        "sustained",
    ),
    row("sustained-p99", "the same, p99", "<= 100 ms", "sustained"),
    row("sustained-pause", "the same, longest pause", "<= 250 ms", "sustained"),
    row("wasm", "WASM, fresh instances, 1,024 in flight", ">= 0.8 x what a bare loop leaves room for", "wasm"),
    row("engine-fresh", "one invocation through the engine, fresh", "<= 1.2 x a bare wasmtime loop", "engine"),
    row("engine-reused", "one invocation through the engine, reused", "<= 2 x a bare wasmtime loop", "engine"),
    row("duplicate-cache", "a duplicate from the cache", "<= 2 us of CPU", "duplicates"),
    row("duplicate-store", "duplicates from the store", ">= 0.8 x a bare redb read loop", "duplicates"),
    row("growth", "throughput at 10 million records", ">= 0.8 x that at 100 thousand", "growth"),
    row("growth-duplicates", "duplicates at 10 million records", ">= 0.8 x those at 100 thousand", "growth"),
    row("memory", "resident memory at 10 million records", "<= 64 MiB + what is configured", "memory"),
    row("retention", "throughput while 1 of 10 million records expires", ">= 0.95 x quiet", "retention"),
    row("retention-p99", "p99 meanwhile", "<= 2 x quiet", "retention"),
    row("restart", "restart after SIGKILL, 10 million records, to the first message", "<= 1 s", "restart"),
    row("start", "start with 100 processors, compiled code cached", "<= 1 s", "start"),
    row("http", "HTTP, keep-alive, 64 connections, durable", ">= 0.5 x native at 64 in flight", "http"),
    row("postgres", "PostgreSQL, one statement, 32 connections, synced", ">= 4 x with hapax", "postgres"),
    row(
        "jetstream",
        "JetStream + Redis SET NX + double ack, not synced",
        ">= 1 x with hapax, WASM, synced",
        "jetstream",
    ),
    row("python", "Python idempotency decorator over Redis", ">= 20 x with hapax", "python"),
    Target { id: "restate", what: "Restate over HTTP", target: ">= 20 x with hapax", scenario: None },
];
