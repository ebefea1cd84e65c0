//! The embedded KMS as a backend: the conformance suite, and the life of a Logstore.

#![allow(clippy::unwrap_used)]

#[path = "common/kms_backend.rs"]
mod kms_backend;

use std::{fs, io, net::SocketAddr, sync::Arc};

use envelog::{
    io::{OsRandom, Random},
    kms::{Cmk, Kms, LocalKms, LocalKmsError},
    testing::conformance::{Admin, AdminError, Subject, unsupported},
};
use kms_backend::{NETWORK, a_logstore_follows_its_key, conforms};
use tempfile::TempDir;

const REGION: &str = "cn-hangzhou";
const ROLE: &str = "acs:ram::13234:role/logsource";

struct Local {
    kms: LocalKms,
    dir: TempDir,
}

/// Draws this identifier for a key, and its material from the operating system.
#[derive(Debug)]
struct SameId(u64);

impl Random for SameId {
    fn fill(&self, buf: &mut [u8]) -> io::Result<()> {
        match <&mut [u8; 8]>::try_from(&mut *buf) {
            Ok(id) => *id = self.0.to_be_bytes(),
            Err(_) => OsRandom.fill(buf)?,
        }
        Ok(())
    }
}

impl Local {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let kms = LocalKms::create_or_open(dir.path().join("kms")).unwrap();
        // The region of the keys is served once it has a key.
        kms.create_key(REGION, &[ROLE]).unwrap();
        Self { kms, dir }
    }
}

fn cmk(id: &str) -> Cmk {
    Cmk { cmk_key_id: id.to_owned(), arn: ROLE.to_owned(), region_id: REGION.to_owned() }
}

fn done(result: Result<(), LocalKmsError>) -> Admin {
    result.map_err(AdminError::failed)
}

impl Subject for Local {
    fn kms(&self) -> Arc<dyn Kms> {
        Arc::new(self.kms.clone())
    }

    fn create_key(&self) -> Admin<Cmk> {
        Ok(cmk(&self.kms.create_key(REGION, &[ROLE]).map_err(AdminError::failed)?))
    }

    fn missing_key(&self) -> Cmk {
        cmk("key-0000000000000000")
    }

    fn disable(&self, cmk: &Cmk) -> Admin {
        done(self.kms.disable(&cmk.cmk_key_id))
    }

    fn enable(&self, cmk: &Cmk) -> Admin {
        done(self.kms.enable(&cmk.cmk_key_id))
    }

    fn schedule_deletion(&self, cmk: &Cmk) -> Admin {
        done(self.kms.schedule_deletion(&cmk.cmk_key_id, 7))
    }

    fn cancel_deletion(&self, cmk: &Cmk) -> Admin {
        done(self.kms.cancel_deletion(&cmk.cmk_key_id))
    }

    fn delete(&self, cmk: &Cmk) -> Admin {
        done(self.kms.delete(&cmk.cmk_key_id))
    }

    /// The embedded KMS draws the identifiers of keys at random, so this removes the file of the
    /// key and lets the KMS draw the same identifier again.
    fn recreate(&self, cmk: &Cmk) -> Admin {
        let id = &cmk.cmk_key_id;
        let file = self.dir.path().join(format!("kms/keys/{id}.json"));
        fs::remove_file(file).map_err(AdminError::failed)?;
        let number = u64::from_str_radix(id.trim_start_matches("key-"), 16).unwrap();
        let kms = self.kms.clone().insecure_random_for_tests(Arc::new(SameId(number)));
        let again = kms.create_key(REGION, &[ROLE]).map_err(AdminError::failed)?;
        assert_eq!(again, *id);
        Ok(())
    }

    fn rotate(&self, cmk: &Cmk) -> Admin {
        done(self.kms.rotate(&cmk.cmk_key_id))
    }

    fn withdraw(&self, cmk: &Cmk) -> Admin {
        done(self.kms.ungrant(&cmk.cmk_key_id, ROLE))
    }

    fn permit(&self, cmk: &Cmk) -> Admin {
        done(self.kms.grant(&cmk.cmk_key_id, ROLE))
    }

    fn server(&self) -> Admin<SocketAddr> {
        unsupported("a directory has no network")
    }

    fn kms_at(&self, _: SocketAddr) -> Admin<Arc<dyn Kms>> {
        unsupported("a directory has no network")
    }

    fn secrets(&self) -> Vec<String> {
        Vec::new()
    }
}

#[test]
fn the_embedded_kms_conforms() {
    conforms(&Local::new(), &NETWORK);
}

#[test]
fn a_logstore_follows_its_key_in_the_embedded_kms() {
    a_logstore_follows_its_key(&Local::new());
}
