//! The front alone, storing nothing: what clients and the front cost without a log under it.
//! `cargo run --release -p mqtt --example front -- 127.0.0.1:1883`

use std::sync::Arc;

use mqtt::front::{Front, ListenerSettings, Settings};
use mqtt::store::memory::{MemoryStore, Verdict};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:1883".to_owned());
    let front = Front::new(Settings::default(), Arc::new(MemoryStore::at_once(|_| Verdict::NotStored)))?;
    let listener = tokio::net::TcpListener::bind(address).await?;
    tokio::spawn(front.clone().serve(listener, None, ListenerSettings::default()));
    tokio::signal::ctrl_c().await?;
    front.shutdown(std::time::Duration::from_secs(5)).await;
    println!("{:#?}", front.stats());
    Ok(())
}
