//! PostgreSQL doing the same job: one statement that inserts the record if it is absent and writes
//! the state, synced, over 32 connections. Starts a server of its own in a folder of its own; needs
//! Debian's package `postgresql`.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio_postgres::{Client, NoTls, Statement};

use crate::measure::{Run, Sample, Spread, settle, short};
use crate::pipeline::Host;
use crate::report::Section;
use crate::server::Server;
use crate::work::{Ids, Item, RECORD, VALUE};
use crate::workbench::{Workbench, on_a_disk};
use crate::{Missing, Scenario};

pub(crate) const SCENARIO: Scenario = Scenario {
    name: "postgres",
    about: "PostgreSQL: one statement (insert if absent + state write), 32 connections, synced; needs its server",
    by_default: false,
    run,
};

const CONNECTIONS: usize = 32;
const TABLES: &str = "CREATE TABLE records (key bytea PRIMARY KEY, record bytea NOT NULL);
                      CREATE TABLE state (key bytea PRIMARY KEY, value bytea NOT NULL);";
const STATEMENT: &str = "WITH fresh AS (INSERT INTO records VALUES ($1, $2) ON CONFLICT DO NOTHING RETURNING 1)
                         INSERT INTO state SELECT $3, $4 FROM fresh
                         ON CONFLICT (key) DO UPDATE SET value = EXCLUDED.value";
const FILL: [&str; 2] = [
    "INSERT INTO records SELECT decode(md5(n::text) || md5(n::text), 'escape'), decode(repeat('07', 100), 'hex')
     FROM generate_series(1, $1::bigint) AS n",
    "INSERT INTO state SELECT decode(md5(n::text) || left(md5(n::text), 12), 'escape'), decode(repeat('07', 16), 'hex')
     FROM generate_series(1, $1::bigint) AS n",
];

const SETTINGS: [&str; 5] = [
    "listen_addresses=127.0.0.1",
    "unix_socket_directories=",
    "fsync=on",
    "synchronous_commit=on",
    "shared_buffers=256MB",
];

fn run(bench: &Workbench, section: &mut Section) -> Result<(), Missing> {
    let postgres = Postgres::start()?;
    let records = bench.pick(1_000, 1_000_000, 1_000_000);
    let messages = bench.pick(320, 20_000, 20_000);
    let mut host = Host::filled(bench.folder(), Ids::Random, records);
    let mut clients = Clients::connect(postgres.server.port, records);
    let (mut ours, mut theirs, mut sync_ms) = (Vec::new(), Vec::new(), Vec::new());
    settle();
    for _ in 0..bench.rounds(5) {
        sync_ms.push(bench.sync_ms());
        ours.push(host.run_fresh(CONNECTIONS, messages));
        settle();
        theirs.push(clients.run(messages));
    }
    section.text(format!("{}; {records} records are there already, {messages} messages a round.", postgres.version));
    section.table(&["way", "messages a second", "p50 ms", "p99 ms", "sync ms"]);
    for (name, runs) in [("hapax, native, 32 in flight", &ours), ("PostgreSQL, 32 connections", &theirs)] {
        let of = |value: fn(&Run) -> f64| Spread::of(runs.iter().map(value)).to_string();
        let latencies = [of(|run| run.latency_ms(0.5)), of(|run| run.latency_ms(0.99))];
        let sync_ms = short(Spread::of(sync_ms.iter().copied()).median);
        section.row([vec![name.into(), of(Run::rate)], latencies.to_vec(), vec![sync_ms]].concat());
    }
    let each = |runs: &[Run]| runs.iter().map(Run::rate).collect::<Vec<_>>();
    let ratio = Spread::ratio(&each(&ours), &each(&theirs));
    section.judge("postgres", format!("{ratio} x, native"), ratio.median >= 4.0);
    Ok(())
}

/// A server with its data; both gone when dropped.
struct Postgres {
    server: Server,
    version: String,
    _folder: TempDir,
}

impl Postgres {
    fn start() -> Result<Self, Missing> {
        let bin = binaries()?;
        // Its user, who is not ours, must come to its data: the bench's own folder may be closed to
        // others.
        let temp = std::env::temp_dir();
        on_a_disk(&temp)?;
        let folder = tempfile::Builder::new().prefix("hapax-bench-postgres-").tempdir_in(temp).unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let data = folder.path().join("data");
        let initialised = as_user(&bin.join("initdb"))
            .args(["--auth=trust", "--username=bench", "--encoding=UTF8", "--no-instructions", "-D"])
            .arg(&data)
            .stdout(Stdio::null())
            .status();
        if !initialised.is_ok_and(|status| status.success()) {
            return Err(Missing("PostgreSQL's initdb failed".into()));
        }
        let server = Server::start("postgresql", |port| {
            let mut command = as_user(&bin.join("postgres"));
            command.arg("-D").arg(&data).args(["-p", &port.to_string()]);
            for setting in SETTINGS {
                command.args(["-c", setting]);
            }
            command
        })?;
        let version = Command::new(bin.join("postgres")).arg("--version").output().unwrap().stdout;
        Ok(Self { server, version: String::from_utf8_lossy(&version).trim().to_owned(), _folder: folder })
    }
}

fn binaries() -> Result<PathBuf, Missing> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().filter_map(Result::ok);
    let bins = versions.map(|version| version.path().join("bin")).filter(|bin| bin.join("postgres").exists());
    bins.max().ok_or_else(|| Missing("there is no PostgreSQL server; install the package `postgresql`".into()))
}

/// The server refuses to run as root: then as the user that its package makes.
fn as_user(program: &Path) -> Command {
    if !rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]).arg(program).current_dir("/");
    command
}

/// Open connections, each with the statement prepared.
struct Clients {
    runtime: Runtime,
    clients: Vec<Arc<(Client, Statement)>>,
    /// Items that were sent.
    sent: u64,
}

impl Clients {
    fn connect(port: u16, records: u64) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let clients = runtime.block_on(async {
            let first = connect_when_up(port).await;
            first.batch_execute(TABLES).await.unwrap();
            for fill in FILL {
                first.execute(fill, &[&(records as i64)]).await.unwrap();
            }
            first.batch_execute("CHECKPOINT; ANALYZE").await.unwrap();
            let mut clients = Vec::new();
            for _ in 0..CONNECTIONS {
                let client = connect(port).await.unwrap();
                let statement = client.prepare(STATEMENT).await.unwrap();
                clients.push(Arc::new((client, statement)));
            }
            clients
        });
        Self { runtime, clients, sent: 0 }
    }

    fn run(&mut self, messages: u64) -> Run {
        let next = Arc::new(AtomicU64::new(self.sent));
        self.sent += messages;
        let (end, since) = (self.sent, Instant::now());
        let samples = self.runtime.block_on(async {
            let mut tasks = tokio::task::JoinSet::new();
            for client in self.clients.clone() {
                tasks.spawn(work(client, next.clone(), end, since));
            }
            tasks.join_all().await.concat()
        });
        Run::new(samples, messages, since.elapsed(), 1.0)
    }
}

async fn work(client: Arc<(Client, Statement)>, next: Arc<AtomicU64>, end: u64, since: Instant) -> Vec<Sample> {
    let mut samples = Vec::new();
    loop {
        let number = next.fetch_add(1, Relaxed);
        if number >= end {
            return samples;
        }
        let item = Item::new(Ids::Random, number);
        let (key, state) = (item.record_key(), item.state_key());
        let began = Instant::now();
        let written = client.0.execute(&client.1, &[&key, &&RECORD[..], &state, &&VALUE[..]]).await.unwrap();
        assert_eq!(written, 1);
        samples.push(Sample::of(since, began));
    }
}

async fn connect(port: u16) -> Result<Client, tokio_postgres::Error> {
    let to = format!("host=127.0.0.1 port={port} user=bench dbname=postgres");
    let (client, connection) = tokio_postgres::connect(&to, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

async fn connect_when_up(port: u16) -> Client {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match connect(port).await {
            Ok(client) => return client,
            Err(error) => assert!(Instant::now() < deadline, "PostgreSQL does not come up: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
