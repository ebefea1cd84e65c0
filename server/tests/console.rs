//! The console: its data through the API, and its page in a headless Chromium.

#![allow(clippy::unwrap_used)]

#[path = "common/browser.rs"]
mod browser;
mod common;

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use browser::Browser;
use common::{Answer, Ask, World, exchange, secret};
use envelog::{
    LogGroup,
    group::{Content, Log, LogTag},
};
use serde_json::{Value, json};

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      frame-ancestors 'none'; base-uri 'none'; form-action 'none'";
/// Markup that would run a script.
const HOSTILE: &str = "<img src=x onerror=\"window.hacked=1\">";

/// A call of the console.
fn ask(view: &str) -> Ask {
    let ask = Ask::new("GET", &format!("/console/api/{view}"));
    Ask { host: "sls.local".to_owned(), ..ask }
}

fn get(world: &World, view: &str) -> Value {
    let answer = ask(view).send(world);
    assert_eq!(answer.status, 200, "{view}: {}", answer.text());
    answer.json()
}

/// The names of the Logstores that a key sees.
fn seen_by(world: &World, key: &str) -> Vec<String> {
    let answer = ask("overview").by(key).send(world).json();
    let name = |it: &Value| {
        format!("{}/{}", it["project"].as_str().unwrap(), it["logstore"].as_str().unwrap())
    };
    answer["logstores"].as_array().unwrap().iter().map(name).collect()
}

/// A project beside `app`, with one Logstore.
fn create_other(world: &World) {
    world.ok("POST", "/", &json!({ "projectName": "other", "description": "" }));
    let body = json!({ "logstoreName": "hidden", "shardCount": 1 });
    let ask = Ask::new("POST", "/logstores").json(body.to_string());
    let answer = Ask { host: "other.sls.local".to_owned(), ..ask }.send(world);
    assert_eq!(answer.status, 200, "{}", answer.text());
}

fn assert_guarded(answer: &Answer) {
    let policy = answer.header("content-security-policy");
    assert!(policy.starts_with(POLICY), "{policy}");
    assert!(!policy.contains("unsafe") && !policy.contains('*'), "{policy}");
    assert_eq!(answer.header("x-content-type-options"), "nosniff");
    assert_eq!(answer.header("cache-control"), "no-store");
    assert_eq!(answer.header("referrer-policy"), "no-referrer");
    assert_eq!(answer.header("set-cookie"), "");
}

#[test]
fn the_page_needs_no_signature_and_its_data_do() {
    let world = World::new();
    world.create("logs", &Value::Null);
    for (path, kind) in [
        ("/console", "text/html; charset=utf-8"),
        ("/console/", "text/html; charset=utf-8"),
        ("/console/console.css", "text/css; charset=utf-8"),
        ("/console/main.js", "text/javascript; charset=utf-8"),
    ] {
        let page = Ask::new("GET", path);
        let answer = exchange(world.address, &page.raw(&[]));
        assert_eq!((answer.status, answer.header("content-type")), (200, kind), "{path}");
        assert_guarded(&answer);
        let text = answer.text();
        for data in ["app", "logs\"", "root"] {
            assert!(path.ends_with(".css") || path.ends_with(".js") || !text.contains(data));
        }
    }
    for view in ["session", "overview", "logstore", "audit", "tail"] {
        let answer = exchange(world.address, &ask(view).raw(&[]));
        assert_eq!((answer.status, &*answer.code()), (401, "Unauthorized"), "{view}");
        assert_guarded(&answer);
        let stolen = Ask { secret: secret("reader"), ..ask(view) };
        assert_eq!(stolen.refused(&world, 401), "SignatureNotMatch");
    }
    // It only reads, and has no other views.
    assert_eq!(ask("nothing").refused(&world, 400), "NotSupported");
    for method in ["POST", "PUT", "DELETE"] {
        let ask = Ask { method: method.to_owned(), ..ask("overview") };
        assert_eq!(ask.refused(&world, 400), "NotSupported", "{method}");
    }
    // A page of another name that leads here cannot ask for data.
    let rebound = Ask { host: "evil.example".to_owned(), ..ask("overview") };
    assert_eq!(rebound.refused(&world, 400), "ParameterInvalid");
}

#[test]
fn a_key_sees_its_projects_alone() {
    let world = World::new();
    world.create("logs", &Value::Null);
    create_other(&world);
    assert_eq!(seen_by(&world, "root"), ["app/logs", "other/hidden"]);
    for key in ["reader", "writer", "admin"] {
        assert_eq!(seen_by(&world, key), ["app/logs"], "{key}");
        let overview = ask("overview").by(key).send(&world).json();
        assert_eq!((&overview["store"], &overview["sums"]["logstores"]), (&json!(null), &json!(1)));
        for view in ["logstore", "tail"] {
            let other = ask(&format!("{view}?project=other&logstore=hidden")).by(key);
            assert_eq!(other.refused(&world, 401), "Unauthorized", "{key} {view}");
        }
        // The audit log is that of the whole store.
        assert_eq!(ask("audit").by(key).refused(&world, 401), "Unauthorized", "{key}");
    }
    // Logs and consumers take the permission to read.
    let mine = |view: &str, key: &str| ask(&format!("{view}?project=app&logstore=logs")).by(key);
    for key in ["writer", "admin"] {
        assert_eq!(mine("tail", key).refused(&world, 401), "Unauthorized", "{key}");
        assert_eq!(mine("logstore", key).send(&world).json()["groups"], json!(null), "{key}");
    }
    assert_eq!(mine("logstore", "reader").send(&world).json()["groups"], json!([]));
    let audit = get(&world, "audit?filter=created&size=2");
    let events: Vec<&Value> =
        audit["records"].as_array().unwrap().iter().map(|it| &it["event"]).collect();
    assert_eq!((events, &audit["fault"]), (vec![&json!("store_created")], &json!(null)));
    let session = ask("session").by("reader").send(&world).json();
    assert_eq!(session["key"], json!({ "id": "reader", "projects": ["app"], "allow": ["read"] }));
    assert_eq!((&session["audit"], &session["everywhere"]), (&json!(false), &json!(false)));
}

#[test]
fn the_list_has_the_figures_of_each_logstore() {
    let world = World::new();
    let (cmk, byok) = world.byok();
    world.create("mine", &byok);
    world.create("plain", &Value::Null);
    for text in ["one", "two"] {
        assert_eq!(world.put("mine", text).status, 200);
    }
    assert_eq!(world.pull_all("mine"), ["one", "two"]);
    world.ok("POST", "/logstores/mine/consumergroups", &json!({ "consumerGroup": "g" }));
    let beat = |held: &str| {
        let target = "/logstores/mine/consumergroups/g?type=heartbeat&consumer=c";
        assert_eq!(Ask::new("POST", target).json(held).send(&world).status, 200);
    };
    beat("[]");
    let target = "/logstores/mine/shards/0?type=cursor&from=begin";
    let cursor = world.ok("GET", target, &Value::Null).json()["cursor"].clone();
    let target = "/logstores/mine/consumergroups/g?type=checkpoint&consumer=c&forceSuccess=true";
    world.ok("POST", target, &json!({ "shard": 0, "checkpoint": cursor }));

    let row = get(&world, "overview?filter=mine&sort=reads&descending=true&size=1");
    assert_eq!((&row["matching"], &row["sums"]["logstores"]), (&json!(1), &json!(2)));
    let row = &row["logstores"][0];
    assert_eq!((&row["key"]["state"], &row["refusals"]), (&json!("active"), &json!(0)));
    assert!(row["key"]["lease_left_s"].is_number() && row["lease_age_s"].is_number(), "{row}");
    let figures = &row["figures"];
    assert_eq!((&figures["method"], &figures["algorithm"]), (&json!("byok"), &json!("SM4-GCM")));
    assert_eq!((&figures["cmk"]["cmk_key_id"], &figures["logs"]), (&json!(cmk), &json!(2)));
    for size in ["raw", "compressed", "stored"] {
        assert!(figures[size].as_u64().unwrap() > 0, "{size}: {row}");
    }
    assert!(row["appended"].as_u64().unwrap() > 0 && row["read"].as_u64().unwrap() > 0);

    let detail = get(&world, "logstore?project=app&logstore=mine");
    let group = &detail["groups"][0];
    assert_eq!((&group["name"], &group["consumers"]), (&json!("g"), &json!(1)));
    // Puts go to the shards in turn.
    assert_eq!(group["shards"][0]["lag"], json!(1));
    assert_eq!((&group["shards"][0]["owner"], &group["lag"]), (&json!("c"), &json!(1)));
    assert_eq!(group["shards"][1]["lag"], json!(null));
    assert_eq!(detail["data_keys"][0]["current"], json!(true));

    // A revoked key is a state, and its refusals count.
    world.kms.disable(&cmk).unwrap();
    let began = Instant::now();
    let revoked = loop {
        let _ = world.put("mine", "refused");
        let row = get(&world, "overview?state=revoked");
        if row["matching"] == 1 && row["logstores"][0]["refusals"].as_u64().unwrap() > 0 {
            break row;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{row}");
        sleep(Duration::from_millis(50));
    };
    assert_eq!(revoked["logstores"][0]["key"]["reason"], json!("disabled"));
    assert_eq!(revoked["sums"]["states"], json!({ "none": 1, "revoked": 1 }));
    assert!(revoked["store"]["refusals"]["disabled"].as_u64().unwrap() > 0);
    for wrong in ["sort=size", "size=201", "offset=-1", "descending=maybe"] {
        let refused = ask(&format!("overview?{wrong}")).refused(&world, 400);
        assert_eq!(refused, "ParameterInvalid", "{wrong}");
    }
}

fn tail(world: &World, parameters: &str) -> Answer {
    ask(&format!("tail?project=app&logstore=logs{parameters}")).send(world)
}

#[test]
fn a_tail_waits_for_logs_and_misses_none() {
    let world = World::new();
    let (cmk, byok) = world.byok();
    world.create("logs", &byok);
    for index in 0..6 {
        assert_eq!(world.put("logs", &format!("old {index}")).status, 200);
    }
    let values = |answer: &Value| -> Vec<String> {
        let value = |log: &Value| log["fields"][0][1].as_str().unwrap().to_owned();
        answer["logs"].as_array().unwrap().iter().map(value).collect()
    };
    // The last two groups of both shards, in the order in which they came.
    let first = tail(&world, "&back=2").json();
    assert_eq!(values(&first), ["old 2", "old 3", "old 4", "old 5"]);
    let mut position = first["position"].as_str().unwrap().to_owned();
    let again = tail(&world, &format!("&position={}", position.replace(':', "%3A"))).json();
    assert_eq!((&again["logs"], &again["position"]), (&json!([]), &json!(position)));

    let mut found = Vec::new();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            while found.len() < 20 {
                let at = position.replace(':', "%3A").replace(',', "%2C");
                let answer = tail(&world, &format!("&position={at}&wait=30000")).json();
                found.extend(values(&answer));
                position = answer["position"].as_str().unwrap().to_owned();
            }
        });
        for index in 0..20 {
            assert_eq!(world.put("logs", &format!("new {index:02}")).status, 200);
        }
        waiting.join().unwrap();
    });
    found.sort();
    assert_eq!(found, (0..20).map(|index| format!("new {index:02}")).collect::<Vec<_>>());

    for wrong in ["&position=0", "&position=0%3A1%2C0%3A2", "&wait=30001", "&back=x"] {
        assert_eq!(tail(&world, wrong).code(), "ParameterInvalid", "{wrong}");
    }
    // A call that waits ends with the key.
    let at = position.replace(':', "%3A").replace(',', "%2C");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| tail(&world, &format!("&position={at}&wait=30000")));
        world.kms.disable(&cmk).unwrap();
        let refused = waiting.join().unwrap();
        assert_eq!((refused.status, &*refused.code()), (403, "KmsKeyRevoked"));
        assert_guarded(&refused);
    });
}

/// Puts one log with many hostile parts.
fn put_hostile(world: &World, logstore: &str) {
    let now = u32::try_from(jiff::Timestamp::now().as_second()).unwrap();
    let contents = vec![
        Content::new(HOSTILE, HOSTILE.to_owned()),
        Content::new("bidi", "user\u{202e}gpj.exe".to_owned()),
        Content::new("control", "\u{1b}[31mred\u{7}".to_owned()),
        Content::new("wide", "x".repeat(3000)),
    ];
    let group = LogGroup {
        logs: vec![Log { time: now, contents, ..Log::default() }],
        topic: Some(HOSTILE.into()),
        source: Some(HOSTILE.into()),
        log_tags: vec![LogTag { key: HOSTILE.into(), value: HOSTILE.into() }],
        ..LogGroup::default()
    };
    let answer = Ask::put(logstore, group.encode_to_bytes().to_vec()).send(world);
    assert_eq!(answer.status, 200, "{}", answer.text());
}

/// A store with things of each kind to look at.
fn busy_world() -> (World, String) {
    let world = World::new();
    let (cmk, byok) = world.byok();
    world.create("orders", &byok);
    world.create("payments", &json!({ "enable": true, "encrypt_type": "default" }));
    // As long as a name may be, and without a place to break it.
    world.create(&"unbroken".repeat(8)[..63], &Value::Null);
    create_other(&world);
    for index in 0..30 {
        let text = format!("order {index} of customer {} paid", index * 7919);
        assert_eq!(world.put("orders", &text).status, 200);
        assert_eq!(world.put("payments", &text).status, 200);
    }
    put_hostile(&world, "orders");
    let group = json!({ "consumerGroup": HOSTILE, "timeout": 600 });
    world.ok("POST", "/logstores/orders/consumergroups", &group);
    let name = "%3Cimg%20src%3Dx%20onerror%3D%22window.hacked%3D1%22%3E";
    let target = format!("/logstores/orders/consumergroups/{name}?type=heartbeat&consumer={name}");
    assert_eq!(Ask::new("POST", &target).json("[]").send(&world).status, 200);
    (world, cmk)
}

fn sign_in(browser: &mut Browser, key: &str, secret: &str) {
    browser.until("document.querySelector('#key-secret')");
    browser.fill("#key-id", key);
    browser.fill("#key-secret", secret);
    browser.press("Enter");
}

/// Checks width, contrast, names and tables.
fn assert_sound(browser: &mut Browser, what: &str) {
    let checked = browser.eval(include_str!("console/checks.js"));
    assert_eq!(checked["faults"], json!([]), "{what}");
    assert!(checked["texts"].as_u64().unwrap() >= 8, "{what}: {checked}");
    println!("{what}: {} texts, least contrast {:.2}", checked["texts"], checked["least"]);
}

/// Goes through the page with the tab key, and checks that the focus reaches each control, where it
/// can be seen.
fn assert_reachable(browser: &mut Browser, what: &str) {
    let controls = "[...document.querySelectorAll('a[href], button, input, select, [tabindex=\"0\"]')]\
                    .filter((it) => it.checkVisibility() && !it.disabled)";
    let expected = browser.eval(&format!("{controls}.length")).as_u64().unwrap();
    browser.eval("window.reached = new Set(), document.activeElement.blur(), null");
    for _ in 0..expected + 4 {
        browser.press("Tab");
        browser.eval("window.reached.add(document.activeElement), null");
        let fault = browser.eval(
            "(() => { const it = document.activeElement; if (it === document.body) { return null; } \
             const [style, box] = [getComputedStyle(it), it.getBoundingClientRect()]; \
             const seen = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2 \
               && box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth; \
             return seen ? null : it.outerHTML.slice(0, 200); })()",
        );
        assert_eq!(fault, Value::Null, "{what}: the focus is not seen");
    }
    let missed = format!(
        "{controls}.filter((it) => !window.reached.has(it)).map((it) => it.outerHTML.slice(0, 200))"
    );
    assert_eq!(browser.eval(&missed), json!([]), "{what}: the tab key does not reach");
}

#[test]
fn the_page_is_readable_and_reachable_in_both_themes_narrow_and_wide() {
    let (world, _) = busy_world();
    let mut browser = Browser::start();
    let address = format!("http://{}/console", world.address);
    for (width, height, scheme) in
        [(360, 760, "light"), (360, 760, "dark"), (1440, 900, "light"), (1440, 900, "dark")]
    {
        browser.window(width, height, scheme);
        browser.open("about:blank");
        browser.open(&address);
        browser.until("document.querySelector('#key-secret')");
        let look = |browser: &mut Browser, view: &str| {
            let name = format!("{view}-{width}-{scheme}");
            browser.screenshot(&name);
            assert_sound(browser, &name);
            if scheme == "light" {
                assert_reachable(browser, &name);
            }
        };
        look(&mut browser, "sign-in");
        sign_in(&mut browser, "root", &secret("root"));
        browser.until_text("main", "app/payments");
        browser.until("!document.querySelector('main').innerText.includes('Loading')");
        // A few samples of the plots.
        browser
            .until("document.querySelector('.line')?.getAttribute('points').split(' ').length > 2");
        look(&mut browser, "logstores");
        browser.eval("location.hash = '#/logstore/app/orders', null");
        browser.until_text("main", "SM4-GCM");
        browser.until_text("main", "Writable");
        look(&mut browser, "overview");
        browser.eval("location.hash = '#/logstore/app/orders/consumers', null");
        browser.until_text("main", "log groups behind the checkpoint");
        look(&mut browser, "consumers");
        browser.eval("location.hash = '#/logstore/app/orders/tail', null");
        browser.until_text(".lines", "order 29");
        browser.fill("#search", "customer");
        browser.until("document.querySelector('mark')");
        look(&mut browser, "tail");
        browser.eval("location.hash = '#/audit', null");
        browser.until_text("main", "store created");
        look(&mut browser, "audit");
    }
    // The toggle wins over the system.
    let back = "getComputedStyle(document.body).backgroundColor";
    let dark = browser.eval(back);
    browser.click("#theme");
    assert_eq!(browser.text("#theme"), "Theme: light");
    assert_ne!(browser.eval(back), dark);
    assert_eq!(browser.eval("window.hacked === undefined"), json!(true));
    assert_eq!(browser.errors(), [""; 0]);
    let origin = format!("http://{}/console", world.address);
    for request in browser.requests() {
        assert!(request.starts_with(&origin) || request == "about:blank", "{request}");
    }
}

#[test]
fn the_secret_stays_in_the_memory_of_the_page() {
    let world = World::new();
    world.create("logs", &Value::Null);
    let mut browser = Browser::start();
    browser.open(&format!("http://{}/console", world.address));
    sign_in(&mut browser, "root", "not the secret");
    browser.until_text("#problem", "The secret does not belong to this access key id");
    assert_eq!(browser.eval("document.activeElement.id"), json!("key-secret"));
    sign_in(&mut browser, "nobody", &secret("root"));
    browser.until_text("#problem", "This access key id does not exist");
    sign_in(&mut browser, "root", &secret("root"));
    browser.until_text("main", "app/logs");
    // Neither in the document, in storage, in a cookie, nor in an address.
    let kept = browser.eval(
        "JSON.stringify([document.documentElement.outerHTML, {...localStorage}, \
         {...sessionStorage}, document.cookie, location.href, history.state, \
         [...document.querySelectorAll('input')].map((it) => it.value)])",
    );
    assert!(!kept.as_str().unwrap().contains("secret of"), "{kept}");
    let databases = browser.eval("indexedDB.databases().then((it) => it.length)");
    assert_eq!(databases, json!(0));
    for request in browser.requests() {
        assert!(!request.contains("secret"), "{request}");
    }
    // The key of a signature cannot be read back by a script.
    let exported = browser.eval(
        "import('/console/client.js').then(async ({ Client }) => { \
           let seen = null; const all = crypto.subtle.importKey.bind(crypto.subtle); \
           crypto.subtle.importKey = async (...parts) => (seen = await all(...parts)); \
           const client = await Client.withSecret('a', 'b'); \
           const leaks = JSON.stringify(client) + Object.keys(client); \
           return [seen.extractable, leaks, \
             await crypto.subtle.exportKey('raw', seen).then(() => 'read', (it) => it.name)]; })",
    );
    assert_eq!(exported, json!([false, "{}", "InvalidAccessError"]));
    // Markup cannot be made of a text.
    let refused = "(() => { try { document.body.innerHTML = '<b>x</b>'; return 'made'; } \
                   catch (error) { return error.name; } })()";
    assert_eq!(browser.eval(refused), json!("TypeError"));

    // It is gone after the page is loaded again, and after it was not used for a while.
    browser.send("Page.reload", json!({}));
    sign_in(&mut browser, "root", &secret("root"));
    browser.until_text("main", "app/logs");
    browser.eval("(() => { const now = Date.now; Date.now = () => now() + 31 * 60000; })()");
    browser.until_text("#problem", "not used for 30 minutes");
    assert!(!browser.text("main").contains("app/logs"));
    browser.send("Page.reload", json!({}));

    // A key that the service takes back ends the session, and says so.
    sign_in(&mut browser, "reader", &secret("reader"));
    browser.until_text("main", "app/logs");
    assert!(!browser.text("header").contains("Audit log"));
    let mut keys = common::keys();
    keys["keys"].as_array_mut().unwrap().retain(|key| key["id"] != "reader");
    common::write_keys(&world.keys_path(), &keys);
    browser.until_text("#problem", "Signed out");
    browser.until_text("#problem", "does not exist");
}

#[test]
fn a_live_tail_updates_is_searched_and_paused_and_shows_hostile_logs_as_text() {
    let (world, cmk) = busy_world();
    let mut browser = Browser::start();
    browser.open(&format!("http://{}/console#/logstore/app/orders/tail", world.address));
    sign_in(&mut browser, "root", &secret("root"));
    browser.until_text(".lines", "order 29");
    // Markup is text, and other characters cannot hide.
    browser.until_text(".lines", HOSTILE);
    let hidden = browser.text(".lines");
    for shown in ["user⟨U+202E⟩gpj.exe", "⟨U+001B⟩[31mred⟨U+0007⟩"] {
        assert!(hidden.contains(shown), "{hidden}");
    }
    assert_eq!(browser.eval("document.querySelectorAll('img').length"), json!(0));

    assert_eq!(world.put("orders", "a new order").status, 200);
    browser.until_text(".lines", "a new order");
    // No polling without news: one call waits.
    let tails = |browser: &Browser| {
        browser.requests().iter().filter(|it| it.contains("/console/api/tail")).count()
    };
    let before = tails(&browser);
    sleep(Duration::from_secs(2));
    assert!(tails(&browser) <= before + 1, "{before} {}", tails(&browser));

    browser.fill("#search", "NEW ORDER");
    browser.until_text("#tail-status", "1 of 32 logs match");
    assert_eq!(browser.text(".lines mark"), "new order");
    assert!(!browser.text(".lines").contains("order 29"));
    browser.fill("#search", HOSTILE);
    browser.until_text(".lines mark", HOSTILE);
    browser.fill("#search", "");
    browser.until_text(".lines", "order 29");

    browser.click(".buttons button");
    assert_eq!(world.put("orders", "while paused").status, 200);
    browser.until_text("#tail-status", "Paused, 1 more wait");
    assert!(!browser.text(".lines").contains("while paused"));
    browser.click(".buttons button");
    browser.until_text(".lines", "while paused");
    // Screen readers are told, seldom.
    browser.until("document.querySelector('#announcer').textContent !== ''");

    browser.eval("location.hash = '#/logstore/app/orders/consumers', null");
    browser.until_text("main", HOSTILE);
    browser.eval("location.hash = '#/', null");
    browser.until_text("main", "app/orders");
    browser.fill("#filter", "orders");
    browser.until("document.querySelectorAll('tbody tr').length === 1");
    browser.until_text("tbody tr", "Active");
    world.kms.disable(&cmk).unwrap();
    browser.until_text("tbody tr", "Revoked");
    browser.until_text("tbody tr", "disabled");
    browser.screenshot("revoked");
    world.kms.enable(&cmk).unwrap();
    browser.until_text("tbody tr", "Active");
    assert_eq!(browser.eval("window.hacked === undefined"), json!(true));
    assert_eq!(browser.errors(), [""; 0]);

    // The logs of a key that is taken back do not stay on the screen.
    browser.eval("location.hash = '#/logstore/app/orders/tail', null");
    browser.until_text(".lines", "order 29");
    world.kms.disable(&cmk).unwrap();
    browser.until_text("main", "is disabled; enable the key again in the KMS");
    assert_eq!(browser.text(".lines"), "");
    browser.until_text(".title", "Revoked");
    world.kms.enable(&cmk).unwrap();
    browser.until_text(".lines", "order 29");
}

#[test]
fn without_access_keys_the_page_opens_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let store =
        envelog::Store::builder(path("store"), path("keyring"), envelog::crypto::AwsLc::new())
            .create()
            .unwrap();
    store.create_logstore(&"app/logs".parse().unwrap(), Default::default()).unwrap();
    let (address, stop, serving) = common::start(envelog_server::Server::builder(), store);
    let mut browser = Browser::start();
    browser.open(&format!("http://{address}/console"));
    browser.until_text("main", "app/logs");
    browser.until_text("#banner", "every program on this machine may do everything");
    // A page that came over plain HTTP from elsewhere cannot sign, and says so.
    browser.open(&format!("http://sls.local:{}/console", address.port()));
    browser.until_text("main", "only over HTTPS and on loopback addresses");
    browser.open(&format!("http://localhost:{}/console", address.port()));
    browser.until_text("main", "app/logs");
    // The service stops, and the page says so.
    let _ = stop.send(());
    serving.join().unwrap();
    browser.until_text("#banner", "The service does not answer");
}
