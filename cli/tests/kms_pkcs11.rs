//! A customer's key in a PKCS#11 token, given as `--kms pkcs11:…`, with SoftHSM.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "../../tests/common/pkcs11.rs"]
mod pkcs11;

use std::{fs, io::Write};

use common::{Running, World, byok, made_lines, service};
use pkcs11::{PIN, Token, in_own_process};

/// Fails if SoftHSM is missing. [`Token::admin`] also starts this test.
#[test]
fn softhsm_is_there() {
    pkcs11::admin();
}

/// The KMS URL of the token, with its PIN in a file.
fn kms(token: &Token) -> String {
    let file = token.path("pin");
    fs::write(&file, PIN).unwrap();
    token.uri_with(&format!("&pin-source=file:{}", file.display()))
}

#[test]
fn what_was_appended_is_read_as_long_as_the_token_allows() {
    in_own_process("what_was_appended_is_read_as_long_as_the_token_allows", |token| {
        token.admin("generate cmk 0a");
        let (world, kms, text) = (World::new(), kms(token), made_lines(2_000));
        let file = world.file("lines", &text);
        world.ok(&[
            "--kms",
            &kms,
            "create",
            "p/customer",
            "--encrypt-conf",
            &byok("sm4", "cmk").to_string(),
        ]);
        world.create("p/service", &service("default"));
        for name in ["p/customer", "p/service"] {
            world.ok(&["--kms", &kms, "append", name, &file]);
        }
        let read = ["--kms", &kms, "read", "p/customer"];
        assert_eq!(world.ok(&read), text);

        token.admin("decrypt cmk false");
        for command in [&read[..], &["--kms", &kms, "append", "p/customer", &file]] {
            let sentence = world.refused(3, command);
            assert!(
                sentence.contains("p/customer") && sentence.contains("cmk is disabled"),
                "{sentence}"
            );
        }
        token.admin("decrypt cmk true");
        assert_eq!(world.ok(&read), text);

        token.take_away();
        let sentence = world.refused(4, &read);
        assert!(sentence.contains("p/customer") && sentence.contains("cn-hangzhou"), "{sentence}");
        assert_eq!(world.read("p/service"), text);
        token.put_back();
        assert_eq!(world.ok(&read), text);

        fs::write(token.path("pin"), "123456").unwrap();
        let sentence = world.refused(4, &read);
        assert!(
            sentence.contains("CKR_PIN_INCORRECT") && !sentence.contains("123456"),
            "{sentence}"
        );
        fs::write(token.path("pin"), PIN).unwrap();

        token.admin("destroy cmk");
        assert!(world.refused(3, &read).contains("cmk is deleted"));
        world.ok(&["delete", "p/customer", "--yes"]);
        assert_eq!(world.read("p/service"), text);
    });
}

#[test]
fn a_running_process_ends_when_the_key_is_taken_away() {
    in_own_process("a_running_process_ends_when_the_key_is_taken_away", |token| {
        token.admin("generate cmk 0a");
        let (world, kms) = (World::new(), kms(token));
        world.ok(&[
            "--kms",
            &kms,
            "create",
            "p/customer",
            "--encrypt-conf",
            &byok("default", "cmk").to_string(),
        ]);
        let mut running = Running::start(world.command(&[
            "--kms",
            &kms,
            "--revalidate-every",
            "200ms",
            "append",
            "p/customer",
            "-",
            "--ack",
        ]));
        let (mut stdin, acknowledged) = (running.stdin.take().unwrap(), running.lines());
        stdin.write_all(b"one\n").unwrap();
        assert_eq!(acknowledged.recv().unwrap(), "1");
        token.admin("decrypt cmk false");
        assert!(running.wait().sentence(3).contains("disabled"));
        token.admin("decrypt cmk true");
        assert_eq!(world.ok(&["--kms", &kms, "read", "p/customer"]), b"one\n");
    });
}

#[test]
fn a_key_that_does_not_serve_is_refused_at_once() {
    in_own_process("a_key_that_does_not_serve_is_refused_at_once", |token| {
        let (world, kms) = (World::new(), kms(token));
        token.admin("generate loose 0b extractable");
        for (key, words) in
            [("none", "the token has no key none"), ("loose", "can leave the token")]
        {
            let create =
                ["--kms", &kms, "create", "p/l", "--encrypt-conf", &byok("sm4", key).to_string()];
            assert!(world.refused(3, &create).contains(words), "{key}");
        }
        let elsewhere = kms.replace("cn-hangzhou", "cn-beijing");
        let create = [
            "--kms",
            &elsewhere,
            "create",
            "p/l",
            "--encrypt-conf",
            &byok("sm4", "loose").to_string(),
        ];
        assert!(world.refused(6, &create).contains("region"));
        let sentence = world.refused(6, &["--kms", "pkcs11:?region=r&pin-value=4711", "list"]);
        assert!(sentence.contains("module-path") && !sentence.contains("4711"), "{sentence}");
        assert_eq!(world.json(&["list", "--json"])["logstores"], serde_json::json!([]));
    });
}
