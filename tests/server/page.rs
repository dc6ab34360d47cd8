// SPDX-License-Identifier: Apache-2.0

//! What people see of early exit: the page at `/drex`, the figures at `/drex/stats`, and a line in the log each minute.

use std::{
    io::{Read, Write},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Suite, Test, exits, generate, greedy, prompt};
use crate::{
    browser::{Browser, View, program},
    client::Client,
    server::Server,
};

/// The one that needs a browser is left out where there is none: `cargo xtask test --docs` installs one first.
pub const TESTS: fn() -> Vec<Test> = || {
    let mut all = vec![
        Test::new(
            "/drex and /drex/stats are there with a policy, and only then",
            there,
        ),
        Test::new("/drex/stats counts as /metrics and the answers do", counts),
        Test::new("the log says each minute what early exit brings", log),
    ];
    if program().is_some() {
        all.push(Test::new(IN_BROWSER, clicks));
    }
    all
};

pub const IN_BROWSER: &str = "the page at /drex in a browser";

/// The head and body of an answer, as they came.
fn raw(client: Client, path: &str, headers: &str) -> Result<(String, String)> {
    let mut stream = TcpStream::connect(client.addr)?;
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n");
    stream.write_all(request.as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no head")?;
    Ok((head.to_owned(), body.to_owned()))
}

fn there(suite: &Suite) -> Result<()> {
    let pages = ["/drex", "/drex/stats"];
    // Without a policy the answers are the unpatched server's, with an API key and without one.
    for flags in [&[][..], &["--api-key", "secret"]] {
        let patched = suite.start(&suite.patched, 2, flags)?;
        let reference = suite.start(&suite.reference, 2, flags)?;
        for path in pages {
            let (ours, theirs) = (
                raw(patched.client, path, "")?,
                raw(reference.client, path, "")?,
            );
            ensure!(ours == theirs, "{path}: {ours:?} instead of {theirs:?}");
        }
    }

    // Neither --metrics nor the web UI.
    let model = suite.model.to_string_lossy();
    let args = [
        "-m",
        &model,
        "-np",
        "2",
        "-c",
        "1024",
        "-t",
        "2",
        "--no-webui",
    ];
    let more = ["--drex-policy", "hold", "--api-key", "secret"];
    let server = Server::start(&suite.patched.0, args.iter().chain(&more))?;
    let client = server.client;
    let (head, page) = raw(client, "/drex", "")?;
    let head = head.to_lowercase();
    ensure!(
        head.starts_with("http/1.1 200") && head.contains("content-type: text/html"),
        "{head}"
    );
    ensure!(
        head.contains("content-security-policy: default-src 'none'"),
        "{head}"
    );
    ensure!(page.contains("</html>"), "the page is cut short");
    let (head, body) = raw(client, "/drex/stats", "")?;
    ensure!(
        head.starts_with("HTTP/1.1 401"),
        "without a key: {head} {body}"
    );
    let (head, body) = raw(client, "/drex/stats", "Authorization: Bearer secret\r\n")?;
    ensure!(
        head.starts_with("HTTP/1.1 200"),
        "with the key: {head} {body}"
    );
    let stats: Value = serde_json::from_str(&body)?;
    ensure!(stats["policy"] == "hold" && stats["tokens"] == 0, "{stats}");

    let flags = ["--drex-policy", "hold", "--sleep-idle-seconds", "1"];
    let server = suite.start(&suite.patched, 2, &flags)?;
    generate(server.client, &[greedy(&prompt(0), 20)], 1)?;
    super::profile_and_record::until_asleep(server.client)?;
    let stats = server.client.get("/drex/stats")?.ok()?.json()?;
    ensure!(stats["tokens"] == 20, "asleep: {stats}");
    Ok(())
}

fn counts(suite: &Suite) -> Result<()> {
    let flags = ["--drex-policy", "auto", "--drex-exit-layers", "4,8"];
    let more = ["--drex-threshold", "0.9,0.5", "--drex-fill", "verify"];
    let server = suite.start(&suite.patched, 4, &[&flags[..], &more].concat())?;
    let client = server.client;
    let stats = || client.get("/drex/stats")?.ok()?.json();
    let first = stats()?;
    ensure!(
        first["rule"].is_null() && first["predicted_tokens_per_second"].is_null(),
        "known at once: {first}"
    );
    let mut left = [0, 0];
    let mut tokens = 0;
    for _ in 0..8 {
        let requests: Vec<_> = (0..8).map(|i| greedy(&prompt(i), 60)).collect();
        for done in generate(client, &requests, 4)? {
            tokens += done.tokens.len() as u64;
            for (sum, n) in left.iter_mut().zip(exits(&done)) {
                *sum += n;
            }
        }
        if !stats()?["rule"].is_null() && left[0] + left[1] > 0 {
            break;
        }
    }
    let now = stats()?;
    let metrics = client.metrics()?;
    ensure!(
        now["exit_layers"] == json!([4, 8]) && now["layers"] == 16 && now["fill"] == "verify",
        "{now}"
    );
    let thresholds: Vec<_> = now["thresholds"].as_array().into_iter().flatten().collect();
    ensure!(
        thresholds
            .iter()
            .zip([0.9, 0.5])
            .all(|(t, want)| { t.as_f64().is_some_and(|t| (t - want).abs() < 1e-6) })
            && thresholds.len() == 2,
        "{thresholds:?}"
    );
    ensure!(
        now["tokens"] == tokens && now["exits"] == json!(left) && left[0] + left[1] > 0,
        "{now}, the answers say {tokens} tokens and {left:?} exits"
    );
    let rule = &now["rule"];
    let hold_rows = rule["hold_rows"].as_f64();
    ensure!(
        hold_rows.is_some() && hold_rows == metrics.get("drex_rule_hold_rows"),
        "{now}"
    );
    let looks_at: Vec<_> = metrics
        .by_label("drex_rule_ramp", "layer")
        .into_iter()
        .filter(|(_, looks)| *looks == 1.0)
        .filter_map(|(layer, _)| layer.parse::<u64>().ok())
        .collect();
    ensure!(
        rule["exit_layers"] == json!(looks_at),
        "{rule}, {looks_at:?}"
    );
    let predicted = metrics.by_label("drex_predicted_tokens_per_second", "rule");
    for (name, value) in predicted {
        let said = now["predicted_tokens_per_second"][&name].as_f64();
        ensure!(
            said.is_some_and(|s| s > 0.0 && (s - value).abs() < 1e-6 * value),
            "{name}: {said:?} instead of {value}"
        );
    }
    for (name, metric) in [
        ("prompt_tokens", "drex_prompt_tokens_total"),
        ("drafts", "drex_drafts_total"),
        ("drafts_accepted", "drex_drafts_accepted_total"),
        ("dropped_rows", "drex_dropped_rows_total"),
        ("steps", "drex_steps_total"),
        ("step_rows", "drex_step_rows_total"),
        ("graphs", "drex_graphs"),
        ("graphs_bytes", "drex_graphs_bytes"),
        ("pending_rows", "drex_pending_rows"),
        ("requests_running", "drex_requests_running"),
        ("requests_waiting", "drex_requests_waiting"),
    ] {
        let value = now[name].as_f64();
        ensure!(
            value.is_some() && value == metrics.get(metric),
            "{name} is {value:?}, {metric} {:?}",
            metrics.get(metric)
        );
    }
    Ok(())
}

/// Busy for a minute and a little more.
fn log(suite: &Suite) -> Result<()> {
    let server = suite.start(&suite.patched, 2, &["--drex-policy", "auto"])?;
    let said = || -> Vec<String> {
        let log = server.log();
        let lines = log.lines().filter(|l| l.contains("tokens/s in"));
        lines.map(str::to_owned).collect()
    };
    let start = Instant::now();
    let mut tokens = 0;
    while start.elapsed() < Duration::from_secs(64) {
        let requests: Vec<_> = (0..4).map(|i| greedy(&prompt(i), 200)).collect();
        for done in generate(server.client, &requests, 2)? {
            tokens += done.tokens.len();
        }
        ensure!(
            said().is_empty() || start.elapsed() > Duration::from_secs(59),
            "it does not wait for the minute to end"
        );
    }
    let took = start.elapsed().as_secs_f64();
    let lines = said();
    let [line] = &lines[..] else {
        anyhow::bail!("{lines:?}")
    };
    let words: Vec<_> = line.split_whitespace().collect();
    let before = |word: &str| -> Result<f64> {
        let at = words.iter().position(|w| *w == word);
        let number = words[at.context("another line")? - 1];
        number.parse().with_context(|| line.clone())
    };
    let rate = before("tokens/s")?;
    ensure!(
        (rate / (tokens as f64 / took) - 1.0).abs() < 0.2,
        "{line}: the clients got {tokens} tokens in {took:.1} s"
    );
    ensure!(
        line.contains("% after layer 8") && line.contains("times the speed of no early exit"),
        "{line}"
    );
    Ok(())
}

/// Writes a text into a field.
fn fill(browser: &mut Browser, field: &str, text: &str) -> Result<()> {
    browser.click(field)?;
    browser.write(text)
}

/// The page's script as it is seen from outside: what a person would do, and what they would see.
fn clicks(suite: &Suite) -> Result<()> {
    let program = program().context("no browser")?;
    let key = "secret";
    let flags = ["--drex-policy", "hold", "--drex-exit-layers", "4,8"];
    let more = ["--drex-threshold", "0.4", "--api-key", key];
    let server = suite.start(&suite.patched, 4, &[&flags[..], &more].concat())?;
    let url = format!("http://{}/drex", server.client.addr);
    let mut browser = Browser::start(&program)?;
    let limit = Duration::from_secs(30);
    for (width, dark) in [(1280, false), (390, true)] {
        browser.open(&url, View { width, dark })?;
        browser.evaluate("(sessionStorage.clear(), '')")?;
        browser.open(&url, View { width, dark })?;

        // A wrong key is said to be wrong, the right one opens the page.
        browser.wait("!document.getElementById('keybox').hidden", limit)?;
        fill(&mut browser, "#key", "guess")?;
        browser.click("#keep")?;
        let told = "document.getElementById('keyerror').textContent.includes('does not know')";
        browser.wait(told, limit)?;
        fill(&mut browser, "#key", key)?;
        browser.press("Enter")?;
        browser.wait("document.getElementById('keybox').hidden", limit)?;
        browser.wait(
            "document.querySelectorAll('#legend li').length === 4",
            limit,
        )?;
        let rule = browser.evaluate("document.getElementById('rule').textContent")?;
        ensure!(
            rule.contains("after layer 4 or 8 of 16") && rule.contains("is at least 0.40,"),
            "{rule}"
        );

        // An answer: coloured where tokens left, drafts struck through.
        fill(&mut browser, "#prompt", &prompt(3))?;
        browser.evaluate("(document.getElementById('fill').value = 'verify', '')")?;
        fill(&mut browser, "#n", "150")?;
        browser.click("#go")?;
        let all = "document.querySelectorAll('#answer .t').length === 150";
        browser.wait(all, limit)?;
        browser.wait("!document.getElementById('go').disabled", limit)?;
        let seen: Value = serde_json::from_str(&browser.evaluate(
            "JSON.stringify({
               coloured: [...document.querySelectorAll('#answer .t')].filter((e) => e.style.background).length,
               colours: new Set([...document.querySelectorAll('#answer .t')].map((e) => getComputedStyle(e).backgroundColor)).size,
               struck: document.querySelectorAll('#answer del').length,
               text: [...document.querySelectorAll('#answer .t')].map((e) => e.textContent).join(''),
               sum: document.getElementById('sum').textContent,
             })",
        )?)?;
        ensure!(
            seen["coloured"].as_u64() > Some(20) && seen["struck"].as_u64() > Some(0),
            "{seen}"
        );
        ensure!(seen["colours"].as_u64() >= Some(2), "{seen}");
        let sum = seen["sum"].as_str().unwrap_or_default();
        ensure!(
            sum.starts_with(&format!("150 tokens, {} left early", seen["coloured"]))
                && sum.contains(&format!("{} drafts replaced", seen["struck"])),
            "{seen}"
        );
        let mut body = greedy(&prompt(3), 150);
        body["drex_fill"] = json!("verify");
        body["ignore_eos"] = json!(false);
        let (_, answer) = post(&server, &body, key)?;
        ensure!(
            answer["content"] == seen["text"],
            "{seen} instead of {answer}"
        );

        // The keyboard goes from token to token.
        browser.click("#answer")?;
        browser.press("Home")?;
        browser.press("ArrowRight")?;
        browser.press("ArrowRight")?;
        let detail = browser.evaluate("document.getElementById('detail').textContent")?;
        ensure!(
            detail.starts_with("Token 2") || detail.starts_with("Token 3"),
            "{detail}"
        );

        // The curves move, and a long answer can be stopped.
        fill(&mut browser, "#n", "100000")?;
        browser.click("#go")?;
        browser.wait("document.querySelectorAll('#answer .t').length > 20", limit)?;
        browser.wait(
            "Number(document.querySelector('.chart .now').textContent.replace(/,/g, '')) > 0",
            limit,
        )?;
        browser.wait(
            "document.querySelectorAll('.chart path[d*=L]').length >= 4",
            limit,
        )?;
        browser.click("#stop")?;
        browser.wait("!document.getElementById('go').disabled", limit)?;
        let error = browser.evaluate("document.getElementById('error').textContent")?;
        ensure!(error.is_empty(), "stopped: {error}");

        // What the server refuses is said in its own words.
        fill(&mut browser, "#threshold", "0.5")?;
        browser.evaluate("(document.getElementById('threshold').max = '', '')")?;
        browser.write("-1")?;
        browser.evaluate("(document.getElementById('threshold').min = '', '')")?;
        browser.click("#go")?;
        browser.wait(
            "document.getElementById('error').textContent.includes('drex_threshold')",
            limit,
        )?;

        // The page fits, and asks nobody else.
        let fit: Value = serde_json::from_str(&browser.evaluate(
            "JSON.stringify({
               wide: document.documentElement.scrollWidth > innerWidth + 1,
               other: performance.getEntriesByType('resource').map((e) => e.name).filter((n) => !n.startsWith(location.origin)),
             })",
        )?)?;
        ensure!(
            fit["wide"] == false && fit["other"] == json!([]),
            "{width}: {fit}"
        );
        if let Some(folder) = std::env::var_os("DREX_PAGES_OUT") {
            fill(&mut browser, "#threshold", "0.4")?;
            fill(&mut browser, "#n", "150")?;
            browser.click("#go")?;
            browser.wait(all, limit)?;
            thread::sleep(Duration::from_secs(2));
            let height = browser.evaluate("String(document.documentElement.scrollHeight)")?;
            let picture = browser.picture(width, height.parse()?)?;
            let name = format!(
                "drex-{width}-{}.png.base64",
                if dark { "dark" } else { "light" }
            );
            std::fs::write(std::path::Path::new(&folder).join(name), picture)?;
        }
    }
    shows_rule(suite, &mut browser)
}

/// The rule of policy `auto`, and its prediction beside what there is.
fn shows_rule(suite: &Suite, browser: &mut Browser) -> Result<()> {
    let flags = ["--drex-policy", "auto", "--drex-exit-layers", "4,8"];
    let more = ["--drex-threshold", "0.9,0.5"];
    let server = suite.start(&suite.patched, 4, &[&flags[..], &more].concat())?;
    let url = format!("http://{}/drex", server.client.addr);
    let view = View {
        width: 768,
        dark: false,
    };
    let limit = Duration::from_secs(30);
    browser.open(&url, view)?;
    let rule = "document.getElementById('rule').textContent";
    browser.wait(
        &format!("{rule}.includes('has not chosen a rule yet')"),
        limit,
    )?;
    let stats = || server.client.get("/drex/stats")?.ok()?.json();
    for _ in 0..20 {
        let requests: Vec<_> = (0..8).map(|i| greedy(&prompt(i), 60)).collect();
        generate(server.client, &requests, 4)?;
        if !stats()?["rule"].is_null() {
            break;
        }
    }
    browser.wait(
        &format!("{rule}.includes('Prediction of the last search')"),
        limit,
    )?;
    let now = stats()?;
    let said = match now["rule"]["exit_layers"].as_array().map(Vec::as_slice) {
        Some([]) => "All rows run all 16 layers".to_owned(),
        Some([layer]) => format!("rows may leave after layer {layer} of 16"),
        Some([_, _]) => "rows may leave after layer 4 or 8 of 16".to_owned(),
        _ => anyhow::bail!("{now}"),
    };
    // Nothing runs any more, so the next look at the server is the last change.
    browser.wait(&format!("{rule}.includes({})", json!(said)), limit)?;
    let dashed = "document.querySelectorAll('.chart path[style*=dasharray][d*=M]').length === 1";
    browser.wait(dashed, limit)?;
    // A server that has gone is told of.
    server.stop(limit)?;
    let told = "document.getElementById('state').textContent.includes('does not answer')";
    browser.wait(told, limit)
}

/// A request with a key.
fn post(server: &Server, body: &Value, key: &str) -> Result<(String, Value)> {
    let body = body.to_string();
    let mut stream = TcpStream::connect(server.client.addr)?;
    let request = format!(
        "POST /completion HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no head")?;
    Ok((head.to_owned(), serde_json::from_str(body)?))
}
