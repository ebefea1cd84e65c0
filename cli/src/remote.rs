//! Administrative commands between this program and a service: each side is the same program, and
//! the command runs where the store is open.

#[cfg(feature = "serve")]
mod client;
#[cfg(feature = "serve")]
mod host;

#[cfg(feature = "serve")]
pub(crate) use {client::Service, host::Host};

/// A service; none in this build.
#[cfg(not(feature = "serve"))]
pub(crate) enum Service {}

#[cfg(not(feature = "serve"))]
impl Service {
    pub(crate) fn new(_: &str, _: &crate::args::Global) -> crate::exit::Result<Self> {
        let message = "this build has no --endpoint: build it with the feature `serve`";
        Err(crate::exit::Failure::usage(message))
    }

    pub(crate) fn run(self, _: crate::call::Call) -> crate::exit::Result {
        match self {}
    }
}
