//! The example with threads, through a socket.

#![allow(clippy::unwrap_used)]

use std::{
    io::{BufRead, BufReader, Write},
    net::{Shutdown, TcpListener, TcpStream},
    thread,
};

use envelog::{LogstoreSpec, ReadOptions, Store, crypto::AwsLc};
use envelog_examples::{lines, lines_of};

#[test]
fn each_line_gets_its_number_once_it_is_synced() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::builder(dir.path().join("store"), dir.path().join("keyring"), AwsLc::new())
        .create()
        .unwrap();
    let logstore =
        store.create_logstore(&"app/lines".parse().unwrap(), LogstoreSpec::default()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let served = logstore.clone();
    thread::spawn(move || lines::serve(&listener, &served));
    let clients: Vec<_> = (0..4)
        .map(|client| {
            thread::spawn(move || {
                let mut socket = TcpStream::connect(address).unwrap();
                for line in 0..100 {
                    writeln!(socket, "{client}.{line}").unwrap();
                }
                socket.shutdown(Shutdown::Write).unwrap();
                let numbers = BufReader::new(socket).lines();
                numbers.map(|number| number.unwrap().parse().unwrap()).collect::<Vec<u64>>()
            })
        })
        .collect();
    let mut numbers: Vec<u64> = Vec::new();
    for client in clients {
        let of_client = client.join().unwrap();
        assert!(of_client.len() == 100 && of_client.is_sorted(), "{of_client:?}");
        numbers.extend(of_client);
    }
    numbers.sort_unstable();
    assert!(numbers.iter().copied().eq(0..400));
    let mut text: Vec<String> = Vec::new();
    for record in logstore.read(0, &ReadOptions::default()).unwrap() {
        let group = record.unwrap().group().unwrap();
        text.push(String::from_utf8(lines_of(&group).to_vec()).unwrap());
    }
    assert_eq!(text.iter().rfind(|line| line.starts_with("3.")).unwrap(), "3.99\n");
}
