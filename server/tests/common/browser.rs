//! A headless Chromium, driven by its debugging protocol over two pipes.

#![allow(dead_code, clippy::unwrap_used)]

use std::{
    env, fs,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Arc, Mutex,
        mpsc::{self, Receiver},
    },
    thread::{self, sleep},
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long to wait for something that happens in the end.
const IN_THE_END: Duration = Duration::from_secs(60);

/// A browser with one page.
pub(crate) struct Browser {
    child: Child,
    pipe: ChildStdin,
    replies: Receiver<Value>,
    events: Arc<Mutex<Vec<Value>>>,
    session: String,
    last_id: u64,
    _profile: TempDir,
}

impl Browser {
    /// Starts a browser.
    ///
    /// # Panics
    /// If there is none: a test that needs one must fail and not be skipped.
    pub(crate) fn start() -> Self {
        let profile = tempfile::tempdir().unwrap();
        let program = env::var("ENVELOG_CHROMIUM").unwrap_or_else(|_| "chromium".to_owned());
        // The protocol is on the descriptors 3 and 4. The tests may run as root, and load pages of
        // their own service only, so there is no sandbox.
        let script = "exec \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1";
        let mut child = Command::new("sh")
            .args(["-c", script, "sh", &program])
            .args(["--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"])
            .args(["--no-first-run", "--disable-background-networking", "--disable-extensions"])
            .args(["--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars"])
            // A name that is no loopback name, for the browser.
            .arg("--host-resolver-rules=MAP sls.local 127.0.0.1")
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (pipe, out) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (sender, replies) = mpsc::channel();
        let events = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&events);
        thread::spawn(move || {
            for message in BufReader::new(out).split(0) {
                let Ok(message) = message else { return };
                let message: Value = serde_json::from_slice(&message).unwrap();
                if message["id"].is_u64() {
                    let _ = sender.send(message);
                } else {
                    seen.lock().unwrap().push(message);
                }
            }
        });
        let mut browser = Self {
            child,
            pipe,
            replies,
            events,
            session: String::new(),
            last_id: 0,
            _profile: profile,
        };
        browser.attach();
        browser
    }

    fn attach(&mut self) {
        let began = Instant::now();
        let target = loop {
            let targets = self.send("Target.getTargets", json!({}));
            let all = targets["targetInfos"].as_array().unwrap();
            if let Some(page) = all.iter().find(|it| it["type"] == "page") {
                break page["targetId"].clone();
            }
            assert!(began.elapsed() < IN_THE_END, "the browser has no page");
            sleep(Duration::from_millis(50));
        };
        let to_page = json!({ "targetId": target, "flatten": true });
        let attached = self.send("Target.attachToTarget", to_page);
        self.session = attached["sessionId"].as_str().unwrap().to_owned();
        for domain in ["Page", "Runtime", "Log", "Network"] {
            self.send(&format!("{domain}.enable"), json!({}));
        }
    }

    /// A command of the protocol, with its result.
    pub(crate) fn send(&mut self, method: &str, parameters: Value) -> Value {
        self.last_id += 1;
        let mut message = json!({ "id": self.last_id, "method": method, "params": parameters });
        if !self.session.is_empty() {
            message["sessionId"] = json!(self.session);
        }
        let mut text = message.to_string().into_bytes();
        text.push(0);
        self.pipe.write_all(&text).unwrap_or_else(|error| {
            panic!("{error}: this test needs Chromium (Debian's package chromium)")
        });
        loop {
            let reply = self.replies.recv_timeout(IN_THE_END).unwrap_or_else(|error| {
                panic!("{method}: {error}: this test needs Chromium (Debian's package chromium)")
            });
            if reply["id"] == self.last_id {
                assert!(reply["error"].is_null(), "{method}: {}", reply["error"]);
                return reply["result"].clone();
            }
        }
    }

    pub(crate) fn open(&mut self, address: &str) {
        self.send("Page.navigate", json!({ "url": address }));
        self.until("document.readyState === 'complete'");
    }

    /// The value of an expression in the page, awaited.
    pub(crate) fn eval(&mut self, expression: &str) -> Value {
        let parameters =
            json!({ "expression": expression, "awaitPromise": true, "returnByValue": true });
        let result = self.send("Runtime.evaluate", parameters);
        assert!(result["exceptionDetails"].is_null(), "{expression}: {result}");
        result["result"]["value"].clone()
    }

    /// Waits until an expression holds.
    pub(crate) fn until(&mut self, expression: &str) {
        let began = Instant::now();
        while self.eval(&format!("Boolean({expression})")) != json!(true) {
            if began.elapsed() > IN_THE_END {
                let text = self.eval("document.body.innerText");
                panic!("never: {expression}\nerrors: {:?}\npage: {text}", self.errors());
            }
            sleep(Duration::from_millis(50));
        }
    }

    /// The text of an element, as it is shown.
    pub(crate) fn text(&mut self, selector: &str) -> String {
        let shown = self.eval(&format!("document.querySelector({}).innerText", json!(selector)));
        shown.as_str().unwrap().to_owned()
    }

    /// Waits until an element has a text in it.
    pub(crate) fn until_text(&mut self, selector: &str, text: &str) {
        let (selector, text) = (json!(selector), json!(text));
        self.until(&format!("document.querySelector({selector})?.innerText.includes({text})"));
    }

    /// Gives an element the focus, and replaces its text as from a keyboard.
    pub(crate) fn fill(&mut self, selector: &str, text: &str) {
        let element = format!("document.querySelector({})", json!(selector));
        self.eval(&format!("{element}.focus(), {element}.select?.()"));
        match text {
            "" => self.press("Backspace"),
            _ => drop(self.send("Input.insertText", json!({ "text": text }))),
        }
    }

    pub(crate) fn click(&mut self, selector: &str) {
        self.eval(&format!("document.querySelector({}).click()", json!(selector)));
    }

    pub(crate) fn press(&mut self, key: &str) {
        let code = match key {
            "Tab" => 9,
            "Enter" => 13,
            "Backspace" => 8,
            _ => panic!("{key}"),
        };
        let mut event = json!({ "type": "keyDown", "key": key, "code": key,
                                "windowsVirtualKeyCode": code });
        if key == "Enter" {
            event["text"] = json!("\r");
        }
        self.send("Input.dispatchKeyEvent", event.clone());
        event["type"] = json!("keyUp");
        self.send("Input.dispatchKeyEvent", event);
    }

    /// Sets the size of the window, and the colours that the system prefers.
    pub(crate) fn window(&mut self, width: u32, height: u32, scheme: &str) {
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1,
                           "mobile": false });
        self.send("Emulation.setDeviceMetricsOverride", size);
        let features = json!({ "features": [
            { "name": "prefers-color-scheme", "value": scheme },
            { "name": "prefers-reduced-motion", "value": "reduce" },
        ] });
        self.send("Emulation.setEmulatedMedia", features);
    }

    /// Writes a picture of the page to the directory in `ENVELOG_SCREENSHOTS`, if there is one.
    pub(crate) fn screenshot(&mut self, name: &str) {
        let Some(dir) = env::var_os("ENVELOG_SCREENSHOTS") else { return };
        let taken = self.send("Page.captureScreenshot", json!({ "format": "png" }));
        let bytes = STANDARD.decode(taken["data"].as_str().unwrap()).unwrap();
        fs::write(Path::new(&dir).join(format!("{name}.png")), bytes).unwrap();
    }

    fn events(&self, method: &str) -> Vec<Value> {
        let events = self.events.lock().unwrap();
        events.iter().filter(|it| it["method"] == method).map(|it| it["params"].clone()).collect()
    }

    /// Errors of scripts, of the policy and of the network, and messages to the console.
    pub(crate) fn errors(&self) -> Vec<String> {
        let mut errors: Vec<String> =
            self.events("Runtime.exceptionThrown").iter().map(ToString::to_string).collect();
        errors.extend(self.events("Runtime.consoleAPICalled").iter().map(ToString::to_string));
        let logged = self.events("Log.entryAdded");
        errors.extend(logged.iter().map(|it| it["entry"]["text"].to_string()));
        errors
    }

    /// The addresses of all requests of the page.
    pub(crate) fn requests(&self) -> Vec<String> {
        let sent = self.events("Network.requestWillBeSent");
        sent.iter().map(|it| it["request"]["url"].as_str().unwrap().to_owned()).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
