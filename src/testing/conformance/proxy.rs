//! A TCP proxy on the loopback interface that delays, cuts and withholds answers.
//!
//! The proxy knows no protocol. An *answer* is the data that the server sends after the client has
//! sent data, up to the next data of the client. A call of a backend may need several answers, so a
//! fault can begin at any of them.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    thread,
    time::Duration,
};

use crate::{
    io::{Clock, SystemClock},
    sync::{
        LockRank, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
        lock,
    },
};

/// How often a thread of the proxy looks whether the fault has changed.
const PULSE: Duration = Duration::from_millis(5);
/// The pause between two bytes of a dripping answer.
const DRIP_PAUSE: Duration = Duration::from_millis(40);
/// How long the proxy tries to give its address up, or to listen there again.
const LISTEN_PATIENCE: Duration = Duration::from_secs(5);

/// The treatment of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Passes it on.
    None,
    /// Never passes it on, and keeps the connection open.
    Hang,
    /// Closes the connection in its place.
    Close,
    /// Passes on the first half of its first part, and closes the connection.
    Half,
    /// Passes on its first part without the last byte, and closes the connection.
    AllButOneByte,
    /// Passes it on later.
    Delay(Duration),
    /// Passes on one byte after the other, slowly.
    Drip,
}

/// The faults of the answers from now on: `skip` answers pass, the next `count` have the fault, and
/// all others pass.
#[derive(Clone, Copy)]
struct Plan {
    fault: Fault,
    skip: u64,
    count: u64,
}

struct Shared {
    plan: Mutex<Plan>,
    /// Counts the changes of the plan. A connection whose answer was withheld ends at the next
    /// change.
    changes: AtomicU64,
    /// The number of answers so far.
    answers: AtomicU64,
    /// Whether the proxy accepts no connections and ends those that it has.
    closed: AtomicBool,
    /// Whether the proxy is gone.
    gone: AtomicBool,
    server: SocketAddr,
}

/// The proxy. It ends when it is dropped.
pub(super) struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Proxy {
    /// A proxy in front of a server, on a port of its own.
    pub(super) fn start(server: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let plan = Plan { fault: Fault::None, skip: 0, count: 0 };
        let shared = Arc::new(Shared {
            plan: Mutex::new(LockRank::KmsConformance, plan),
            changes: AtomicU64::new(0),
            answers: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            server,
        });
        let proxy = Self { address: listener.local_addr()?, shared };
        proxy.accept(listener)?;
        Ok(proxy)
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The number of answers so far.
    pub(super) fn answers(&self) -> u64 {
        self.shared.answers.load(Ordering::SeqCst)
    }

    /// Passes all answers on.
    pub(super) fn heal(&self) {
        self.plan(Fault::None, 0, 0);
    }

    /// Applies the fault to every answer after the next `skip` ones.
    pub(super) fn fail(&self, fault: Fault, skip: u64) {
        self.plan(fault, skip, u64::MAX);
    }

    /// Applies the fault to the next answer alone.
    pub(super) fn fail_once(&self, fault: Fault) {
        self.plan(fault, 0, 1);
    }

    fn plan(&self, fault: Fault, skip: u64, count: u64) {
        *lock(&self.shared.plan) = Plan { fault, skip, count };
        self.shared.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// Refuses connections, and ends those that it has.
    pub(super) fn refuse(&self) -> io::Result<()> {
        self.shared.closed.store(true, Ordering::SeqCst);
        // The listener ends when it accepts the next connection. The system refuses connections
        // once the listener is gone.
        let began = SystemClock.uptime();
        while TcpStream::connect(self.address).is_ok() {
            if SystemClock.uptime() > began + LISTEN_PATIENCE {
                return Err(io::ErrorKind::AddrInUse.into());
            }
            pause(PULSE);
        }
        Ok(())
    }

    /// Accepts connections again, at the same address.
    pub(super) fn accept_again(&self) -> io::Result<()> {
        let began = SystemClock.uptime();
        let listener = loop {
            match TcpListener::bind(self.address) {
                Ok(listener) => break listener,
                Err(error) if SystemClock.uptime() > began + LISTEN_PATIENCE => return Err(error),
                Err(_) => pause(PULSE),
            }
        };
        self.shared.closed.store(false, Ordering::SeqCst);
        self.accept(listener)
    }

    fn accept(&self, listener: TcpListener) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        spawn(move || {
            for client in listener.incoming() {
                if shared.is_closed() {
                    return;
                }
                // A connection that fails is one that the proxy closes.
                if let Ok(client) = client {
                    let _ = connect(&shared, client);
                }
            }
        })
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.gone.store(true, Ordering::SeqCst);
        // Wakes the listener, which then ends.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst) || self.gone.load(Ordering::SeqCst)
    }

    fn changes(&self) -> u64 {
        self.changes.load(Ordering::SeqCst)
    }

    /// The fault of the answer that begins now.
    fn next_fault(&self) -> Fault {
        self.answers.fetch_add(1, Ordering::SeqCst);
        let mut plan = lock(&self.plan);
        if plan.skip > 0 {
            plan.skip -= 1;
            return Fault::None;
        }
        if plan.count == 0 {
            return Fault::None;
        }
        plan.count = plan.count.saturating_sub(1);
        plan.fault
    }
}

/// A connection of a client, and the one to the server behind it.
struct Connection {
    shared: Arc<Shared>,
    client: TcpStream,
    server: TcpStream,
    /// Whether the client has sent data since the last answer began.
    asked: AtomicBool,
    /// The number of the plan under which an answer was withheld. 0 if none was.
    withheld: AtomicU64,
    /// Whether one of the two ends has closed.
    over: AtomicBool,
}

impl Connection {
    /// Whether the connection has to end: the proxy has closed, or the plan has changed since an
    /// answer was withheld.
    fn has_ended(&self) -> bool {
        let withheld = self.withheld.load(Ordering::SeqCst);
        self.shared.is_closed()
            || self.over.load(Ordering::SeqCst)
            || withheld != 0 && withheld != self.shared.changes()
    }

    fn close(&self) {
        self.over.store(true, Ordering::SeqCst);
        // Either side may have closed its end already.
        let _ = self.client.shutdown(Shutdown::Both);
        let _ = self.server.shutdown(Shutdown::Both);
    }

    /// Reads the next part. `None` at the end of the connection.
    fn read(&self, mut from: &TcpStream, part: &mut [u8]) -> Option<usize> {
        loop {
            if self.has_ended() {
                return None;
            }
            match from.read(part) {
                Ok(0) => return None,
                // The plan may have changed while the read waited.
                Ok(_) if self.has_ended() => return None,
                Ok(len) => return Some(len),
                Err(error) if is_a_pulse(&error) => {}
                Err(_) => return None,
            }
        }
    }

    /// Passes the client's data on until the connection ends.
    fn pass_requests(&self) -> Option<()> {
        let mut part = vec![0; 64 * 1024];
        loop {
            let len = self.read(&self.client, &mut part)?;
            self.asked.store(true, Ordering::SeqCst);
            let passed = (&self.server).write_all(&part[..len]);
            // While an answer is withheld, the client must not notice that the server has closed.
            if passed.is_err() && self.withheld.load(Ordering::SeqCst) == 0 {
                return None;
            }
        }
    }

    /// Passes the server's answers on, with their faults, until the connection ends.
    fn pass_answers(&self) -> Option<()> {
        let mut part = vec![0; 64 * 1024];
        let mut fault = Fault::None;
        loop {
            let len = self.read(&self.server, &mut part)?;
            let is_first_part = self.asked.swap(false, Ordering::SeqCst);
            if is_first_part {
                fault = self.shared.next_fault();
            }
            let part = &part[..len];
            match fault {
                Fault::None => self.answer(part)?,
                Fault::Hang => {
                    self.withheld.store(self.shared.changes(), Ordering::SeqCst);
                    return self.wait(Duration::MAX);
                }
                Fault::Close => return None,
                Fault::Half => {
                    self.answer(&part[..len / 2])?;
                    return None;
                }
                Fault::AllButOneByte => {
                    self.answer(&part[..len - 1])?;
                    return None;
                }
                Fault::Delay(delay) => {
                    if is_first_part {
                        self.wait(delay)?;
                    }
                    self.answer(part)?;
                }
                Fault::Drip => {
                    for byte in part.chunks(1) {
                        self.answer(byte)?;
                        self.wait(DRIP_PAUSE)?;
                    }
                }
            }
        }
    }

    fn answer(&self, part: &[u8]) -> Option<()> {
        (&self.client).write_all(part).ok()
    }

    /// Waits, unless the connection ends before.
    fn wait(&self, time: Duration) -> Option<()> {
        let until = SystemClock.uptime().saturating_add(time);
        while let Some(left) = until.checked_sub(SystemClock.uptime()) {
            if self.has_ended() {
                return None;
            }
            pause(left.min(PULSE));
        }
        Some(())
    }
}

fn connect(shared: &Arc<Shared>, client: TcpStream) -> io::Result<()> {
    let server = TcpStream::connect(shared.server)?;
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PULSE))?;
    }
    let connection = Arc::new(Connection {
        shared: Arc::clone(shared),
        client,
        server,
        asked: AtomicBool::new(false),
        withheld: AtomicU64::new(0),
        over: AtomicBool::new(false),
    });
    let requests = Arc::clone(&connection);
    spawn(move || {
        requests.pass_requests();
        requests.close();
    })?;
    spawn(move || {
        connection.pass_answers();
        connection.close();
    })
}

fn is_a_pulse(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), Interrupted | TimedOut | WouldBlock)
}

fn spawn(run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name("envelog-kms-proxy".to_owned()).spawn(run).map(drop)
}

#[expect(clippy::disallowed_methods, reason = "the proxy plays a slow network in real time")]
pub(super) fn pause(time: Duration) {
    thread::sleep(time);
}
