//! A handle inherited through `fork` is refused: a child must not write to the parent's files under
//! the same nonces.

#![allow(clippy::unwrap_used)]

mod common;

use std::{os::unix::process::CommandExt, process::Command};

use common::*;
use envelog::{Error, Position, ReadOptions};

#[test]
fn handles_refuse_in_a_forked_child_and_go_on_in_the_parent() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    put(&logstore, "before");
    let reader = logstore.read(0, &ReadOptions::default().from(Position::Begin)).unwrap();
    let (in_child, files_before) = ((store.clone(), logstore.clone()), files(&world.store_dir()));
    let mut reader_in_child = reader;
    let mut child = Command::new("true");
    // The store has no background threads (`Background::Manual`) and no other thread uses it, so no
    // thread that is gone can hold one of its locks. The closure does not print, and the child ends
    // with its return value. SAFETY: the closure runs in a forked child, which contains only the
    // forking thread. It takes no lock that another thread held, and the C library keeps its
    // allocator usable across `fork`.
    unsafe {
        child.pre_exec(move || {
            let (store, logstore) = &in_child;
            let answers = [
                logstore.append(record("child"), &synced()).err(),
                logstore.submit(record("child"), &buffered()).err(),
                logstore.read(0, &ReadOptions::default()).err(),
                reader_in_child.next().and_then(Result::err),
                store.logstore(&name("p/l")).err(),
                store.create_logstore(&name("p/child"), envelog::LogstoreSpec::default()).err(),
                store.keys().rotate_data_key(&name("p/l")).err(),
                store.delete_logstore(&name("p/l")).err(),
                store.admin().apply_retention().err(),
                store.admin().checkpoint().err(),
            ];
            let wrong = answers.iter().position(|answer| !matches!(answer, Some(Error::Forked)));
            // The error number tells the parent which operation did not refuse: it is the only
            // value that reaches the parent.
            wrong.map_or(Ok(()), |wrong| Err(std::io::Error::from_raw_os_error(100 + wrong as i32)))
        });
    }
    let status = child.status().unwrap_or_else(|error| {
        panic!("not refused: answer {}", error.raw_os_error().unwrap() - 100)
    });
    assert!(status.success());
    assert_eq!(files(&world.store_dir()), files_before, "the child has written nothing");
    drop(child);
    // The parent continues, and the child has not released its lock.
    put(&logstore, "after");
    assert_eq!(texts(&logstore), ["before", "after"]);
    assert!(matches!(world.builder().open(), Err(Error::Locked { .. })));
    drop(logstore);
    store.close().unwrap();
    assert_eq!(texts(&world.open().logstore(&name("p/l")).unwrap()), ["before", "after"]);
}
