//! A log service on [envelog], for the SDKs of Alibaba Cloud Simple Log Service (SLS).
//!
//! An application that logs to SLS can be pointed at this service without a change, and its logs
//! are encrypted at rest under the service key, or under a customer's master key. `docs/service.md`
//! has the calls that the service answers, and how it differs from the real one.
//!
//! ```no_run
//! use envelog::{Store, crypto::AwsLc};
//! use envelog_server::Server;
//!
//! # async fn serve() -> Result<(), Box<dyn std::error::Error>> {
//! let store = Store::builder("data", "data.keyring", AwsLc::new()).open_or_create()?;
//! let address = "127.0.0.1:8099".parse()?;
//! let server = Server::builder().access_keys("keys.json").bind(address)?;
//! server.run(store.clone(), async { drop(tokio::signal::ctrl_c().await) }).await?;
//! store.close()?;
//! # Ok(())
//! # }
//! ```
//!
//! The service needs a tokio runtime with time and network. Calls of the engine that may block run
//! on the runtime's threads for them, at most 16 at once for a Logstore.

#![deny(missing_docs, unsafe_code)]

mod admin;
mod api;
mod auth;
mod call;
mod calls;
pub mod client;
mod compression;
mod console;
mod cursors;
mod encryption;
mod error;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod groups;
mod http;
mod logstores;
mod memory;
mod metrics;
mod names;
mod projects;
mod pull;
mod put;
mod query;
mod response;
mod server;
mod service;
mod shards;
#[cfg(test)]
mod slow_clients;
mod state;
mod tls;

pub use admin::{AdminCommand, AdminOutput, Administration};
pub use auth::KeysError;
pub use server::{ServeError, Server, ServerBuilder};
pub use state::StateError;
pub use tls::TlsError;
