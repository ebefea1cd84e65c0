//! Settings: given as options, as environment variables and in a settings file.

#![allow(clippy::unwrap_used)]

mod common;

use std::{fs, os::unix::fs::PermissionsExt};

use common::{Out, Running, World, made_lines, service};
use rustix::fs::{CWD, Mode, mkfifoat};
use serde_json::{Value, json};

/// Runs with these variables.
fn run(world: &World, variables: &[(&str, &str)], args: &[&str]) -> Out {
    let mut command = world.command(args);
    command.envs(variables.iter().copied());
    Running::start(command).finish()
}

/// The settings in force, as `settings --json` prints them.
fn settings(world: &World, variables: &[(&str, &str)], args: &[&str]) -> Vec<Value> {
    let out = run(world, variables, &[&["settings", "--json"], args].concat());
    out.assert(0);
    let value: Value = serde_json::from_slice(&out.stdout).unwrap();
    value["settings"].as_array().unwrap().clone()
}

fn find<'a>(settings: &'a [Value], name: &str) -> &'a Value {
    settings.iter().find(|it| it["name"] == name).unwrap_or_else(|| panic!("{name}"))
}

/// Three values of a setting, as the command line has them, and as the program prints them.
fn values(name: &str) -> [(String, Value); 3] {
    let three = |values: [&str; 3]| values.map(|value| (value.to_owned(), json!(value)));
    match name {
        "store" | "keyring" | "anchor" | "kms-dir" | "access-key" | "ca" => {
            three(["one", "/two/2", "./three"])
        }
        "endpoint" => three(["https://a.example", "https://b.example", "https://c.example"]),
        "log" => three(["info", "warn,envelog=debug", "off"]),
        "kms" => {
            ["local:one", "local:two", "local:three"].map(|url| (url.to_owned(), json!([url])))
        }
        "verbose" => [1, 2, 3].map(|count| (count.to_string(), json!(count))),
        "workers" | "readers-max" | "followers-max" => {
            [3, 4, 5].map(|count| (count.to_string(), json!(count)))
        }
        "without-anchor" | "accept-retired" | "keyring-group" | "group-read"
        | "allow-network-fs" | "reopen-full-shards" => {
            [true, false, true].map(|on| (on.to_string(), json!(on)))
        }
        "block-bytes" | "pending-bytes-max" | "segment-bytes" | "audit-file-bytes" => {
            [("2097152", "2MiB"), ("3 MiB", "3MiB"), ("4mib", "4MiB")]
                .map(|(text, value)| (text.to_owned(), json!(value)))
        }
        "outage-grace" => [("40s", "40s"), ("1h 30m", "90m"), ("3600s", "1h")]
            .map(|(text, value)| (text.to_owned(), json!(value))),
        // A new setting may need values of its own here.
        _ => [("2s", "2s"), ("3000ms", "3s"), ("4s", "4s")]
            .map(|(text, value)| (text.to_owned(), json!(value))),
    }
}

#[test]
fn options_precede_variables_then_the_file_then_defaults() {
    let world = World::new();
    let defaults = settings(&world, &[], &[]);
    assert!(defaults.len() > 25, "{defaults:?}");
    assert!(defaults.iter().all(|it| it["source"] == "default" || it["name"] == "json"));
    assert!(defaults.iter().all(|it| it["place"].is_null() || it["name"] == "json"));
    assert_eq!(find(&defaults, "keyring")["value"], "./envelog-data.keyring");
    for setting in &defaults[1..] {
        let name = setting["name"].as_str().unwrap();
        // `settings` prints JSON here because of that option.
        if name == "json" || name.starts_with("serve.") {
            continue;
        }
        let [in_file, in_variable, on_line] = values(name);
        let (variable, option) =
            (format!("ENVELOG_{}", name.replace('-', "_").to_uppercase()), format!("--{name}"));
        let file = world.file("settings.toml", format!("\n{name} = {:?}\n", in_file.0));
        let variables = [(variable.as_str(), in_variable.0.as_str())];
        // This option is repeated, and has no value.
        let option_args = match name {
            "verbose" => vec!["-vvv".to_owned()],
            _ => vec![format!("{option}={}", on_line.0)],
        };
        let option_args: Vec<&str> = option_args.iter().map(String::as_str).collect();
        let from_file = ["--settings", &file];
        for (variables, args, value, source, place) in [
            (&[][..], &from_file[..], &in_file.1, "file", &format!("{file}:2")),
            (&variables, &from_file, &in_variable.1, "environment", &variable),
            (&variables, &[], &in_variable.1, "environment", &variable),
            (&variables, &[&from_file[..], &option_args].concat(), &on_line.1, "option", &option),
        ] {
            let all = settings(&world, variables, args);
            let expected =
                json!({ "name": name, "value": value, "source": source, "place": place });
            assert_eq!(find(&all, name), &expected, "{variables:?} {args:?}");
            for other in &all {
                let affected =
                    [name, "json", "settings"].contains(&other["name"].as_str().unwrap());
                assert!(affected || other["source"] == "default", "{name}: {other}");
            }
        }
    }
}

#[cfg(feature = "serve")]
#[test]
fn the_options_of_serve_are_settings_too() {
    let world = World::new();
    let all = settings(&world, &[], &[]);
    assert_eq!(find(&all, "serve.listen")["value"], "127.0.0.1:8099");
    let text = "workers = 3\n[serve]\nlisten = '127.0.0.1:1'\nregion = 'r'\nplain-http = true\n";
    let file = world.file("settings.toml", text);
    let variables = [("ENVELOG_SERVE_REGION", "v"), ("ENVELOG_SERVE_ACCESS_KEYS", "keys.json")];
    let all = settings(&world, &variables, &["--settings", &file]);
    for (name, value, source, place) in [
        ("listen", json!("127.0.0.1:1"), "file", json!(format!("{file}:3"))),
        ("region", json!("v"), "environment", json!("ENVELOG_SERVE_REGION")),
        ("access-keys", json!("keys.json"), "environment", json!("ENVELOG_SERVE_ACCESS_KEYS")),
        ("plain-http", json!(true), "file", json!(format!("{file}:5"))),
        ("base-host", json!("sls.local"), "default", Value::Null),
        ("tls-cert", Value::Null, "default", Value::Null),
    ] {
        let name = format!("serve.{name}");
        let expected = json!({ "name": name, "value": value, "source": source, "place": place });
        assert_eq!(find(&all, &name), &expected);
    }
    // They take effect: option, variable, file.
    let serve = |variables: &[(&str, &str)], args: &[&str]| {
        let mut command =
            world.command(&[&["--settings", &file, "serve", "--json"], args].concat());
        command.envs(variables.iter().copied());
        let mut service = Running::start(command);
        let lines = service.lines();
        let mut text = String::new();
        while serde_json::from_str::<Value>(&text).is_err() {
            text.push_str(&lines.recv().unwrap());
        }
        service.terminate();
        service.wait().assert(0);
        let told: Value = serde_json::from_str(&text).unwrap();
        told["endpoint"].as_str().unwrap().rsplit_once(':').unwrap().0.to_owned()
    };
    let file_text = "[serve]\nlisten = '127.0.0.1:0'\nbase-host = 'file.example'\n";
    fs::write(&file, file_text).unwrap();
    let variable = [("ENVELOG_SERVE_BASE_HOST", "variable.example")];
    assert_eq!(serve(&[], &[]), "http://file.example");
    assert_eq!(serve(&variable, &[]), "http://variable.example");
    assert_eq!(serve(&variable, &["--base-host", "option.example"]), "http://option.example");
    for (text, sentence) in [
        (
            "[serve]\nlissten = 'x'\n",
            "settings.toml:2: there is no setting serve.lissten; is listen meant?",
        ),
        ("[serve]\nstore = 'x'\n", "settings.toml:2: there is no setting serve.store"),
        ("listen = '127.0.0.1:1'\n", "settings.toml:1: there is no setting listen"),
        ("[serve]\nlisten = 'nowhere'\n", "settings.toml:2: invalid value 'nowhere'"),
        ("[server]\nlisten = 'x'\n", "settings.toml:1: "),
        ("[serve.more]\nlisten = 'x'\n", "settings.toml:1: "),
    ] {
        fs::write(&file, text).unwrap();
        // Also for a command that is not `serve`.
        for command in ["serve", "list"] {
            let said = world.refused(2, &["--settings", &file, command]);
            assert!(said.contains(sentence), "{text}: {said}");
        }
    }
    // A certificate without its key.
    let args = ["serve", "--listen", "127.0.0.1:0", "--tls-cert", "chain.pem"];
    assert!(world.refused(2, &args).contains("--tls-key"));
    let wrong = run(&world, &[("ENVELOG_SERVE_LISTEN", "nowhere")], &["serve"]);
    assert!(wrong.sentence(2).contains("ENVELOG_SERVE_LISTEN"));
}

#[test]
fn json_is_a_setting_too() {
    let world = World::new();
    let file = world.file("json.toml", "json = true\n");
    for (variables, args, source) in [
        (&[("ENVELOG_JSON", "1")][..], &["settings"][..], "environment"),
        (&[], &["--settings", &file, "settings"], "file"),
        (&[("ENVELOG_JSON", "off")], &["--settings", &file, "settings", "--json"], "option"),
    ] {
        let out = run(&world, variables, args);
        let value: Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(find(value["settings"].as_array().unwrap(), "json")["source"], source);
    }
    let plain = run(&world, &[("ENVELOG_JSON", "off")], &["--settings", &file, "settings"]);
    assert!(plain.text().contains("ENVELOG_JSON"), "{}", plain.text());
    let (kind, _) = run(&world, &[], &["--settings", &file, "get", "p/a"]).json_error(7);
    assert_eq!(kind, "store_missing");
}

#[test]
fn a_list_and_a_switch_are_replaced_as_a_whole() {
    let world = World::new();
    let file = world.file(
        "settings.toml",
        "kms = ['local:a', 'local:b']\ngroup-read = true\nanchor-required = '5s'\n",
    );
    let from_file = ["--settings", &file];
    let all = settings(&world, &[], &from_file);
    assert_eq!(find(&all, "kms")["value"], json!(["local:a", "local:b"]));
    assert_eq!(find(&all, "settings")["value"], json!(file));
    let all = settings(&world, &[("ENVELOG_KMS", "local:c\nlocal:d e")], &from_file);
    assert_eq!(find(&all, "kms")["value"], json!(["local:c", "local:d e"]));
    let args = ["--kms", "local:f", "--group-read=false", "--anchor-required", "none"];
    let all = settings(&world, &[("ENVELOG_SETTINGS", &file)], &args);
    assert_eq!(find(&all, "kms")["value"], json!(["local:f"]));
    assert_eq!(find(&all, "group-read")["value"], false);
    assert_eq!(find(&all, "anchor-required")["value"], Value::Null);
    // The option may be in front of the command, and the file is the last of two.
    world.file("other.toml", "workers = 7\n");
    let out = world.json(&["--settings", "other.toml", "--workers", "9", "settings", "--json"]);
    assert_eq!(find(out["settings"].as_array().unwrap(), "workers")["value"], 9);
}

#[test]
fn a_shorter_grace_shortens_the_interval_unless_that_is_given() {
    let world = World::new();
    let interval = |text: &str, args: &[&str]| {
        let file = world.file("settings.toml", text);
        let args = [&["--settings", &file, "settings", "--json"], args].concat();
        let out = run(&world, &[], &args);
        let value: Value = serde_json::from_slice(&out.stdout).unwrap();
        let all = value["settings"].as_array().unwrap();
        (out.status, find(all, "revalidate-every")["value"].clone())
    };
    assert_eq!(interval("", &["--outage-grace", "5s"]), (Some(0), json!("5s")));
    assert_eq!(interval("outage-grace = '5s'", &[]), (Some(0), json!("5s")));
    assert_eq!(interval("outage-grace = '1h'", &[]), (Some(0), json!("30s")));
    // The engine would refuse these.
    let too_long = (Some(2), json!("10s"));
    assert_eq!(interval("revalidate-every = '10s'", &["--outage-grace", "5s"]), too_long);
    assert_eq!(interval("outage-grace = '5s'", &["--revalidate-every", "10s"]), too_long);
}

#[test]
fn settings_of_a_file_reach_the_store() {
    let world = World::new();
    let lines = world.file("lines", made_lines(2000));
    let small =
        world.file("small.toml", "segment-bytes = '4KiB'\nblock-bytes = 4096\ngroup-read = true\n");
    let create = |store: &str, args: &[&str]| {
        let conf = service("default").to_string();
        let args = [args, &["--store", store]].concat();
        world.ok(&[&args[..], &["create", "p/a", "--encrypt-conf", &conf]].concat());
        world.ok(&[&args[..], &["append", "p/a", &lines, "--group-bytes", "4KiB"]].concat());
        let segments = world.segments(store);
        (segments.len(), fs::metadata(&segments[0]).unwrap().permissions().mode() & 0o777)
    };
    assert_eq!(create("plain", &[]), (1, 0o600));
    let (count, mode) = create("small", &["--settings", &small]);
    assert!(count > 1 && mode == 0o640, "{count} segments, mode {mode:o}");
    let (count, mode) = create("mixed", &["--settings", &small, "--group-read=no"]);
    assert!(count > 1 && mode == 0o600, "{count} segments, mode {mode:o}");
    // A value that the engine refuses.
    let large = world.file("large.toml", "workers = 65\n");
    let refused = ["--settings", &large, "--store", "plain", "list"];
    assert!(world.refused(2, &refused).contains("workers (1 to 64)"));
    let out = world.run(&["--settings", &large, "settings"]);
    assert!(out.sentence(2).contains("workers (1 to 64)"));
    let row = out.text().lines().find(|line| line.contains(" workers ")).unwrap().to_owned();
    assert!(row.contains(" 65 ") && row.contains("large.toml:1"), "{row}");
}

#[test]
fn a_refused_file_is_one_sentence_and_runs_no_command() {
    let world = World::new();
    let refused = |text: &[u8], words: &str| {
        let file = world.file("settings.toml", text);
        let create = ["--settings", &file, "create", "p/a"];
        let sentence = world.refused(2, &create);
        assert!(sentence.contains(words), "{sentence}");
        for json in [&["--json"][..], &[]] {
            let variables = [("ENVELOG_JSON", if json.is_empty() { "1" } else { "0" })];
            let (kind, said) = run(&world, &variables, &[&create, json].concat()).json_error(2);
            assert_eq!((kind.as_str(), said.as_str()), ("settings", sentence.as_str()));
        }
        assert!(!world.path("envelog-data").exists());
    };
    refused(
        b"\n\nkms-timout = '5s'\n",
        "settings.toml:3: there is no setting kms-timout; is kms-timeout meant?",
    );
    refused(b"kms-timeout = '5 parsecs'\n", "settings.toml:1: invalid value '5 parsecs'");
    refused(b"[kms]\nurl = 'local:a'\n", "settings.toml:1: kms is a table");
    refused(b"kms-timeout\n", "settings.toml:1: this is not TOML");
    refused(b"kms = 'pkcs11:token=a?pin-value=13579'\n", "holds no secrets");
}

#[test]
fn only_a_regular_file_of_bounded_size_is_read() {
    let world = World::new();
    mkfifoat(CWD, world.path("fifo"), Mode::RWXU).unwrap();
    world.file("large.toml", vec![b'#'; (1 << 20) + 1]);
    world.file("binary.toml", [0xff; 10]);
    world.file("there.toml", "workers = 7\n");
    std::os::unix::fs::symlink("there.toml", world.path("link.toml")).unwrap();
    std::os::unix::fs::symlink("fifo", world.path("link-to-fifo")).unwrap();
    for (file, words) in [
        ("fifo", "not a regular file"),
        ("link-to-fifo", "not a regular file"),
        (".", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("missing.toml", "missing.toml"),
        ("large.toml", "too large"),
        ("binary.toml", "binary.toml"),
    ] {
        let sentence = world.refused(2, &["--settings", file, "list"]);
        assert!(sentence.contains(words), "{sentence}");
        let sentence = run(&world, &[("ENVELOG_SETTINGS", file)], &["list"]).sentence(2);
        assert!(sentence.contains(words), "{sentence}");
    }
    let all = settings(&world, &[], &["--settings", "link.toml"]);
    assert_eq!(find(&all, "workers")["value"], 7);
    // Without a name no file is read.
    world.file("settings.toml", "workers = 70\n");
    assert_eq!(find(&settings(&world, &[], &[]), "workers")["value"], 2);
}

#[test]
fn a_refused_variable_is_named() {
    let world = World::new();
    for (variable, value) in [
        ("ENVELOG_KMS_TIMEOUT", "5"),
        ("ENVELOG_GROUP_READ", "maybe"),
        ("ENVELOG_WORKERS", ""),
        ("ENVELOG_LOG", "a=b=c"),
        ("ENVELOG_VERBOSE", "loud"),
    ] {
        let sentence = run(&world, &[(variable, value)], &["list"]).sentence(2);
        assert!(sentence.starts_with(&format!("{variable}: ")), "{sentence}");
        let both = [(variable, value), ("ENVELOG_JSON", "yes")];
        assert_eq!(run(&world, &both, &["list"]).json_error(2), ("usage".to_owned(), sentence));
    }
    // The option is at fault here.
    let out = run(&world, &[("ENVELOG_KMS_TIMEOUT", "5")], &["list", "--kms-timeout", "x"]);
    out.assert(2);
    assert!(out.stderr.contains("'x'") && !out.stderr.contains("ENVELOG"), "{}", out.stderr);
}

#[test]
fn a_variable_that_an_option_overrides_is_not_checked() {
    let world = World::new();
    for (variable, option) in [
        ("ENVELOG_KMS_TIMEOUT", "--kms-timeout=2s"),
        ("ENVELOG_GROUP_READ", "--group-read"),
        ("ENVELOG_WORKERS", "--workers=3"),
        ("ENVELOG_LOG", "--log=info"),
        ("ENVELOG_JSON", "--json=true"),
    ] {
        let junk = [(variable, "a=b=c")];
        for args in [[option, "settings", "--json"], ["settings", option, "--json"]] {
            // The same switch may not be given twice.
            let args = if variable == "ENVELOG_JSON" { &args[..2] } else { &args[..] };
            let out = run(&world, &junk, args);
            out.assert(0);
            let all: Value = serde_json::from_slice(&out.stdout).unwrap();
            let name = option.trim_start_matches("--").split('=').next().unwrap();
            assert_eq!(find(all["settings"].as_array().unwrap(), name)["source"], "option");
        }
        // Behind `--` there is no option.
        let args = ["append", "p/a", "--", option];
        assert!(run(&world, &junk, &args).sentence(2).contains(variable));
    }
    let junk = [("ENVELOG_WORKERS", "many")];
    let file = world.file("workers.toml", "workers = 3\n");
    assert!(run(&world, &junk, &["--settings", &file, "settings"]).sentence(2).contains("many"));
    let with_option = ["--settings", &file, "settings", "--workers=4", "--json"];
    run(&world, &junk, &with_option).assert(0);
}

#[test]
fn no_secret_of_a_variable_is_shown() {
    let world = World::new();
    let secret = [("ENVELOG_KMS", "pkcs11:token=a?region=r&pin-value=13579")];
    for args in [&["--help"][..], &["append", "--help"], &["settings"], &["list"], &["--wrong"]] {
        let out = run(&world, &secret, args);
        assert!(!out.text().contains("13579") && !out.stderr.contains("13579"), "{args:?}");
    }
    assert!(run(&world, &secret, &["--help"]).text().contains("ENVELOG_KMS]"));
}
