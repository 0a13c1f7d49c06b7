//! HTTP with connections that stay open: the door over the native processor, and the whole binary
//! with a WASM processor.

use std::sync::Arc;

use axum::routing::post;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use hapax_core::{Handling, IdempotentConsumer, Message, Options, Outcome};
use hapax_transport::{Answer, HttpLimits, Ingress, router};
use http_body_util::Full;
use hyper::Request;

use crate::hapax::{self, Hapax, Serving};
use crate::http;
use crate::measure::{Run, Spread, settle, settle_of};
use crate::pipeline::{Host, PROCESSOR};
use crate::report::Section;
use crate::work::{ANSWER, Ids, Item};
use crate::workbench::Workbench;
use crate::{Missing, Scenario};

pub(crate) const SCENARIO: Scenario = Scenario {
    name: "http",
    about: "HTTP over 64 connections that stay open, durable, beside native at 64 in flight",
    by_default: true,
    run,
};

const CONNECTIONS: usize = 64;

fn run(bench: &Workbench, section: &mut Section) -> Result<(), Missing> {
    let wasm = Hapax::find();
    let messages = bench.pick(512, 20_000, 20_000);
    let mut host = Host::filled(bench.folder(), Ids::Random, bench.pick(1_000, 1_000_000, 1_000_000));
    let door = Arc::new(HttpIngress(host.consumer(Options::default().cache_bytes)));
    let address = serve(&host, router(door, HttpLimits::default()));
    let alone = serve(&host, axum::Router::new().route("/v1/processors/{name}/messages", post(answer_at_once)));
    let folder = tempfile::tempdir_in(bench.folder()).unwrap();
    let binary: Result<Serving, _> =
        wasm.map(|hapax| hapax.up(folder.path(), &[("order-intake".into(), hapax.component.clone())]));
    settle();
    let (mut rounds, mut sync_ms) = ([const { Vec::new() }; 4], Vec::new());
    for round in 0..bench.rounds(5) as u64 {
        sync_ms.push(bench.sync_ms());
        rounds[0].push(host.run_fresh(CONNECTIONS, messages));
        settle();
        let requests = native_requests(&mut host, messages);
        rounds[1].push(host.runtime.block_on(http::drive(address, CONNECTIONS, requests)));
        settle();
        let requests = native_requests(&mut host, messages);
        host.records -= messages;
        rounds[3].push(host.runtime.block_on(http::drive(alone, CONNECTIONS, requests)));
        if let Ok(binary) = &binary {
            let requests = orders(round * messages, messages);
            rounds[2].push(host.runtime.block_on(http::drive(binary.address, CONNECTIONS, requests)));
            settle_of(binary.id());
        }
    }
    section.text(format!(
        "{messages} messages a round, in turn; clients and host share the cores. Sync time {} ms.",
        Spread::of(sync_ms)
    ));
    table(section, &rounds);
    let rate = |at: usize| rounds[at].iter().map(Run::rate).collect::<Vec<_>>();
    let ratio = Spread::ratio(&rate(1), &rate(0));
    section.judge("http", format!("{ratio} x"), ratio.median >= 0.5);
    section.text(format!(
        "HTTP alone is the same server and the same clients, with a handler that reads the body and answers 32 bytes: {} x native. With \
         the native processor behind it, HTTP reaches {} x of that.",
        Spread::ratio(&rate(3), &rate(0)),
        Spread::ratio(&rate(1), &rate(3)),
    ));
    if let Err(Missing(why)) = &binary {
        section.text(format!("`hapax up` was not measured: {why}."));
    }
    Ok(())
}

fn table(section: &mut Section, rounds: &[Vec<Run>; 4]) {
    section.table(&["way in", "messages a second", "p50 ms", "p99 ms"]);
    let names = [
        "native, 64 in flight, no HTTP",
        "HTTP in this process, native",
        "`hapax up`, order-intake (WASM)",
        "HTTP alone, in this process, nothing behind it",
    ];
    for (name, runs) in names.iter().zip(rounds).filter(|(_, runs)| !runs.is_empty()) {
        let of = |value: fn(&Run) -> f64| Spread::of(runs.iter().map(value)).to_string();
        let latencies = [of(|run| run.latency_ms(0.5)), of(|run| run.latency_ms(0.99))];
        section.row([vec![(*name).into(), of(Run::rate)], latencies.to_vec()].concat());
    }
}

async fn answer_at_once(_body: Bytes) -> &'static [u8] {
    ANSWER
}

/// Serves in this process, on the host's runtime.
fn serve(host: &Host, routes: axum::Router) -> std::net::SocketAddr {
    host.runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, routes).await });
        address
    })
}

struct HttpIngress(IdempotentConsumer);

impl Ingress for HttpIngress {
    fn deliver(&self, _: &str, message: Message) -> BoxFuture<'static, Answer> {
        let consumer = self.0.clone();
        Box::pin(async move {
            match consumer.handle(message, Handling::default()).await {
                Ok(Outcome::Completed { output }) => Answer::Completed { output },
                Ok(other) => Answer::Unavailable { reason: format!("{other:?}") },
                Err(error) => Answer::Unavailable { reason: error.to_string() },
            }
        })
    }
}

fn native_requests(host: &mut Host, messages: u64) -> Vec<Request<Full<Bytes>>> {
    let first = host.records;
    host.records += messages;
    let request = |number| {
        let item = Item::new(Ids::Random, number);
        http::request(PROCESSOR, &item.id(), "text/plain", item.payload())
    };
    (first..host.records).map(request).collect()
}

fn orders(first: u64, messages: u64) -> Vec<Request<Full<Bytes>>> {
    let request = |number| {
        let id = Item::new(Ids::Random, number).id();
        http::request("order-intake", &id, "application/json", hapax::order(number).into())
    };
    (first..first + messages).map(request).collect()
}
