//! The hand-written way, over real servers of the bench's own: claim in Redis, state write,
//! acknowledgement that the server confirms. Syncs nothing, as such programs usually do not.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use async_nats::jetstream::consumer::{PullConsumer, pull};
use async_nats::jetstream::stream;
use async_nats::jetstream::{self, AckKind};
use futures_util::{StreamExt as _, TryStreamExt as _};
use redis::aio::MultiplexedConnection;

use crate::Missing;
use crate::hapax::Hapax;
use crate::measure::{Spread, short};
use crate::report::Section;
use crate::scenarios::wasm;
use crate::server::{self, Server};
use crate::work::{Ids, Item, VALUE};
use crate::workbench::Workbench;

const IN_FLIGHT: usize = 256;
const HOST_IN_FLIGHT: usize = 1_024;
const WEEK_S: u64 = 7 * 24 * 3_600;

pub(super) fn run(bench: &Workbench, section: &mut Section) -> Result<(), Missing> {
    let hapax = Hapax::find()?;
    let redis = server::redis()?;
    let folder = tempfile::tempdir_in(bench.folder()).unwrap();
    let nats = Server::start("nats-server", |port| {
        let mut command = std::process::Command::new("nats-server");
        command.args(["--jetstream", "--addr", "127.0.0.1", "--port", &port.to_string(), "--store_dir"]);
        command.arg(folder.path().join("nats"));
        command
    })?;
    let messages = bench.pick(500, 50_000, 50_000);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let broker = runtime.block_on(Broker::connect(&nats, &redis));
    let file = wasm::orders(folder.path(), messages);
    let one = wasm::orders(folder.path(), 1);
    wasm::whole(&hapax, folder.path(), &one, HOST_IN_FLIGHT);
    let (mut ours, mut theirs, mut sync_ms) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..bench.rounds(5) as u64 {
        sync_ms.push(bench.sync_ms());
        let start = wasm::whole(&hapax, folder.path(), &one, HOST_IN_FLIGHT).0;
        ours.push(messages as f64 / (wasm::whole(&hapax, folder.path(), &file, HOST_IN_FLIGHT).0 - start));
        theirs.push(runtime.block_on(broker.round(round * messages, messages)));
    }
    section.text(format!(
        "{messages} messages a round; the consumer has {IN_FLIGHT} in flight over one connection to each server, the host \
         {HOST_IN_FLIGHT}. Publishing is not in the figures. Sync time {} ms.",
        short(Spread::of(sync_ms).median)
    ));
    section.table(&["way", "messages a second"]);
    section.row(vec!["hapax, order-intake (WASM), synced".into(), Spread::of(ours.iter().copied()).to_string()]);
    section.row(vec!["JetStream + Redis, not synced".into(), Spread::of(theirs.iter().copied()).to_string()]);
    let ratio = Spread::ratio(&ours, &theirs);
    section.judge("jetstream", format!("{ratio} x"), ratio.median >= 1.0);
    Ok(())
}

struct Broker {
    jetstream: jetstream::Context,
    consumer: PullConsumer,
    redis: MultiplexedConnection,
}

impl Broker {
    async fn connect(nats: &Server, redis: &Server) -> Self {
        let client = async_nats::connect(nats.address().to_string()).await.unwrap();
        let jetstream = jetstream::new(client);
        let config = stream::Config { name: "bench".into(), subjects: vec!["orders".into()], ..Default::default() };
        let stream = jetstream.create_stream(config).await.unwrap();
        let config = pull::Config {
            durable_name: Some("bench".into()),
            max_ack_pending: IN_FLIGHT as i64 * 8,
            ..pull::Config::default()
        };
        let consumer = stream.create_consumer(config).await.unwrap();
        let redis = redis::Client::open(format!("redis://{}/", redis.address())).unwrap();
        Self { jetstream, consumer, redis: redis.get_multiplexed_async_connection().await.unwrap() }
    }

    /// Publishes, then consumes all; messages a second of the consuming.
    async fn round(&self, first: u64, messages: u64) -> f64 {
        for number in first..first + messages {
            let sent = self.jetstream.publish("orders", Item::new(Ids::Random, number).payload()).await.unwrap();
            // The server's word for the last of them is its word for all.
            if number + 1 == first + messages {
                sent.await.unwrap();
            }
        }
        let since = Instant::now();
        let handled = Arc::new(AtomicU64::new(0));
        let stream = self.consumer.stream().max_messages_per_batch(IN_FLIGHT).messages().await.unwrap();
        stream
            .take(messages as usize)
            .map_err(drop)
            .try_for_each_concurrent(IN_FLIGHT, |message| {
                let (redis, handled) = (self.redis.clone(), handled.clone());
                async move {
                    tokio::spawn(handle(message, redis)).await.unwrap();
                    handled.fetch_add(1, Relaxed);
                    Ok(())
                }
            })
            .await
            .unwrap();
        assert_eq!(handled.load(Relaxed), messages);
        messages as f64 / since.elapsed().as_secs_f64()
    }
}

/// One message the hand-written way.
async fn handle(message: jetstream::Message, mut redis: MultiplexedConnection) {
    let state = String::from_utf8_lossy(&message.payload[..32]).into_owned();
    let mut claim = redis::cmd("SET");
    claim.arg(format!("processed/{state}")).arg("1").arg("NX").arg("EX").arg(WEEK_S);
    let fresh: Option<String> = claim.query_async(&mut redis).await.unwrap();
    assert!(fresh.is_some());
    redis::cmd("SET").arg(state).arg(&VALUE[..]).exec_async(&mut redis).await.unwrap();
    message.double_ack_with(AckKind::Ack).await.unwrap();
}
