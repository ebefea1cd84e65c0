#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::disallowed_types)]

use std::{
    fmt, fs,
    os::unix::fs::PermissionsExt,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use proptest::prelude::*;

use super::{
    admin::NAME_BYTES_MAX,
    files::{LOCK_PAUSE, file_head},
    key::KEY_FILE_BYTES_MAX,
    *,
};
use crate::kms::{EncryptionContext, KmsRouter};

const REGION: &str = "cn-hangzhou";
const ROLE: &str = "acs:ram::13234:role/logsource";
const DATA_KEY: [u8; 32] = [0xd5; 32];

#[derive(Debug, Default)]
struct TestClock(AtomicU64);

impl TestClock {
    fn set_day(&self, day: u64) {
        self.0.store(day * DAY_US, Ordering::Relaxed);
    }
}

impl Clock for TestClock {
    fn wall_us(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn uptime(&self) -> Duration {
        Duration::from_micros(self.wall_us())
    }
}

/// Returns 0, 1, 2, ...: every output is known.
#[derive(Debug, Default)]
struct Counting(AtomicU64);

impl Random for Counting {
    fn fill(&self, buf: &mut [u8]) -> io::Result<()> {
        buf.fill_with(|| self.0.fetch_add(1, Ordering::Relaxed).to_le_bytes()[0]);
        Ok(())
    }
}

struct Setup {
    temporary: tempfile::TempDir,
    kms: LocalKms,
    cmk: Cmk,
    context: EncryptionContext,
}

fn context(pairs: &[(&str, &str)]) -> EncryptionContext {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

impl Setup {
    fn new() -> Self {
        Self::with(|kms| kms)
    }

    fn with(adjust: impl FnOnce(LocalKms) -> LocalKms) -> Self {
        let temporary = tempfile::tempdir().unwrap();
        let kms = adjust(LocalKms::create_or_open(temporary.path().join("kms")).unwrap());
        let cmk_key_id = kms.create_key(REGION, &[ROLE]).unwrap();
        let cmk = Cmk { cmk_key_id, arn: ROLE.to_owned(), region_id: REGION.to_owned() };
        Self { temporary, kms, cmk, context: context(&[("store", "s1"), ("logstore", "l1")]) }
    }

    fn id(&self) -> &str {
        &self.cmk.cmk_key_id
    }

    fn call(&self) -> KmsCall<'_> {
        KmsCall { cmk: &self.cmk, context: &self.context, timeout: Duration::from_secs(1) }
    }

    fn wrap(&self) -> Result<Vec<u8>, KmsError> {
        self.kms.wrap(&self.call(), &SecretKey::from_bytes(&mut DATA_KEY.clone()))
    }

    fn unwrap(&self, wrapped: &[u8]) -> Result<[u8; 32], KmsError> {
        self.kms.unwrap(&self.call(), wrapped).map(|key| *key.expose())
    }

    fn state(&self) -> LocalKeyState {
        self.info().state
    }

    fn info(&self) -> LocalKeyInfo {
        self.kms.list().unwrap().into_iter().find(|key| key.key_id == self.id()).unwrap()
    }

    /// Both operations are refused for this reason.
    #[track_caller]
    fn assert_revoked(&self, wrapped: &[u8], expected: RevokedReason) {
        for error in [self.wrap().unwrap_err(), self.unwrap(wrapped).unwrap_err()] {
            assert!(
                matches!(&error, KmsError::Revoked { reason, .. } if *reason == expected),
                "{error:?}"
            );
        }
    }
}

#[track_caller]
fn assert_invalid<T: fmt::Debug>(result: Result<T, KmsError>) {
    assert!(matches!(result, Err(KmsError::Invalid { .. })), "{result:?}");
}

#[track_caller]
fn assert_unreachable<T: fmt::Debug>(result: Result<T, KmsError>) {
    assert!(matches!(result, Err(KmsError::Unreachable { .. })), "{result:?}");
}

#[track_caller]
fn assert_wrong_state(result: Result<(), LocalKmsError>, expected: LocalKeyState) {
    assert!(
        matches!(&result, Err(LocalKmsError::WrongState { state, .. }) if *state == expected),
        "{result:?}"
    );
}

#[test]
fn wraps_and_unwraps() {
    let setup = Setup::new();
    let (first, second) = (setup.wrap().unwrap(), setup.wrap().unwrap());
    assert_ne!(first, second, "each wrap has a salt of its own");
    assert_eq!(first.len(), 112);
    assert_eq!(setup.unwrap(&first).unwrap(), DATA_KEY);
    assert_eq!(setup.unwrap(&second).unwrap(), DATA_KEY);
    assert_eq!(setup.kms.name(), "local");
}

#[test]
fn bytes_are_as_documented() {
    let clock = Arc::new(TestClock(AtomicU64::new(1_000_000)));
    let setup = Setup::with(|kms| {
        LocalKms { random: Arc::new(Counting::default()), ..kms }.with_clock(clock)
    });
    // Another implementation of CRC-32, HKDF and AES-GCM computed both.
    let file = concat!(
        r#"{"crc32":"4a90f9b6","key":{"key_id":"key-0001020304050607","region_id":"cn-hangzhou","created_us":1000000,"#,
        r#""disabled":false,"deletion_day":null,"grants":["acs:ram::13234:role/logsource"],"#,
        r#""material":["08090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f2021222324252627"]}}"#,
        "\n"
    );
    assert_eq!(fs::read_to_string(setup.kms.key_path(setup.id())).unwrap(), file);
    let wrapped = setup.wrap().unwrap();
    let hex: String = wrapped.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(
        hex,
        concat!(
            "454c4b57010014006b65792d3030303130323033303430353036303701000000",
            "28292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f4041424344454647",
            "3c6262224650014d62126b3da073c2ed03b59810679368f6d3dfcb908c6c29eb",
            "dde00771b04a4c3679de73a62ed9e2bb",
        )
    );
    assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
}

#[test]
fn a_wrapped_key_of_another_bit_or_length_is_invalid() {
    let setup = Setup::new();
    let wrapped = setup.wrap().unwrap();
    for bit in 0..wrapped.len() * 8 {
        let mut changed = wrapped.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert_invalid(setup.unwrap(&changed));
    }
    for len in 0..wrapped.len() {
        assert_invalid(setup.unwrap(&wrapped[..len]));
    }
    assert_invalid(setup.unwrap(&[wrapped.as_slice(), &[0]].concat()));
}

#[test]
fn the_context_and_the_key_are_bound() {
    let mut setup = Setup::new();
    let wrapped = setup.wrap().unwrap();
    for other in [
        context(&[]),
        context(&[("store", "s1")]),
        context(&[("store", "s1"), ("logstore", "l2")]),
        context(&[("store", "l1"), ("logstore", "s1")]),
        context(&[("store", "s1"), ("logstore", "l1"), ("suite", "")]),
        // The same text, split elsewhere.
        context(&[("stores", "1"), ("logstore", "l1")]),
    ] {
        let call = KmsCall { context: &other, ..setup.call() };
        assert_invalid(setup.kms.unwrap(&call, &wrapped));
    }
    assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
    setup.cmk.cmk_key_id = setup.kms.create_key(REGION, &[ROLE]).unwrap();
    assert_invalid(setup.unwrap(&wrapped));
}

#[test]
fn disabled_and_enabled_again() {
    let setup = Setup::new();
    let wrapped = setup.wrap().unwrap();
    for _ in 0..2 {
        setup.kms.disable(setup.id()).unwrap();
        assert_eq!(setup.state(), LocalKeyState::Disabled);
        setup.assert_revoked(&wrapped, RevokedReason::Disabled);
    }
    assert_wrong_state(setup.kms.rotate(setup.id()), LocalKeyState::Disabled);
    assert_wrong_state(setup.kms.cancel_deletion(setup.id()), LocalKeyState::Disabled);
    for _ in 0..2 {
        setup.kms.enable(setup.id()).unwrap();
        assert_eq!(setup.state(), LocalKeyState::Enabled);
        assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
    }
    assert_wrong_state(setup.kms.cancel_deletion(setup.id()), LocalKeyState::Enabled);
}

#[test]
fn pending_deletion_can_be_cancelled() {
    let clock = Arc::new(TestClock::default());
    clock.set_day(20_000);
    let setup = Setup::with(|kms| kms.with_clock(clock.clone()));
    let wrapped = setup.wrap().unwrap();
    for before in [LocalKeyState::Enabled, LocalKeyState::Disabled] {
        if before == LocalKeyState::Disabled {
            setup.kms.disable(setup.id()).unwrap();
        }
        setup.kms.schedule_deletion(setup.id(), 7).unwrap();
        let pending = LocalKeyState::PendingDeletion { day: 20_007 };
        assert_eq!(setup.state(), pending);
        assert_eq!(setup.info().deletion_day, Some(20_007));
        setup.assert_revoked(&wrapped, RevokedReason::PendingDeletion);
        assert_wrong_state(setup.kms.enable(setup.id()), pending);
        assert_wrong_state(setup.kms.disable(setup.id()), pending);
        assert_wrong_state(setup.kms.rotate(setup.id()), pending);
        assert_wrong_state(setup.kms.schedule_deletion(setup.id(), 8), pending);
        setup.kms.cancel_deletion(setup.id()).unwrap();
        assert_eq!(setup.state(), before);
        assert_eq!(setup.info().deletion_day, None);
    }
    setup.kms.enable(setup.id()).unwrap();
    assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
    for days in [0, 367, u32::MAX] {
        let refused = setup.kms.schedule_deletion(setup.id(), days);
        assert!(matches!(refused, Err(LocalKmsError::InvalidArgument { .. })), "{refused:?}");
    }
}

#[test]
fn the_clock_deletes_and_the_next_change_destroys() {
    let clock = Arc::new(TestClock::default());
    clock.set_day(20_000);
    let setup = Setup::with(|kms| kms.with_clock(clock.clone()));
    let other = setup.kms.create_key("cn-beijing", &[]).unwrap();
    let wrapped = setup.wrap().unwrap();
    setup.kms.schedule_deletion(setup.id(), 1).unwrap();
    clock.0.store(20_001 * DAY_US - 1, Ordering::Relaxed);
    setup.assert_revoked(&wrapped, RevokedReason::PendingDeletion);
    clock.set_day(20_001);
    setup.assert_revoked(&wrapped, RevokedReason::Deleted);
    assert_eq!((setup.state(), setup.info().versions), (LocalKeyState::Deleted, 1));
    // Too late. That attempt is the change that destroys the material.
    assert_wrong_state(setup.kms.cancel_deletion(setup.id()), LocalKeyState::Deleted);
    assert_eq!((setup.state(), setup.info().versions), (LocalKeyState::Deleted, 0));
    // Setting the clock back brings nothing back. A change of another key destroys material too.
    clock.set_day(20_000);
    assert_eq!(setup.state(), LocalKeyState::Deleted);
    let third = setup.kms.create_key("cn-beijing", &[]).unwrap();
    setup.kms.schedule_deletion(&other, 2).unwrap();
    clock.set_day(20_002);
    setup.kms.grant(&third, ROLE).unwrap();
    let file = fs::read_to_string(setup.kms.key_path(&other)).unwrap();
    assert!(file.contains(r#""material":[]"#), "{file}");
}

#[test]
fn deleted_is_final() {
    let setup = Setup::new();
    let wrapped = setup.wrap().unwrap();
    setup.kms.disable(setup.id()).unwrap();
    setup.kms.delete(setup.id()).unwrap();
    setup.assert_revoked(&wrapped, RevokedReason::Deleted);
    let info = setup.info();
    assert_eq!((info.state, info.versions), (LocalKeyState::Deleted, 0));
    assert_eq!(info.deletion_day, Some(setup.kms.today()));
    for refused in [
        setup.kms.enable(setup.id()),
        setup.kms.disable(setup.id()),
        setup.kms.rotate(setup.id()),
        setup.kms.schedule_deletion(setup.id(), 7),
        setup.kms.cancel_deletion(setup.id()),
        setup.kms.delete(setup.id()),
        setup.kms.grant(setup.id(), ROLE),
        setup.kms.ungrant(setup.id(), ROLE),
    ] {
        assert_wrong_state(refused, LocalKeyState::Deleted);
    }
    assert!(setup.kms.serves(REGION), "so that a call can say that the key is deleted");
}

#[test]
fn grants_are_of_a_role_and_a_key() {
    let mut setup = Setup::new();
    let wrapped = setup.wrap().unwrap();
    let other = "acs:ram::13234:role/other";
    setup.kms.grant(setup.id(), other).unwrap();
    setup.kms.grant(setup.id(), other).unwrap();
    assert_eq!(setup.info().grants, [ROLE, other]);
    setup.kms.ungrant(setup.id(), ROLE).unwrap();
    setup.assert_revoked(&wrapped, RevokedReason::NotPermitted);
    let again = setup.kms.ungrant(setup.id(), ROLE);
    assert!(matches!(again, Err(LocalKmsError::NotGranted { .. })), "{again:?}");
    // A role without a grant does not learn the state.
    setup.kms.disable(setup.id()).unwrap();
    setup.assert_revoked(&wrapped, RevokedReason::NotPermitted);
    setup.kms.enable(setup.id()).unwrap();
    setup.cmk.arn = other.to_owned();
    assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
    for name in ["", &"x".repeat(NAME_BYTES_MAX + 1)] {
        for refused in [
            setup.kms.grant(setup.id(), name),
            setup.kms.create_key(name, &[]).map(drop),
            setup.kms.create_key(REGION, &[name]).map(drop),
        ] {
            assert!(matches!(refused, Err(LocalKmsError::InvalidArgument { .. })), "{refused:?}");
        }
    }
}

#[test]
fn rotation_keeps_old_versions() {
    let setup = Setup::new();
    let mut wrapped = vec![setup.wrap().unwrap()];
    for versions in 2..5 {
        setup.kms.rotate(setup.id()).unwrap();
        assert_eq!(setup.info().versions, versions);
        wrapped.push(setup.wrap().unwrap());
    }
    for (blob, version) in wrapped.iter().zip(1..) {
        assert_eq!(Blob::parse(blob).unwrap().version, version);
        assert_eq!(setup.unwrap(blob).unwrap(), DATA_KEY);
    }
}

/// The answer does not depend on whether the process knew the KMS before.
#[test]
fn a_directory_whose_keys_are_all_gone_is_no_deletion() {
    let setup = Setup::new();
    let wrapped = setup.wrap().unwrap();
    let second = Setup::new();
    let router = |kms: &[&Setup]| {
        let all: Vec<Arc<dyn Kms>> = kms.iter().map(|it| Arc::new(it.kms.clone()) as _).collect();
        KmsRouter::new(&all, Duration::from_secs(9), true, Arc::new(SystemClock))
    };
    let running = router(&[&setup]).serving_or_later(REGION);
    running.unwrap(&setup.cmk, setup.context.clone(), &wrapped).unwrap();
    let path = setup.kms.key_path(setup.id());
    fs::rename(&path, away(&path)).unwrap();
    for kms in [running, router(&[&setup]).serving_or_later(REGION)] {
        let answer = kms.unwrap(&setup.cmk, setup.context.clone(), &wrapped);
        assert!(matches!(answer, Err(KmsError::Unreachable { .. })), "{answer:?}");
    }
    // Another KMS that has keys of the region can tell.
    let both = router(&[&setup, &second]).serving_or_later(REGION);
    let answer = both.unwrap(&setup.cmk, setup.context.clone(), &wrapped);
    assert!(matches!(answer, Err(KmsError::Revoked { .. })), "{answer:?}");
}

#[test]
fn unknown_keys_and_other_regions_are_deleted_keys() {
    let mut setup = Setup::new();
    let wrapped = setup.wrap().unwrap();
    assert!(setup.kms.serves(REGION));
    assert!(!setup.kms.serves("cn-beijing"));
    setup.cmk.region_id = "cn-beijing".to_owned();
    // A KMS without a key of the region is not the KMS of the region.
    assert!(matches!(setup.unwrap(&wrapped), Err(KmsError::Unreachable { .. })));
    setup.kms.create_key("cn-beijing", &[ROLE]).unwrap();
    setup.assert_revoked(&wrapped, RevokedReason::Deleted);
    setup.cmk.region_id = REGION.to_owned();
    for id in [
        "",
        "key-0000000000000000",
        "../kms",
        "key-../../../kms0000",
        "KEY-0000000000000000",
        "key-000000000000000G",
    ] {
        setup.cmk.cmk_key_id = id.to_owned();
        setup.assert_revoked(&wrapped, RevokedReason::Deleted);
        let refused = setup.kms.disable(id);
        assert!(matches!(refused, Err(LocalKmsError::NotFound { .. })), "{refused:?}");
    }
}

#[test]
fn another_handle_sees_a_change_at_its_next_call() {
    let setup = Setup::new();
    let other = LocalKms::open(setup.temporary.path().join("kms")).unwrap();
    let wrapped = setup.wrap().unwrap();
    other.disable(setup.id()).unwrap();
    setup.assert_revoked(&wrapped, RevokedReason::Disabled);
    other.enable(setup.id()).unwrap();
    assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
    other.ungrant(setup.id(), ROLE).unwrap();
    setup.assert_revoked(&wrapped, RevokedReason::NotPermitted);
    assert_eq!(other.list().unwrap(), setup.kms.list().unwrap());
}

#[test]
fn concurrent_changes_are_kept_and_never_half_seen() {
    let setup = Setup::new();
    let wrapped = setup.wrap().unwrap();
    let dir = setup.temporary.path().join("kms");
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut calls = 0;
            while !done.load(Ordering::Relaxed) {
                assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
                assert_eq!(setup.unwrap(&setup.wrap().unwrap()).unwrap(), DATA_KEY);
                calls += 1;
            }
            calls
        });
        let writers: Vec<_> = (0..4)
            .map(|writer| {
                let (dir, id) = (&dir, setup.id());
                scope.spawn(move || {
                    let kms = LocalKms::create_or_open(dir).unwrap();
                    for turn in 0..5 {
                        kms.grant(id, &format!("role-{writer}-{turn}")).unwrap();
                        kms.rotate(id).unwrap();
                        kms.create_key(REGION, &[]).unwrap();
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.join().unwrap();
        }
        done.store(true, Ordering::Relaxed);
        assert!(reader.join().unwrap() > 0);
    });
    assert_eq!(setup.info().grants.len(), 1 + 4 * 5);
    assert_eq!(setup.info().versions, 1 + 4 * 5);
    assert_eq!(setup.kms.list().unwrap().len(), 1 + 4 * 5);
}

/// This test runs itself as child processes. Each child finds its directory in the environment.
#[test]
fn processes_change_one_directory_at_once_and_no_change_is_lost() {
    const DIR: &str = "ENVELOG_TEST_KMS_DIR";
    const KEY: &str = "ENVELOG_TEST_KMS_KEY";
    const CHANGES: u32 = 10;
    if let (Some(dir), Ok(key)) = (std::env::var_os(DIR), std::env::var(KEY)) {
        let kms = LocalKms::open(dir).unwrap();
        for n in 0..CHANGES {
            kms.grant(&key, &format!("role-{}-{n}", std::process::id())).unwrap();
            kms.rotate(&key).unwrap();
        }
        return;
    }
    let setup = Setup::new();
    let wrapped = setup.wrap().unwrap();
    let mut children: Vec<_> = (0..3)
        .map(|_| {
            std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "kms::local::tests::processes_change_one_directory_at_once_and_no_change_is_lost"])
                .env(DIR, &setup.kms.dir)
                .env(KEY, setup.id())
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    while children.iter_mut().any(|child| child.try_wait().unwrap().is_none()) {
        // A call during the changes never sees half a change.
        assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
    }
    assert!(children.iter_mut().all(|child| child.wait().unwrap().success()));
    let info = setup.info();
    assert_eq!((info.grants.len() as u32, info.versions), (1 + 3 * CHANGES, 1 + 3 * CHANGES));
}

#[test]
fn several_may_create_the_directory_at_once() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path().join("kms");
    thread::scope(|scope| {
        for _ in 0..4 {
            scope
                .spawn(|| LocalKms::create_or_open(&dir).unwrap().create_key(REGION, &[]).unwrap());
        }
    });
    assert_eq!(LocalKms::open(&dir).unwrap().list().unwrap().len(), 4);
}

#[test]
fn every_changed_bit_and_every_length_of_a_key_file_shows() {
    let setup = Setup::new();
    let wrapped = setup.wrap().unwrap();
    let path = setup.kms.key_path(setup.id());
    let intact = fs::read(&path).unwrap();
    for bit in 0..intact.len() * 8 {
        let mut changed = intact.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(StoredKey::decode(&changed).is_err(), "bit {bit}");
    }
    for len in 0..intact.len() {
        assert!(StoredKey::decode(&intact[..len]).is_err(), "length {len}");
    }
    let text = String::from_utf8(intact.clone()).unwrap();
    let resealed = |from: &str, to: &str| {
        let body = text[file_head(0).len()..].strip_suffix("}\n").unwrap().replacen(from, to, 1);
        format!("{}{body}}}\n", file_head(crc32fast::hash(body.as_bytes()))).into_bytes()
    };
    let another_id = resealed(setup.id(), "key-0123456789abcdef");
    for damaged in [
        intact[1..].to_vec(),
        vec![b' '; KEY_FILE_BYTES_MAX + 1],
        // A matching checksum does not make a file valid.
        another_id,
        resealed("\"disabled\"", "\"dis\":1,\"disabled\""),
        resealed("\"material\":[\"", "\"material\":[\"0"),
        resealed("\"material\":[\"", "\"material\":[\"\\u0030"),
    ] {
        fs::write(&path, &damaged).unwrap();
        assert_invalid(setup.wrap());
        assert_invalid(setup.unwrap(&wrapped));
        for error in [setup.kms.list().unwrap_err(), setup.kms.disable(setup.id()).unwrap_err()] {
            assert!(
                matches!(&error, LocalKmsError::Damaged { file, .. } if *file == path),
                "{error:?}"
            );
        }
        assert!(!setup.kms.serves("anywhere"), "a damaged key serves no region");
        assert_eq!(fs::read(&path).unwrap(), damaged, "a damaged file is left as it is");
    }
    // Other keys stay usable and serve their region.
    assert!(!setup.kms.serves(REGION));
    let other = setup.kms.create_key(REGION, &[]).unwrap();
    setup.kms.disable(&other).unwrap();
    assert!(setup.kms.serves(REGION));
    fs::write(&path, &intact).unwrap();
    assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
}

/// Puts something in place of a key file by which no key can be read.
type Spoil = fn(&Path);

/// Each way to do so.
fn spoilers() -> Vec<(&'static str, Spoil)> {
    vec![
        ("damage", |path| fs::write(path, "damage").unwrap()),
        ("nothing in it", |path| fs::write(path, "").unwrap()),
        ("a long file", |path| fs::write(path, vec![b' '; KEY_FILE_BYTES_MAX + 1]).unwrap()),
        ("a directory", |path| fs::create_dir(path).unwrap()),
        ("a FIFO", |path| {
            rustix::fs::mkfifoat(rustix::fs::CWD, path, rustix::fs::Mode::RWXU).unwrap();
        }),
        ("a socket", |path| drop(std::os::unix::net::UnixListener::bind(path).unwrap())),
        ("a symlink to it", |path| std::os::unix::fs::symlink(away(path), path).unwrap()),
        ("a symlink to nothing", |path| std::os::unix::fs::symlink("nothing", path).unwrap()),
        ("a symlink to itself", |path| std::os::unix::fs::symlink(path, path).unwrap()),
        ("a device", |path| std::os::unix::fs::symlink("/dev/zero", path).unwrap()),
        // Root may read it all the same. `unreadable_files_concern_their_key_alone` is not root.
        ("an unreadable file", |path| {
            fs::copy(away(path), path).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(0o000)).unwrap();
        }),
    ]
}

/// Where a test puts a file or directory in the meantime.
fn away(path: &Path) -> PathBuf {
    path.with_extension("away")
}

/// Runs a call that must end soon.
fn soon<T: Send + 'static>(what: &str, call: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = std::sync::mpsc::channel();
    thread::spawn(move || sender.send(call()));
    receiver.recv_timeout(Duration::from_secs(60)).unwrap_or_else(|_| panic!("{what}: it hangs"))
}

/// Checks two embedded KMSs. In the first of them `spoil` replaces the file of one of two keys, and
/// each of the two has a region of its own.
fn check_spoilt_key(what: &'static str, spoil: Spoil) {
    let (setup, second) = (Setup::new(), Setup::new());
    let other = setup.kms.create_key("cn-beijing", &[ROLE]).unwrap();
    second.kms.create_key("eu-central-1", &[ROLE]).unwrap();
    let wrapped = setup.wrap().unwrap();
    let path = setup.kms.key_path(setup.id());
    fs::rename(&path, away(&path)).unwrap();
    spoil(&path);
    let is_root = rustix::process::geteuid().is_root();
    let still_read = what == "an unreadable file" && is_root;
    let (first, kms) = (setup.kms.clone(), second.kms.clone());
    soon(what, move || {
        assert_eq!(first.serves(REGION), still_read, "{what}");
        assert!(first.serves("cn-beijing"), "{what}");
        for region in ["eu-central-1", "anywhere", ""] {
            assert!(!first.serves(region), "{what}: it takes {region}");
        }
        let all: Vec<Arc<dyn Kms>> = vec![Arc::new(first), Arc::new(kms)];
        let router = KmsRouter::new(&all, Duration::from_secs(9), true, Arc::new(SystemClock));
        let serves = |region| router.serving(region).is_ok();
        assert!(serves("cn-beijing") && serves("eu-central-1") && !serves("anywhere"), "{what}");
    });
    // The other key can be used and administered.
    for change in [LocalKms::disable, LocalKms::enable, LocalKms::rotate] {
        change(&setup.kms, &other).unwrap();
    }
    setup.kms.create_key("cn-beijing", &[ROLE]).unwrap();
    if !still_read {
        let refused = setup.unwrap(&wrapped).unwrap_err();
        assert!(!matches!(refused, KmsError::Revoked { .. }), "{what}: {refused}");
        assert!(setup.kms.disable(setup.id()).is_err(), "{what}");
    }
    // The key itself is there again with its file.
    match fs::symlink_metadata(&path).unwrap().is_dir() {
        true => fs::remove_dir(&path).unwrap(),
        false => fs::remove_file(&path).unwrap(),
    }
    fs::rename(away(&path), &path).unwrap();
    assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY, "{what}");
    assert!(setup.kms.serves(REGION), "{what}");
}

#[test]
fn a_key_file_that_cannot_be_read_concerns_its_key_alone() {
    for (what, spoil) in spoilers() {
        check_spoilt_key(what, spoil);
    }
}

/// Runs this test again as a child process, if the variable is not set yet. Returns whether this
/// is the child.
fn in_child(test: &str, adjust: impl FnOnce(&mut std::process::Command)) -> bool {
    const CHILD: &str = "ENVELOG_TEST_KMS_CHILD";
    if std::env::var_os(CHILD).is_some() {
        return true;
    }
    let name = format!("kms::local::tests::{test}");
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &name, "--nocapture"]).env(CHILD, "1");
    adjust(&mut command);
    let out = command.output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(
        out.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&out.stderr)
    );
    false
}

/// Root may read any file, so the test runs as another user where it would be root.
#[test]
fn unreadable_files_concern_their_key_alone() {
    use std::os::unix::process::CommandExt;
    const USER: u32 = 65_534;
    let binary = tempfile::tempdir().unwrap();
    if in_child("unreadable_files_concern_their_key_alone", |command| {
        if rustix::process::geteuid().is_root() {
            // The other user may have no access to the directory of the build.
            let copy = binary.path().join("tests");
            fs::copy(command.get_program(), &copy).unwrap();
            fs::set_permissions(binary.path(), fs::Permissions::from_mode(0o755)).unwrap();
            let args: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
            let envs: Vec<_> = command
                .get_envs()
                .filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())))
                .collect();
            *command = std::process::Command::new(copy);
            command.args(args).envs(envs).uid(USER).gid(USER).current_dir("/");
        }
    }) {
        assert!(!rustix::process::geteuid().is_root());
        let unreadable = spoilers().into_iter().find(|(what, _)| *what == "an unreadable file");
        let (what, spoil) = unreadable.unwrap();
        check_spoilt_key(what, spoil);
        // A directory that may not be read serves no region as far as this process knows.
        let setup = Setup::new();
        let keys = setup.kms.keys_dir();
        for path in [&setup.kms.dir, &keys, &setup.kms.marker_path()] {
            let mode = fs::metadata(path).unwrap().permissions();
            fs::set_permissions(path, fs::Permissions::from_mode(0o000)).unwrap();
            assert!(!setup.kms.serves(REGION), "{}", path.display());
            let error = setup.kms.try_serves(REGION).unwrap_err().to_string();
            assert!(error.contains("ermission denied"), "{}: {error}", path.display());
            fs::set_permissions(path, mode).unwrap();
            assert!(setup.kms.serves(REGION));
        }
    }
}

#[test]
fn an_unreadable_directory_serves_no_region_and_reports_it() {
    let setup = Setup::new();
    let wrapped = setup.wrap().unwrap();
    let (dir, keys, marker) = (&setup.kms.dir, setup.kms.keys_dir(), setup.kms.marker_path());
    for place in [dir, &keys, &marker] {
        for (what, spoil) in spoilers() {
            // A missing directory is no error: it serves no region yet.
            if ["a symlink to it", "an unreadable file"].contains(&what)
                || (what == "a directory" && place != &marker)
                || (what == "a symlink to nothing" && place == dir)
            {
                continue;
            }
            fs::rename(place, away(place)).unwrap();
            spoil(place);
            let kms = setup.kms.clone();
            let what = format!("{what} in place of {}", place.display());
            let (serves, error) = soon(&what, move || (kms.serves(REGION), kms.try_serves(REGION)));
            assert!(!serves, "{what}");
            let error = error.unwrap_err();
            assert!(!matches!(error, KmsError::Revoked { .. }), "{what}: {error}");
            let spoilt = fs::symlink_metadata(place).unwrap();
            if spoilt.is_dir() { fs::remove_dir(place) } else { fs::remove_file(place) }.unwrap();
            let missing = setup.kms.try_serves(REGION).unwrap_err();
            assert!(matches!(missing, KmsError::Unreachable { .. }), "{missing}");
            fs::rename(away(place), place).unwrap();
            assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY, "{what}");
        }
    }
}

/// A process without a free file descriptor can look at nothing. That must not lead a lease to the
/// wrong KMS.
#[test]
fn without_file_descriptors_it_serves_no_region_and_reports_it() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    if !in_child("without_file_descriptors_it_serves_no_region_and_reports_it", |_| {}) {
        return;
    }
    let (setup, second) = (Setup::new(), Setup::new());
    let key = second.kms.create_key("eu-central-1", &[ROLE]).unwrap();
    let of_region = |region: &str, id: &str| Cmk {
        cmk_key_id: id.to_owned(),
        arn: ROLE.to_owned(),
        region_id: region.to_owned(),
    };
    let (first_cmk, second_cmk) = (of_region(REGION, setup.id()), of_region("eu-central-1", &key));
    let all: Vec<Arc<dyn Kms>> = vec![Arc::new(setup.kms.clone()), Arc::new(second.kms.clone())];
    let router = KmsRouter::new(&all, Duration::from_secs(9), true, Arc::new(SystemClock));
    setrlimit(Resource::Nofile, Rlimit { current: Some(64), maximum: Some(64) }).unwrap();
    let mut all_descriptors = Vec::new();
    while let Ok(file) = fs::File::open("/dev/null") {
        all_descriptors.push(file);
    }
    assert!(!setup.kms.serves(REGION) && !setup.kms.serves("eu-central-1"));
    let leases = [&first_cmk, &second_cmk].map(|cmk| router.serving_or_later(&cmk.region_id));
    let wrap = |cmk: &Cmk, kms: &crate::kms::BoundedKms| {
        kms.wrap(cmk, setup.context.clone(), &SecretKey::from_bytes(&mut DATA_KEY.clone()))
    };
    for (cmk, lease) in [&first_cmk, &second_cmk].into_iter().zip(&leases) {
        let now = router.serving(&cmk.region_id).unwrap();
        assert_eq!(now.name(), "local");
        for result in [wrap(cmk, lease), wrap(cmk, &now)] {
            let Err(KmsError::Unreachable { detail }) = result else { panic!("{result:?}") };
            assert!(detail.contains("Too many open files"), "{detail}");
        }
    }
    drop(all_descriptors);
    for (cmk, lease) in [&first_cmk, &second_cmk].into_iter().zip(&leases) {
        wrap(cmk, lease).unwrap();
    }
}

#[test]
fn a_damaged_marker_shows() {
    let setup = Setup::new();
    let wrapped = setup.wrap().unwrap();
    let path = setup.kms.marker_path();
    let newer = String::from_utf8(MARKER.to_vec()).unwrap().replace(":1}", ":2}").into_bytes();
    for damaged in [Vec::new(), MARKER[1..].to_vec(), newer, [MARKER, b"\n"].concat()] {
        fs::write(&path, damaged).unwrap();
        assert_invalid(setup.wrap());
        assert_invalid(setup.unwrap(&wrapped));
        for result in [
            LocalKms::open(&setup.kms.dir).map(drop),
            LocalKms::create_or_open(&setup.kms.dir).map(drop),
            setup.kms.create_key(REGION, &[]).map(drop),
            setup.kms.list().map(drop),
            setup.kms.disable(setup.id()),
        ] {
            assert!(
                matches!(&result, Err(LocalKmsError::Damaged { file, .. }) if *file == path),
                "{result:?}"
            );
        }
    }
}

#[test]
fn an_absent_directory_is_unreachable_until_it_is_back() {
    let setup = Setup::new();
    let wrapped = setup.wrap().unwrap();
    let (dir, away) = (&setup.kms.dir, setup.temporary.path().join("away"));
    let (keys, keys_away) = (setup.kms.keys_dir(), setup.temporary.path().join("keys"));
    for (from, to) in [(dir, &away), (&keys, &keys_away), (&setup.kms.marker_path(), &away)] {
        fs::rename(from, to).unwrap();
        assert_unreachable(setup.wrap());
        assert_unreachable(setup.unwrap(&wrapped));
        assert!(!setup.kms.serves(REGION));
        for result in [
            LocalKms::open(dir).map(drop),
            setup.kms.list().map(drop),
            setup.kms.disable(setup.id()),
        ] {
            assert!(matches!(result, Err(LocalKmsError::Missing { .. })), "{result:?}");
        }
        fs::rename(to, from).unwrap();
        assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
    }
    // An empty directory does not replace lost keys.
    fs::rename(&keys, &keys_away).unwrap();
    let result = LocalKms::create_or_open(dir);
    assert!(matches!(result, Err(LocalKmsError::Missing { .. })), "{result:?}");
}

#[test]
fn an_unreadable_directory_is_unreachable() {
    let setup = Setup::new();
    let wrapped = setup.wrap().unwrap();
    fs::rename(&setup.kms.dir, setup.temporary.path().join("away")).unwrap();
    fs::write(&setup.kms.dir, "a file").unwrap();
    assert_unreachable(setup.unwrap(&wrapped));
    assert!(!setup.kms.serves(REGION), "it takes no region from another KMS");
    let result = setup.kms.disable(setup.id());
    assert!(matches!(result, Err(LocalKmsError::Io { .. })), "{result:?}");
    assert!(LocalKms::create_or_open(&setup.kms.dir).is_err());
}

#[test]
fn calls_need_no_lock_and_changes_wait_for_it() {
    let setup = Setup::new();
    let wrapped = setup.wrap().unwrap();
    let lock = setup.kms.lock().unwrap();
    assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
    thread::scope(|scope| {
        let change = scope.spawn(|| setup.kms.disable(setup.id()));
        thread::sleep(LOCK_PAUSE * 4);
        assert_eq!(setup.state(), LocalKeyState::Enabled);
        drop(lock);
        change.join().unwrap().unwrap();
    });
    assert_eq!(setup.state(), LocalKeyState::Disabled);
    // The lock file has no content. A change creates it again.
    fs::remove_file(setup.kms.lock_path()).unwrap();
    setup.kms.enable(setup.id()).unwrap();
    assert_eq!(setup.state(), LocalKeyState::Enabled);
    assert!(setup.kms.lock_path().is_file());
}

#[test]
fn a_key_has_a_largest_size() {
    let setup = Setup::new();
    let before = setup.info();
    let roles: Vec<String> = (0..KEY_FILE_BYTES_MAX / NAME_BYTES_MAX)
        .map(|role| format!("{role:0width$}", width = NAME_BYTES_MAX))
        .collect();
    let grants: Vec<&str> = roles.iter().map(String::as_str).collect();
    let result = setup.kms.create_key(REGION, &grants);
    assert!(matches!(result, Err(LocalKmsError::TooLarge { .. })), "{result:?}");
    let id = setup.kms.create_key(REGION, &grants[1..grants.len() - 1]).unwrap();
    setup.kms.grant(&id, &"x".repeat(100)).unwrap();
    let result = setup.kms.grant(&id, grants[0]);
    assert!(matches!(result, Err(LocalKmsError::TooLarge { .. })), "{result:?}");
    setup.kms.disable(&id).unwrap();
    assert_eq!(setup.info(), before);
}

#[test]
fn an_interrupted_change_leaves_the_key_and_no_material() {
    let setup = Setup::new();
    let wrapped = setup.wrap().unwrap();
    let mut left_over = setup.kms.key_path(setup.id()).into_os_string();
    left_over.push(".tmp");
    fs::write(&left_over, "half a file").unwrap();
    assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
    assert_eq!(setup.kms.list().unwrap().len(), 1);
    setup.kms.delete(setup.id()).unwrap();
    assert!(!Path::new(&left_over).exists());
}

#[test]
fn the_next_change_removes_what_a_killed_process_left() {
    let setup = Setup::new();
    let path = setup.kms.key_path(setup.id());
    let beside = |suffix: &str| PathBuf::from(format!("{}{suffix}", path.display()));
    let leftovers = [
        beside(".tmp"),
        beside(".7.tmp"),
        setup.kms.key_path("key-0123456789abcdef").with_extension("json.tmp"),
    ];
    let others = [beside(".64.tmp"), beside(".old"), setup.kms.keys_dir().join("notes.json.tmp")];
    for path in leftovers.iter().chain(&others) {
        fs::write(path, "key material").unwrap();
    }
    let other = setup.kms.create_key(REGION, &[]).unwrap();
    setup.kms.rotate(&other).unwrap();
    for path in &leftovers {
        assert!(!path.exists(), "{}", path.display());
    }
    for path in &others {
        assert!(path.exists(), "{}", path.display());
    }
}

#[test]
fn a_random_identifier_never_replaces_a_key() {
    let setup = Setup::with(|kms| LocalKms { random: Arc::new(Counting::default()), ..kms });
    let again = LocalKms { random: Arc::new(Counting::default()), ..setup.kms.clone() };
    let before = fs::read(setup.kms.key_path(setup.id())).unwrap();
    let result = again.create_key(REGION, &[]);
    assert!(matches!(result, Err(LocalKmsError::Io { .. })), "{result:?}");
    assert_eq!(fs::read(setup.kms.key_path(setup.id())).unwrap(), before);
}

#[test]
fn only_the_owner_can_read_keys() {
    let setup = Setup::new();
    setup.kms.rotate(setup.id()).unwrap();
    for path in [setup.kms.key_path(setup.id()), setup.kms.marker_path(), setup.kms.lock_path()] {
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600,
            "{}",
            path.display()
        );
    }
}

#[test]
fn nothing_that_is_shown_holds_key_material() {
    let setup = Setup::with(|kms| LocalKms { random: Arc::new(Counting::default()), ..kms });
    let wrapped = setup.wrap().unwrap();
    let stored = setup.kms.load(setup.id()).unwrap();
    let path = setup.kms.key_path(setup.id());
    let mut shown = format!("{:?} {:?} {stored:?} {:?}", setup.kms, setup.kms.list(), setup.call());
    let mut show = |error: &dyn std::error::Error| shown.push_str(&format!("{error} {error:?} "));
    show(&setup.unwrap(&wrapped[1..]).unwrap_err());
    show(&setup.unwrap(&wrapped[..111]).unwrap_err());
    // A file with a matching checksum, although its material is one digit short.
    let text = fs::read_to_string(&path).unwrap();
    let body =
        text[file_head(0).len()..].strip_suffix("}\n").unwrap().replace("\"08090a", "\"8090a");
    fs::write(&path, format!("{}{body}}}\n", file_head(crc32fast::hash(body.as_bytes())))).unwrap();
    show(&setup.unwrap(&wrapped).unwrap_err());
    show(&setup.kms.rotate(setup.id()).unwrap_err());
    fs::write(&path, &text[..text.len() - 1]).unwrap();
    show(&setup.unwrap(&wrapped).unwrap_err());
    show(&setup.kms.list().unwrap_err());
    assert!(shown.contains("Counting"), "{shown}");
    for material in ["0a0b0c", "0A0B0C", "10, 11, 12", "0xa, 0xb", "d5d5d5", "213, 213"] {
        assert!(!shown.contains(material), "{material} in {shown}");
    }
}

/// Makes every call and every change, with any files. Returns whether the key was usable.
fn use_everything(setup: &Setup, wrapped: &[u8]) -> bool {
    let (kms, id) = (&setup.kms, setup.id());
    kms.serves(REGION);
    let usable = setup.unwrap(wrapped).is_ok_and(|key| key == DATA_KEY);
    let _ =
        (setup.wrap(), kms.list(), LocalKms::open(&kms.dir), LocalKms::create_or_open(&kms.dir));
    let _ = (
        kms.rotate(id),
        kms.grant(id, "another"),
        kms.ungrant(id, "another"),
        kms.disable(id),
        kms.enable(id),
    );
    let _ = (
        kms.schedule_deletion(id, 7),
        kms.cancel_deletion(id),
        kms.create_key(REGION, &[]),
        kms.delete(id),
    );
    usable
}

/// A file with this body and a matching checksum.
fn key_file(body: &[u8]) -> Vec<u8> {
    [file_head(crc32fast::hash(body)).as_bytes(), body, b"}\n"].concat()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes_in_its_files_do_not_panic(bytes: Vec<u8>, file in 0..3_usize, sealed: bool) {
        let setup = Setup::new();
        let wrapped = setup.wrap().unwrap();
        let paths = [setup.kms.key_path(setup.id()), setup.kms.marker_path(), setup.kms.lock_path()];
        fs::write(&paths[file], if sealed { key_file(&bytes) } else { bytes }).unwrap();
        // The content of the lock file does not matter. With any other changed file no call
        // succeeds.
        prop_assert_eq!(use_everything(&setup, &wrapped), file == 2);
    }

    /// Files that are almost valid get further: one byte of a key's description is changed, and the
    /// checksum matches.
    #[test]
    fn a_key_file_that_is_nearly_right_does_not_panic(at: prop::sample::Index, byte: u8) {
        let setup = Setup::new();
        let wrapped = setup.wrap().unwrap();
        let path = setup.kms.key_path(setup.id());
        let file = fs::read(&path).unwrap();
        let mut body = file[file_head(0).len()..file.len() - 2].to_vec();
        let at = at.index(body.len());
        let as_it_was = std::mem::replace(&mut body[at], byte) == byte;
        fs::write(&path, key_file(&body)).unwrap();
        prop_assert!(use_everything(&setup, &wrapped) || !as_it_was);
    }

    #[test]
    fn arbitrary_wrapped_keys_are_invalid(bytes: Vec<u8>, head in 0..40_usize) {
        let setup = Setup::new();
        let intact = setup.wrap().unwrap();
        assert_invalid(setup.unwrap(&bytes));
        if !intact[head..].starts_with(&bytes) {
            assert_invalid(setup.unwrap(&[&intact[..head], &bytes].concat()));
        }
    }
}
