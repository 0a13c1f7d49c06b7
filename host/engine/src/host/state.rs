//! The `state` import: the processor's key-value state through the message's `Context`. An error there ends the run.

use bytes::Bytes;
use wasmtime::Error;

use super::HostState;
use crate::bindings::hapax::processor::state::Host;

impl Host for HostState {
    async fn get(&mut self, key: String) -> wasmtime::Result<Option<Vec<u8>>> {
        let value = self.context.get(&key).await.map_err(Error::new)?;
        Ok(value.map(Vec::from))
    }

    fn set(&mut self, key: String, value: Vec<u8>) -> wasmtime::Result<()> {
        self.context.set(&key, value).map_err(Error::new)
    }

    fn delete(&mut self, key: String) -> wasmtime::Result<()> {
        self.context.delete(&key).map_err(Error::new)
    }

    async fn compare_and_set(
        &mut self,
        key: String,
        expected: Option<Vec<u8>>,
        value: Option<Vec<u8>>,
    ) -> wasmtime::Result<bool> {
        self.context.compare_and_set(&key, expected.as_deref(), value.map(Bytes::from)).await.map_err(Error::new)
    }

    async fn scan(
        &mut self,
        start: String,
        end: Option<String>,
        limit: u32,
    ) -> wasmtime::Result<Vec<(String, Vec<u8>)>> {
        let entries = self.context.scan(&start, end.as_deref(), limit as usize).await.map_err(Error::new)?;
        Ok(entries.into_iter().map(|(key, value)| (key, Vec::from(value))).collect())
    }
}
