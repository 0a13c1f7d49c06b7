//! The host's own release binary as a child, with the example guest `order-intake`. Knows its
//! command line and nothing inside it.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::Missing;
use crate::work::{Ids, Item};

/// The binary and the guest.
pub(crate) struct Hapax {
    bin: PathBuf,
    pub(crate) component: PathBuf,
}

/// A host that serves HTTP until it is dropped.
pub(crate) struct Serving {
    process: Child,
    pub(crate) address: SocketAddr,
}

impl Hapax {
    /// Where the caller of the bench says they are.
    pub(crate) fn find() -> Result<Self, Missing> {
        let named = |name: &str| {
            let path = std::env::var_os(name).map(PathBuf::from).filter(|path| path.exists());
            path.ok_or_else(|| Missing(format!("{name} names nothing that is there; `cargo xtask bench` sets it")))
        };
        Ok(Self { bin: named("HAPAX_BIN")?, component: named("HAPAX_GUESTS")?.join("order-intake.wasm") })
    }

    /// The command, with its cache of compiled code in a folder of the bench's.
    pub(crate) fn command(&self, cache: &Path) -> Command {
        let mut command = Command::new(&self.bin);
        command.env("XDG_CACHE_HOME", cache).stdin(Stdio::null());
        command
    }

    /// `hapax up` with the store in `folder` and each processor's component; returns when it
    /// listens.
    pub(crate) fn up(&self, folder: &Path, processors: &[(String, PathBuf)]) -> Serving {
        let mut config = "store = \"store\"\nlisten = \"127.0.0.1:0\"\n".to_owned();
        for (name, component) in processors {
            config += &format!("[processors.{name}]\ncomponent = {component:?}\n");
        }
        let file = folder.join("hapax.toml");
        std::fs::write(&file, config).unwrap();
        let mut process =
            self.command(folder).args(["--json", "up", "--config"]).arg(&file).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        Serving { process, address: line["listening"].as_str().unwrap().parse().unwrap() }
    }
}

impl Serving {
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // It may have ended by itself, which its clients have seen.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The `number`-th order, for a customer of its own.
pub(crate) fn order(number: u64) -> String {
    let state = Item::new(Ids::Random, number).state();
    format!(r#"{{"order_id":"o-{number}","customer":"{state}","amount_cents":1200}}"#)
}

/// The `number`-th order as a CloudEvent on a line.
pub(crate) fn order_line(number: u64) -> String {
    let id = Item::new(Ids::Random, number).id();
    let order = order(number);
    format!(
        "{{\"specversion\":\"1.0\",\"id\":\"{id}\",\"source\":\"/bench\",\"type\":\"order.placed\",\
         \"datacontenttype\":\"application/json\",\"data\":{order}}}\n"
    )
}
