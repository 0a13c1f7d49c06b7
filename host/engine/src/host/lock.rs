//! The `lock` import: locks of the host, through the message's `Context`. An error there ends the
//! run.

use hapax_core::Acquired;
use wasmtime::component::{ComponentType, Lift, Linker, Lower};
use wasmtime::{Error, StoreContextMut};

use super::HostState;

type Store<'a> = StoreContextMut<'a, HostState>;

/// `token` of the contract.
#[derive(ComponentType, Lift, Lower)]
#[component(record)]
struct Token {
    name: String,
    fence: u64,
}

/// `busy` of the contract.
#[derive(ComponentType, Lower)]
#[component(record)]
struct Busy {
    #[component(name = "retry-after-ms")]
    retry_after_ms: u64,
}

/// `lost` of the contract.
#[derive(ComponentType, Lower)]
#[component(record)]
struct Lost {
    name: String,
}

/// All of them wait until what they write is durable.
pub(crate) fn add_to_linker(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    let mut instance = linker.instance("hapax:processor/lock@0.1.0")?;
    instance.func_wrap_async("acquire", |mut store: Store<'_>, (name, ttl_ms): (String, u64)| {
        Box::new(async move {
            let acquired = store.data_mut().context()?.acquire(&name, ttl_ms).await.map_err(Error::new)?;
            Ok((match acquired {
                Acquired::Held(lock) => Ok(Token { name: lock.name, fence: lock.fence }),
                Acquired::Busy { retry_after_ms } => Err(Busy { retry_after_ms }),
            },))
        })
    })?;
    instance.func_wrap_async("extend", |mut store: Store<'_>, (token, ttl_ms): (Token, u64)| {
        Box::new(async move {
            let Token { name, fence } = token;
            let held = store.data_mut().context()?.extend(&name, fence, ttl_ms).await.map_err(Error::new)?;
            Ok((if held { Ok(()) } else { Err(Lost { name }) },))
        })
    })?;
    instance.func_wrap_async("release", |mut store: Store<'_>, (token,): (Token,)| {
        Box::new(async move {
            let context = store.data_mut().context()?;
            context.release(&token.name, token.fence).await.map_err(Error::new)
        })
    })
}
