//! Chromium without a window, told what to do over a pipe by its DevTools protocol.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

/// Where Debian and others have it.
const PROGRAMS: [&str; 3] = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];
/// How long it may take to answer on a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);

/// What runs once in each page, and answers with what is to be known of it.
const FACTS: &str = include_str!("facts.js");

/// A browser with one page.
pub struct Browser {
    child: Child,
    commands: ChildStdin,
    messages: Receiver<Value>,
    session: Option<String>,
    next: u64,
    /// Events that nobody has waited for yet.
    events: VecDeque<Value>,
    _profile: TempDir,
}

impl Browser {
    /// Starts it, with a profile that goes with it.
    pub fn start() -> Self {
        let program = PROGRAMS.into_iter().find(|program| Path::new(program).exists());
        let program = program.expect("no chromium here: packaging/dependencies.sh test installs it");
        let profile = tempfile::Builder::new().prefix("fx-browser-").tempdir().unwrap();
        let mut command = Command::new("/bin/sh");
        // It reads commands from descriptor 3 and answers on 4.
        command.args(["-c", "exec \"$0\" \"$@\" 3<&0 4>&1 </dev/null >/dev/null", program]);
        command.args(["--headless", "--remote-debugging-pipe", "--disable-gpu", "--disable-quic", "--no-first-run"]);
        command.args(["--disable-background-networking", "--disable-component-update", "--disable-sync"]);
        command.arg("--disable-dev-shm-usage");
        if rustix::process::getuid().is_root() {
            command.arg("--no-sandbox");
        }
        command.arg(format!("--user-data-dir={}", profile.path().display()));
        // What it would leave in /tmp when it is killed goes with the profile.
        command.env("TMPDIR", profile.path());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let (commands, answers) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (told, messages) = channel();
        std::thread::spawn(move || {
            for message in BufReader::new(answers).split(0).map_while(Result::ok) {
                let Ok(message) = serde_json::from_slice(&message) else { return };
                if told.send(message).is_err() {
                    return;
                }
            }
        });
        let mut browser =
            Self { child, commands, messages, session: None, next: 1, events: VecDeque::new(), _profile: profile };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"}));
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let session = browser.call("Target.attachToTarget", attach);
        browser.session = Some(session["sessionId"].as_str().unwrap().to_owned());
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        browser.width(1280);
        browser
    }

    /// Sends a command and gives what it answers; events that come meanwhile are kept.
    pub fn call(&mut self, method: &str, params: Value) -> Value {
        let id = self.next;
        self.next += 1;
        let mut message = json!({"id": id, "method": method, "params": params});
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        self.commands.write_all(format!("{message}\0").as_bytes()).unwrap();
        loop {
            let message = self.messages.recv_timeout(PATIENCE).unwrap_or_else(|error| panic!("{method}: {error}"));
            if message["id"] == json!(id) {
                assert!(message.get("error").is_none(), "{method}: {message}");
                return message["result"].clone();
            }
            self.events.push_back(message);
        }
    }

    fn width(&mut self, width: u32) {
        let metrics = json!({"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", metrics);
    }

    /// Loads a page from a file, and waits until it is there.
    pub fn open(&mut self, page: &Path) {
        self.events.clear();
        let opened = self.call("Page.navigate", json!({"url": format!("file://{}", page.display())}));
        assert!(opened.get("errorText").is_none(), "{opened}");
        loop {
            if self.events.iter().any(|event| event["method"] == "Page.loadEventFired") {
                return;
            }
            let event = self.messages.recv_timeout(PATIENCE).expect("the page is never loaded");
            self.events.push_back(event);
        }
    }

    /// What the console has to say of the page, exceptions included, and each request but that for the page.
    pub fn noise(&mut self) -> Vec<String> {
        // What was said before this answer is there by now.
        self.evaluate("0");
        let mut noise = Vec::new();
        for event in &self.events {
            let params = &event["params"];
            match event["method"].as_str().unwrap_or_default() {
                "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded" => {
                    noise.push(params.to_string());
                }
                "Network.requestWillBeSent" if params["type"] != "Document" => {
                    noise.push(params["request"]["url"].to_string());
                }
                _ => {}
            }
        }
        noise
    }

    /// The value of an expression in the page.
    pub fn evaluate(&mut self, expression: &str) -> Value {
        let answer = self.call("Runtime.evaluate", json!({"expression": expression, "returnByValue": true}));
        assert!(answer.get("exceptionDetails").is_none(), "{answer}");
        answer["result"]["value"].clone()
    }

    /// Presses a key.
    pub fn press(&mut self, key: &str) {
        for kind in ["keyDown", "keyUp"] {
            self.call("Input.dispatchKeyEvent", json!({"type": kind, "key": key}));
        }
    }

    /// What is wrong with the page's looks on a screen 1280 pixels wide, light and dark, and on A4.
    pub fn looks(&mut self) -> Vec<String> {
        let mut wrong = Vec::new();
        // The sheet is 297 by 210 millimetres with margins of 12, at 96 pixels an inch.
        for (media, scheme, width, sheet) in
            [("screen", "light", 1280, 0), ("screen", "dark", 1280, 0), ("print", "light", 1031, 702)]
        {
            let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
            self.call("Emulation.setEmulatedMedia", json!({"media": media, "features": features}));
            self.width(width);
            let found = self.evaluate(&format!("({FACTS})({sheet})"));
            let found: Vec<String> = serde_json::from_value(found).unwrap();
            wrong.extend(found.into_iter().map(|what| format!("{media}, {scheme}: {what}")));
        }
        self.call("Emulation.setEmulatedMedia", json!({"media": "", "features": []}));
        self.width(1280);
        wrong
    }

    /// Prints the page; gives how large the document is.
    pub fn print(&mut self) -> usize {
        let printed = self.call("Page.printToPDF", json!({"preferCSSPageSize": true, "printBackground": true}));
        let data = printed["data"].as_str().unwrap();
        assert!(data.starts_with("JVBERi0"), "no PDF: {}", &data[..20]);
        data.len()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Its other processes end with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
