//! Servers of the bench's own: on a free port, in a folder of their own, gone when dropped. Knows
//! no protocol but a TCP connection.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::Missing;

/// A server that was started.
pub(crate) struct Server {
    process: Child,
    pub(crate) port: u16,
}

impl Server {
    /// Starts what `command` makes of a free port, and waits until it takes connections. `package`
    /// is Debian's.
    pub(crate) fn start(package: &str, command: impl FnOnce(u16) -> Command) -> Result<Self, Missing> {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let started = command(port).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let process = started.map_err(|error| Missing(format!("install the package `{package}`: {error}")))?;
        let mut server = Self { process, port };
        server.wait_until_up(package)?;
        Ok(server)
    }

    fn wait_until_up(&mut self, package: &str) -> Result<(), Missing> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(self.address()).is_err() {
            if let Some(status) = self.process.try_wait().unwrap() {
                return Err(Missing(format!("the server of `{package}` ended at once: {status}")));
            }
            assert!(Instant::now() < deadline, "the server of `{package}` does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // SIGINT is the fast shutdown of all of them; SIGKILL would leave PostgreSQL's children. It
        // may have ended by itself.
        let _ = kill_process(Pid::from_child(&self.process), Signal::INT);
        let _ = self.process.wait();
    }
}

/// Redis as it is out of the box, and nothing on the disk.
pub(crate) fn redis() -> Result<Server, Missing> {
    Server::start("redis-server", |port| {
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port", &port.to_string()]);
        command.current_dir(std::env::temp_dir());
        command
    })
}
