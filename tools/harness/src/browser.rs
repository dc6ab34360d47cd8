// SPDX-License-Identifier: Apache-2.0

//! A headless Chromium, spoken to through two pipes (its DevTools protocol).

use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use drex_build::{cache::TempDir, process};
use serde_json::{Value, json};

const PROGRAMS: [&str; 4] = [
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
];

/// For all pages; a browser that hangs is ended then.
const SECONDS: &str = "900";

pub fn program() -> Option<PathBuf> {
    PROGRAMS.iter().find_map(|name| process::find_program(name))
}

pub struct Browser {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    session: Option<String>,
    last: u64,
    /// Methods of events that came while an answer was waited for.
    events: Vec<String>,
    _profile: TempDir,
}

/// How a page is looked at.
#[derive(Clone, Copy)]
pub struct View {
    pub width: u32,
    pub dark: bool,
}

impl Browser {
    pub fn start(program: &Path) -> Result<Browser> {
        let profile = TempDir::unlocked("browser")?;
        let mut child = Command::new("timeout");
        child
            // Chromium's pipes are its files 3 and 4.
            .args([SECONDS, "sh", "-c"])
            .arg("exec \"$0\" \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1")
            .arg(program)
            .args([
                "--headless",
                "--remote-debugging-pipe",
                "--no-first-run",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-extensions",
                "--hide-scrollbars",
                "--force-color-profile=srgb",
            ])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = child.spawn().context("cannot run Chromium")?;
        let to = child.stdin.take().context("no pipe to Chromium")?;
        let from = child.stdout.take().context("no pipe from Chromium")?;
        let mut browser = Browser {
            child,
            to,
            from: BufReader::new(from),
            session: None,
            last: 0,
            events: Vec::new(),
            _profile: profile,
        };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"}))?;
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let session = browser.call("Target.attachToTarget", attach)?;
        let session = session["sessionId"].as_str().context("no session")?;
        browser.session = Some(session.to_owned());
        browser.call("Page.enable", json!({}))?;
        Ok(browser)
    }

    /// Loads a page as it would look there.
    pub fn open(&mut self, url: &str, view: View) -> Result<()> {
        let size =
            json!({"width": view.width, "height": 900, "deviceScaleFactor": 1, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", size)?;
        let scheme = if view.dark { "dark" } else { "light" };
        let media = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.call("Emulation.setEmulatedMedia", media)?;
        self.events.clear();
        let went = self.call("Page.navigate", json!({"url": url}))?;
        ensure!(went["errorText"].is_null(), "{url}: {went}");
        while !self.events.iter().any(|e| e == "Page.loadEventFired") {
            let message = self.read()?;
            self.note(&message);
        }
        Ok(())
    }

    /// What an expression says, which gives a string.
    pub fn evaluate(&mut self, expression: &str) -> Result<String> {
        let said = self.call("Runtime.evaluate", json!({"expression": expression}))?;
        let value = said["result"]["value"].as_str();
        Ok(value.with_context(|| said.to_string())?.to_owned())
    }

    /// Waits until an expression is true.
    pub fn wait(&mut self, expression: &str, limit: Duration) -> Result<()> {
        let start = Instant::now();
        while self.evaluate(&format!("String({expression})"))? != "true" {
            ensure!(start.elapsed() < limit, "never true: {expression}");
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Clicks into the middle of the element that a selector finds, wherever on the page it is.
    pub fn click(&mut self, selector: &str) -> Result<()> {
        let found = self.evaluate(&format!(
            "(() => {{ const e = document.querySelector({}); if (!e) return '';
               e.scrollIntoView({{ block: 'center' }}); const r = e.getBoundingClientRect();
               return JSON.stringify([r.x + r.width / 2, r.y + r.height / 2]); }})()",
            json!(selector)
        ))?;
        ensure!(!found.is_empty(), "there is no {selector}");
        let at: [f64; 2] = serde_json::from_str(&found)?;
        for what in ["mousePressed", "mouseReleased"] {
            let event =
                json!({"type": what, "x": at[0], "y": at[1], "button": "left", "clickCount": 1});
            self.call("Input.dispatchMouseEvent", event)?;
        }
        Ok(())
    }

    /// Writes into the element that has the focus, in place of what is there.
    pub fn write(&mut self, text: &str) -> Result<()> {
        self.evaluate("(document.activeElement.select(), '')")?;
        self.call("Input.insertText", json!({"text": text}))?;
        Ok(())
    }

    /// Presses a key that has a name, such as `ArrowRight`.
    pub fn press(&mut self, key: &str) -> Result<()> {
        for what in ["rawKeyDown", "keyUp"] {
            let code = match key {
                "Tab" => 9,
                "Enter" => 13,
                _ => 0,
            };
            let event =
                json!({"type": what, "key": key, "code": key, "windowsVirtualKeyCode": code});
            self.call("Input.dispatchKeyEvent", event)?;
        }
        Ok(())
    }

    /// A PNG in base64 of the page from its top, so high.
    pub fn picture(&mut self, width: u32, height: u32) -> Result<String> {
        let clip = json!({"x": 0, "y": 0, "width": width, "height": height, "scale": 1});
        let how = json!({"format": "png", "clip": clip, "captureBeyondViewport": true});
        let taken = self.call("Page.captureScreenshot", how)?;
        Ok(taken["data"].as_str().context("no picture")?.to_owned())
    }

    fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        self.last += 1;
        let mut message = json!({"id": self.last, "method": method, "params": params});
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        let mut text = message.to_string().into_bytes();
        text.push(0);
        self.to.write_all(&text).context("Chromium went away")?;
        loop {
            let mut message = self.read()?;
            if message["id"] != self.last {
                self.note(&message);
                continue;
            }
            if !message["error"].is_null() {
                bail!("{method}: {}", message["error"]);
            }
            return Ok(message["result"].take());
        }
    }

    fn note(&mut self, message: &Value) {
        self.events
            .extend(message["method"].as_str().map(str::to_owned));
    }

    fn read(&mut self) -> Result<Value> {
        let mut text = Vec::new();
        self.from.read_until(0, &mut text)?;
        ensure!(text.pop() == Some(0), "Chromium went away");
        Ok(serde_json::from_slice(&text)?)
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        self.session = None;
        let _ = self.call("Browser.close", json!({}));
        let _ = self.child.wait();
    }
}
