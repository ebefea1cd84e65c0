//! A log service with plain threads: a client sends lines, and gets the sequence number of each
//! line once it is synced.
//!
//! Each connection has two threads. One reads lines and submits them, the other waits for the
//! tickets in order. So a client that does not wait for each number shares fsyncs with itself.

use std::{
    io::{self, BufRead, BufReader, BufWriter, Write},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    thread,
};

use envelog::{AppendOptions, Logstore, Ticket};

/// How many lines of one connection may be under way.
const UNDER_WAY_MAX: usize = 1024;

/// Serves connections until the listener fails.
///
/// # Errors
/// The error of the listener.
pub fn serve(listener: &TcpListener, logstore: &Logstore) -> io::Result<()> {
    loop {
        let (client, _) = listener.accept()?;
        let logstore = logstore.clone();
        thread::spawn(move || connection(&client, &logstore));
    }
}

/// Serves one connection. The client sees the first error in place of a sequence number.
fn connection(client: &TcpStream, logstore: &Logstore) {
    let (sender, tickets) = mpsc::sync_channel(UNDER_WAY_MAX);
    thread::scope(|threads| {
        threads.spawn(move || {
            for line in BufReader::new(client).lines().map_while(Result::ok) {
                let group = crate::group_of(line.as_bytes(), crate::now_s());
                let ticket = logstore.submit(&group, &AppendOptions::default());
                let failed = ticket.is_err();
                if sender.send(ticket).is_err() || failed {
                    return;
                }
            }
        });
        // The client may have gone away.
        let _ = answer(client, &tickets);
        let _ = client.shutdown(std::net::Shutdown::Both);
    });
}

fn answer(client: &TcpStream, tickets: &mpsc::Receiver<envelog::Result<Ticket>>) -> io::Result<()> {
    let mut out = BufWriter::new(client);
    while let Ok(mut ticket) = tickets.recv() {
        loop {
            match ticket.and_then(Ticket::wait) {
                Ok(appended) => writeln!(out, "{}", appended.seq)?,
                Err(error) => {
                    writeln!(out, "error: {error}")?;
                    return out.flush();
                }
            }
            match tickets.try_recv() {
                Ok(next) => ticket = next,
                Err(_) => break,
            }
        }
        out.flush()?;
    }
    Ok(())
}
