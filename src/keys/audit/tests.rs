#![expect(clippy::disallowed_methods, reason = "the tests damage files")]

use std::{fs, path::Path, sync::Arc};

use super::{
    files::{FILE_BYTES_MAX, number_of},
    line::{LINE_BYTES_MAX, encode_line, parse_line},
    transitions::{DETAIL_BYTES_MAX, shortened, with_count, without_count},
    *,
};
use crate::{
    Error,
    crypto::hmac_sha256,
    ids::{StoreId, hex_encode},
    io::{self, DirEntry, Disk, DiskFile, OpenMode, OsRandom, RealDisk, SystemClock},
    keys::{
        keyring::{Keyring, NewKeyring},
        service_key::ServiceKey,
    },
    sync::atomic::Ordering,
};

fn log(dir: &Path, file_bytes_max: u64) -> AuditLog {
    log_on(Arc::new(RealDisk), dir, file_bytes_max)
}

fn log_on(disk: Arc<dyn Disk>, dir: &Path, file_bytes_max: u64) -> AuditLog {
    let keyring = Keyring::for_tests(&dir.join("keyring"), StoreId::from_bytes([1; 16]));
    let keyring = ServiceKey::for_tests(keyring);
    let (clock, counters) = (Arc::new(SystemClock), Arc::default());
    AuditLog::new(disk, clock, keyring, dir.to_owned(), file_bytes_max, counters, None)
}

/// The log as the next opener finds it, whose catalogue remembers `known`.
fn reopened(log: &AuditLog, known: &AuditHead) -> AuditLog {
    let log = log.reopened();
    log.find_end(known).unwrap();
    log
}

fn details(records: &[AuditRecord]) -> Vec<&str> {
    records.iter().map(|record| record.detail.as_str()).collect()
}

#[test]
fn the_chain_goes_on_over_files_and_openings() {
    let dir = tempfile::tempdir().unwrap();
    let mut audit = log(dir.path(), 700);
    for n in 0..20 {
        if n % 6 == 0 {
            audit = reopened(&audit, &audit.head());
        }
        audit.record(AuditEvent::Rotated, None, n.to_string()).unwrap();
    }
    assert!(audit.files().names().unwrap().len() > 3);
    let records = audit.verified(&[&audit.head(), &AuditHead::default()]).unwrap();
    assert_eq!(records.len(), 20);
    assert!(records.iter().enumerate().all(|(n, record)| record.detail == n.to_string()));
    // Another log that is as long or longer, and one that was longer.
    for number in [1, 20] {
        let other = AuditHead { number, tag: "5a".repeat(32) };
        assert!(matches!(audit.verified(&[&other]), Err(Error::RolledBack { .. })), "{number}");
    }
    let longer = AuditHead { number: 21, tag: "5a".repeat(32) };
    assert!(matches!(audit.verified(&[&longer]), Err(Error::Truncated { .. })));
}

#[test]
fn every_change_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let audit = log(dir.path(), 1 << 20);
    for n in 0..3 {
        audit.record(AuditEvent::Created, None, n.to_string()).unwrap();
    }
    let (head, path) = (audit.head(), audit.files().path(1));
    let good = fs::read(&path).unwrap();
    let check = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        audit.verified(&[&head])
    };
    for byte in 0..good.len() {
        let mut bad = good.clone();
        bad[byte] ^= 0x10;
        assert!(check(&bad).is_err(), "byte {byte}");
        assert!(
            matches!(check(&good[..byte]), Err(Error::Truncated { .. } | Error::Corrupt { .. })),
            "cut at {byte}"
        );
    }
    // A record taken out, two swapped, and one altered along with its CRC.
    let lines: Vec<&[u8]> = good.split_inclusive(|&byte| byte == b'\n').collect();
    assert!(matches!(check(&[lines[0], lines[2]].concat()), Err(Error::Tampered { .. })));
    assert!(matches!(check(&[lines[1], lines[0], lines[2]].concat()), Err(Error::Tampered { .. })));
    let text = std::str::from_utf8(lines[2]).unwrap().trim_end();
    let (body, _) = text.rsplit_once('\t').unwrap();
    let forged = body.replace("created", "rotated");
    let forged = format!("{forged}\t{:08x}\n", crc32fast::hash(forged.as_bytes()));
    assert!(matches!(
        check(&[lines[0], lines[1], forged.as_bytes()].concat()),
        Err(Error::Tampered { .. })
    ));
    // The records in front of the damage are sound, and are handed out.
    for damaged in 0..3 {
        let mut bad = good.clone();
        bad[lines[..damaged].concat().len() + 5] ^= 1;
        fs::write(&path, bad).unwrap();
        for heads in [&[][..], &[&head]] {
            let mut sound = 0;
            let walked = audit.walk(heads, &mut |_| sound += 1);
            assert!(
                matches!(walked, Err(Error::Corrupt { .. })) || (damaged == 2 && heads.is_empty()),
                "{walked:?}"
            );
            assert_eq!(sound, damaged);
        }
    }
    assert_eq!(check(&good).unwrap().len(), 3);
}

#[test]
fn a_torn_record_is_cut_off_and_the_chain_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let audit = log(dir.path(), 1 << 20);
    audit.record(AuditEvent::Created, None, "kept").unwrap();
    let path = audit.files().path(1);
    let mut torn = fs::read(&path).unwrap();
    torn.extend_from_slice(b"{\"number\":2,\"time");
    // It may be longer than the record that comes in its place.
    torn.resize(4096, b' ');
    fs::write(&path, torn).unwrap();
    let audit = reopened(&audit, &audit.head());
    audit.record(AuditEvent::Deleted, None, "after").unwrap();
    assert_eq!(details(&audit.verified(&[]).unwrap()), ["kept", "after"]);
    assert!(fs::read(&path).unwrap().ends_with(b"\n"), "nothing of it is left");
}

#[test]
fn a_detail_of_any_length_leaves_a_log_that_can_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let audit = log(dir.path(), 1 << 20);
    // Characters that JSON writes in six bytes, and a character that the limit cuts.
    let long = ["\u{1}".repeat(100_000), format!("{}€", "x".repeat(DETAIL_BYTES_MAX - 1))];
    for detail in &long {
        audit.record(AuditEvent::Created, None, detail.clone()).unwrap();
    }
    let records = reopened(&audit, &audit.head()).verified(&[&audit.head()]).unwrap();
    assert_eq!(records.len(), 2);
    assert!(records.iter().zip(&long).all(|(record, detail)| {
        let kept = record.detail.strip_suffix('…').unwrap();
        detail.starts_with(kept) && kept.len() > DETAIL_BYTES_MAX - 4
    }));
    let longest = "x".repeat(DETAIL_BYTES_MAX);
    assert_eq!(shortened(longest.clone()), longest);
}

#[test]
fn a_line_is_read_up_to_the_limit_and_no_further() {
    let dir = tempfile::tempdir().unwrap();
    let audit = log(dir.path(), 1 << 20);
    audit.record(AuditEvent::Created, None, "x").unwrap();
    let json = audit.files().lines(1).unwrap().lines.remove(0).json;
    let padded = |len: usize| {
        let shorter = encode_line(&json, "").len() - 1;
        encode_line(&json.replace("\"x\"", &format!("\"x{}\"", "y".repeat(len - shorter))), "")
    };
    for (len, read) in
        [(LINE_BYTES_MAX, true), (LINE_BYTES_MAX + 1, false), (LINE_BYTES_MAX + 2, false)]
    {
        let line = padded(len);
        let line = line.trim_end().as_bytes();
        assert_eq!((line.len(), parse_line(line, 0).is_some()), (len, read));
    }
}

#[test]
fn what_is_known_of_it_is_found_in_whichever_file() {
    let dir = tempfile::tempdir().unwrap();
    let audit = log(dir.path(), 700);
    let mut heads = vec![AuditHead::default()];
    for n in 0..16 {
        audit.record(AuditEvent::Rotated, None, n.to_string()).unwrap();
        heads.push(audit.head());
    }
    let end = audit.head();
    assert!(audit.files().names().unwrap().len() > 3);
    let found = |known: &AuditHead| {
        let again = reopened(&audit, known);
        assert_eq!((again.head(), again.head_after(known)), (end.clone(), end.clone()));
    };
    heads.iter().for_each(found);
    // A crash left a new file behind that has nothing in it yet.
    fs::write(audit.files().path(audit.files().names().unwrap().len() as u32 + 1), b"").unwrap();
    heads.iter().for_each(found);
    // The log goes on, and the missing records stay missing.
    for number in [1, 8, 16, 17] {
        let missing = AuditHead { number, tag: "5a".repeat(32) };
        let again = reopened(&audit, &missing);
        assert_eq!((again.head(), again.head_after(&missing)), (end.clone(), missing));
    }
    // Files before the known record are not read.
    let mut damaged = fs::read(audit.files().path(1)).unwrap();
    damaged[5] ^= 1;
    fs::write(audit.files().path(1), damaged).unwrap();
    heads[15..].iter().for_each(found);
}

#[test]
fn the_files_before_show_whether_a_damaged_first_record_existed() {
    let dir = tempfile::tempdir().unwrap();
    let audit = log(dir.path(), 1);
    audit.record(AuditEvent::Created, None, "kept").unwrap();
    let known = audit.head();
    // A crash lost a part of a record that was not acknowledged.
    fs::write(audit.files().path(2), b"{\"number\":2,\0\0\0\n").unwrap();
    let again = reopened(&audit, &known);
    assert_eq!((again.head(), again.head_after(&known)), (known.clone(), known.clone()));
    again.record(AuditEvent::Deleted, None, "after").unwrap();
    assert_eq!(details(&again.verified(&[&known]).unwrap()), ["kept", "after"]);
    assert_eq!(
        fs::read(audit.files().path(2)).unwrap(),
        b"{\"number\":2,\0\0\0\n",
        "it is no file of the log"
    );
    // A file that was there before stays as it is, for verification to find.
    let damaged = b"{\"number\":1,\0\0\0\n";
    fs::write(audit.files().path(1), damaged).unwrap();
    fs::remove_file(audit.files().path(2)).unwrap();
    fs::remove_file(audit.files().path(3)).unwrap();
    let again = reopened(&audit, &known);
    assert_eq!(again.head(), known);
    again.record(AuditEvent::Deleted, None, "after").unwrap();
    assert_eq!(fs::read(audit.files().path(1)).unwrap(), damaged);
    assert!(matches!(again.verified(&[&known]), Err(Error::Corrupt { .. })));
}

#[test]
fn a_name_is_that_of_one_number() {
    for (name, number) in [
        ("audit-000001.log", Some(1)),
        ("audit-999999.log", Some(999_999)),
        ("audit-1000000.log", Some(1_000_000)),
        ("audit-4294967295.log", Some(u32::MAX)),
        ("audit-000000.log", None),
        ("audit-1.log", None),
        ("audit-00001.log", None),
        ("audit-0000001.log", None),
        ("audit-+00001.log", None),
        ("audit-+2.log", None),
        ("audit--00001.log", None),
        ("audit-4294967296.log", None),
        ("audit-000001.LOG", None),
        ("audit-000001.log.tmp", None),
        ("audit-００００01.log", None),
        ("audit-.log", None),
    ] {
        assert_eq!(number_of(name), number, "{name}");
    }
}

#[test]
fn a_count_is_told_from_the_detail_before_it() {
    for detail in ["", "disabled", "unreachable: no answer; try again", "a; 3 transitions"] {
        for left_out in [0, 1, 2, 12, u64::MAX] {
            assert_eq!(without_count(&with_count(detail, left_out)), detail);
        }
    }
    // A detail of the KMS that reads like a count is no count.
    let forged = shortened(with_count("unreachable: x", 7));
    assert_eq!(without_count(&forged), forged);
    assert_eq!(without_count(&with_count(&forged, 2)), forged);
}

/// The end of a file that may not be cut, as other names of it show, stays torn; the log goes on in
/// the next file.
#[test]
fn a_torn_end_is_no_fault_where_the_next_file_goes_on_behind_it() {
    let dir = tempfile::tempdir().unwrap();
    let audit = log(dir.path(), 1 << 20);
    for detail in ["one", "two"] {
        audit.record(AuditEvent::Created, None, detail).unwrap();
    }
    let good = fs::read(audit.files().path(1)).unwrap();
    for torn in [&b"{\"number\":3,\"time"[..], b"{\"number\":3,\0\0\0\n"] {
        fs::write(audit.files().path(1), [&good[..], torn].concat()).unwrap();
        let again = reopened(&audit, &audit.head());
        again.begin_new_file();
        again.record(AuditEvent::Deleted, None, "three").unwrap();
        assert_eq!(fs::read(audit.files().path(1)).unwrap(), [&good[..], torn].concat());
        let records = reopened(&again, &audit.head()).verified(&[&again.head()]).unwrap();
        assert_eq!(details(&records), ["one", "two", "three"]);
        // Without the next file the record is missing, and without the end of the second one too.
        fs::remove_file(audit.files().path(2)).unwrap();
        assert!(audit.verified(&[&again.head()]).is_err());
    }
    // A record that is missing between two files is one that the first of them had.
    let again = reopened(&audit, &audit.head());
    again.begin_new_file();
    again.record(AuditEvent::Deleted, None, "three").unwrap();
    let first = good.iter().position(|&byte| byte == b'\n').unwrap() + 1;
    for (end, is_right) in [
        (first + 9, (|error| matches!(error, Error::Truncated { .. })) as fn(&Error) -> bool),
        (first, |error| matches!(error, Error::Tampered { .. })),
    ] {
        fs::write(audit.files().path(1), &good[..end]).unwrap();
        let error = audit.verified(&[]).unwrap_err();
        assert!(is_right(&error), "{error}");
    }
}

/// Records of any number, written without the key, make no opening fail and no number overflow.
#[test]
fn forged_numbers_end_in_no_overflow() {
    for number in [0, 2, 3, u64::MAX - 1, u64::MAX] {
        let dir = tempfile::tempdir().unwrap();
        let audit = log(dir.path(), 1 << 20);
        audit.record(AuditEvent::Created, None, "one").unwrap();
        let known = audit.head();
        let json = audit.files().lines(1).unwrap().lines.remove(0).json;
        let json = json.replace("\"number\":1,", &format!("\"number\":{number},"));
        let forged = encode_line(&json, &"5a".repeat(32));
        for path in [audit.files().path(2), audit.files().path(1)] {
            fs::write(path, forged.repeat(2)).unwrap();
            for known in
                [known.clone(), AuditHead::default(), AuditHead { number: 5, ..known.clone() }]
            {
                let again = reopened(&audit, &known);
                again.record(AuditEvent::Deleted, None, "after").unwrap();
                assert!(again.verified(&[&known]).is_err(), "{number}");
            }
        }
    }
}

/// A record that a writer without the key can make: another number, a tag that does not hold.
fn forged(audit: &AuditLog, number: u64) -> String {
    let json = audit.files().lines(1).unwrap().lines.remove(0).json;
    encode_line(&json.replace("\"number\":1,", &format!("\"number\":{number},")), &"5a".repeat(32))
}

/// The log does not continue behind a forged record. It is sound again when the record is gone.
#[test]
fn what_was_forged_leaves_no_trace_when_it_is_removed() {
    for (number, appended) in
        [(2, false), (7, false), (u64::MAX, false), (2, true), (3, true), (7, true)]
    {
        let dir = tempfile::tempdir().unwrap();
        let audit = log(dir.path(), 1 << 20);
        audit.record(AuditEvent::Created, None, "one").unwrap();
        let known = audit.head();
        let good = fs::read(audit.files().path(1)).unwrap();
        let line = forged(&audit, number).into_bytes();
        if appended {
            fs::write(audit.files().path(1), [&good[..], &line].concat()).unwrap();
        } else {
            fs::write(audit.files().path(2), &line).unwrap();
        }
        let again = reopened(&audit, &known);
        again.record(AuditEvent::Deleted, None, "two").unwrap();
        assert_eq!(again.head().number, 2, "{number} {appended}");
        assert!(again.verified(&[&known]).is_err(), "{number} {appended}");
        if appended {
            fs::write(audit.files().path(1), &good).unwrap();
        } else {
            fs::remove_file(audit.files().path(2)).unwrap();
        }
        let again = reopened(&audit, &known);
        again.record(AuditEvent::Deleted, None, "three").unwrap();
        let records = again.verified(&[&known, &again.head()]).unwrap();
        assert_eq!(details(&records), ["one", "two", "three"], "{number} {appended}");
    }
}

/// A disk that counts the bytes that are read from it.
#[derive(Debug)]
struct Counting(Arc<std::sync::atomic::AtomicU64>);

#[derive(Debug)]
struct CountingFile(Arc<dyn DiskFile>, Arc<std::sync::atomic::AtomicU64>);

impl Disk for Counting {
    fn beneath(&self, dir: &Path, access: io::Access) -> std::io::Result<Arc<dyn Disk>> {
        RealDisk.beneath(dir, access)
    }

    fn open(&self, path: &Path, mode: OpenMode) -> std::io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(CountingFile(RealDisk.open(path, mode)?, Arc::clone(&self.0))))
    }

    fn rename(&self, from: &Path, to: &Path) -> std::io::Result<()> {
        RealDisk.rename(from, to)
    }

    fn rename_new(&self, from: &Path, to: &Path) -> std::io::Result<()> {
        RealDisk.rename_new(from, to)
    }

    fn remove_file(&self, path: &Path) -> std::io::Result<()> {
        RealDisk.remove_file(path)
    }

    fn create_dir(&self, path: &Path) -> std::io::Result<()> {
        RealDisk.create_dir(path)
    }

    fn remove_dir(&self, path: &Path) -> std::io::Result<()> {
        RealDisk.remove_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> std::io::Result<()> {
        RealDisk.sync_dir(path)
    }

    fn list_dir(&self, path: &Path) -> std::io::Result<Vec<DirEntry>> {
        RealDisk.list_dir(path)
    }

    fn stat(&self, path: &Path) -> std::io::Result<Option<io::FileStat>> {
        RealDisk.stat(path)
    }
}

impl DiskFile for CountingFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
        let read = self.0.read_at(buf, offset)?;
        self.1.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> std::io::Result<()> {
        self.0.write_at(buf, offset)
    }

    fn sync_data(&self) -> std::io::Result<()> {
        self.0.sync_data()
    }

    fn len(&self) -> std::io::Result<u64> {
        self.0.len()
    }

    fn stat(&self) -> std::io::Result<io::FileStat> {
        self.0.stat()
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.0.set_len(len)
    }

    fn try_lock(&self) -> std::io::Result<bool> {
        self.0.try_lock()
    }

    fn map(&self) -> std::io::Result<io::Map> {
        self.0.map()
    }
}

/// Large files that cost an attacker nothing, such as sparse files and hard links, cost the opening
/// little.
#[test]
fn an_opening_reads_little_of_files_that_hold_little() {
    const FILES: u32 = 16;
    let dir = tempfile::tempdir().unwrap();
    let bytes_read = Arc::default();
    let audit = log_on(Arc::new(Counting(Arc::clone(&bytes_read))), dir.path(), 1 << 20);
    audit.record(AuditEvent::Created, None, "one").unwrap();
    let first = fs::read(audit.files().path(1)).unwrap();
    while fs::metadata(audit.files().path(1)).unwrap().len() < 256 << 10 {
        audit.record(AuditEvent::Deleted, None, "x".repeat(DETAIL_BYTES_MAX)).unwrap();
    }
    let known = audit.head();
    for number in 0..FILES {
        fs::hard_link(audit.files().path(1), audit.files().path(100 + number)).unwrap();
        let forged = forged(&audit, known.number).replace("5a5a", &format!("{number:04x}"));
        let forged = parse_forged(&forged);
        for (at, begin) in [(200, &first), (300, &forged)] {
            fs::write(audit.files().path(at + number), begin).unwrap();
            let file =
                RealDisk.open(&audit.files().path(at + number), OpenMode::ReadWrite).unwrap();
            file.set_len(FILE_BYTES_MAX).unwrap();
        }
    }
    bytes_read.store(0, Ordering::Relaxed);
    let again = reopened(&audit, &known);
    assert_eq!(again.head(), known);
    let read = bytes_read.load(Ordering::Relaxed);
    let (genuine, each) =
        (fs::metadata(audit.files().path(1)).unwrap().len(), 4 * LINE_BYTES_MAX as u64);
    assert!(read <= 4 * genuine + u64::from(3 * FILES) * each, "{read} bytes were read");
    again.record(AuditEvent::Deleted, None, "after").unwrap();
}

/// A forged line whose tag was changed, with the CRC32 that it must have.
fn parse_forged(line: &str) -> Vec<u8> {
    let mut parts = line.split('\t');
    encode_line(parts.next().unwrap(), parts.next().unwrap()).into_bytes()
}

/// Rotates the service key of a log, and retires the older version if so told.
fn rotate(log: &AuditLog, retires: bool) {
    let change = |make: fn(&Keyring) -> crate::Result<NewKeyring>| {
        let change = log.service().change();
        change.put(change.prepare(make).unwrap()).unwrap();
    };
    change(|keyring| keyring.add_version(&OsRandom, 1));
    if retires {
        change(|keyring| keyring.retire_older(&OsRandom));
    }
}

/// Appends a record to the first file as a holder of version 1 of the service key does. Returns
/// where the log is then.
fn forge(log: &AuditLog, behind: &AuditHead) -> AuditHead {
    let record = AuditRecord {
        number: behind.number + 1,
        time_us: 1,
        event: AuditEvent::Deleted,
        logstore: None,
        logstore_id: None,
        detail: "forged".to_owned(),
        keyring_version: 1,
    };
    let json = serde_json::to_string(&record).unwrap();
    let key = log.service().keyring().audit_key(1).unwrap();
    let tag = hex_encode(&hmac_sha256(&key, &[behind.tag.as_bytes(), json.as_bytes()]));
    let file =
        [&fs::read(log.files().path(1)).unwrap()[..], encode_line(&json, &tag).as_bytes()].concat();
    fs::write(log.files().path(1), file).unwrap();
    AuditHead { number: record.number, tag }
}

#[test]
fn retired_records_are_valid_only_before_an_accepted_one() {
    let dir = tempfile::tempdir().unwrap();
    let audit = log(dir.path(), 1 << 20);
    audit.record(AuditEvent::Created, None, "old").unwrap();
    let known = audit.head();
    rotate(&audit, true);
    let refused = audit.verified(&[&known]);
    assert!(
        matches!(refused, Err(Error::RetiredKeyVersion { version: 1, accepts: 2, .. })),
        "{refused:?}"
    );
    // The log does not continue behind a record that is forged behind the known one.
    let good = fs::read(audit.files().path(1)).unwrap();
    let forged = forge(&audit, &known);
    assert!(audit.verified(&[&known]).is_err());
    let next = reopened(&audit, &known);
    assert_eq!((next.head(), next.follows()), (known.clone(), false));
    assert_ne!(next.head(), forged);
    fs::write(audit.files().path(1), good).unwrap();
    let audit = reopened(&audit, &known);
    audit.record(AuditEvent::ServiceRotated, None, "new").unwrap();
    assert_eq!(details(&audit.verified(&[&known, &audit.head()]).unwrap()), ["old", "new"]);
}

#[test]
fn the_version_of_the_service_key_never_goes_back() {
    for retires in [false, true] {
        for new_file in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let audit = log(dir.path(), if new_file { 1 } else { 1 << 20 });
            audit.record(AuditEvent::Created, None, "old").unwrap();
            rotate(&audit, retires);
            audit.record(AuditEvent::Rotated, None, "new").unwrap();
            let head = audit.head();
            let first = fs::read(audit.files().path(1)).unwrap();
            forge(&audit, &head);
            if new_file {
                // Each record has a file of its own.
                let all = fs::read(audit.files().path(1)).unwrap();
                fs::write(audit.files().path(1), &first).unwrap();
                fs::write(audit.files().path(3), &all[first.len()..]).unwrap();
            }
            let refused = audit.verified(&[&head]);
            assert!(matches!(refused, Err(Error::Tampered { .. })), "{refused:?}");
            assert_eq!(
                reopened(&audit, &head).head(),
                head,
                "retires: {retires}, new file: {new_file}"
            );
        }
    }
}
