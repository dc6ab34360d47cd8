// SPDX-License-Identifier: Apache-2.0

//! A headless Chromium, spoken to through two pipes (its DevTools protocol).

use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
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

    /// Loads a file as it would look there.
    pub fn open(&mut self, file: &Path, view: View) -> Result<()> {
        let size =
            json!({"width": view.width, "height": 900, "deviceScaleFactor": 1, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", size)?;
        let scheme = if view.dark { "dark" } else { "light" };
        let media = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.call("Emulation.setEmulatedMedia", media)?;
        self.events.clear();
        let url = format!("file://{}", file.display());
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
