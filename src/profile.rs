// SPDX-License-Identifier: Apache-2.0

//! A cost profile as JSON: what `drex_profile_save` writes and
//! `drex_profile_load` and the simulator read.

use serde_json::{Value, json};

use crate::core::estimate::profile::{Line, MAX_NS, Profile, Segment, Window};

/// The format's version, under this key.
const KEY: &str = "drex_profile";
const VERSION: u64 = 1;

pub fn to_json(p: &Profile) -> String {
    let line = |l: &Line| json!({"ns": l.ns, "ns_per_row": l.ns_per_row});
    let segments: Vec<Value> = p
        .segments
        .iter()
        .map(|s| {
            json!({
                "ns": s.ns, "ns_per_row": s.ns_per_row, "ns_per_prompt_row": s.ns_per_prompt_row,
                "ns_per_cell": s.ns_per_cell,
            })
        })
        .collect();
    json!({
        KEY: VERSION,
        "n_layers": p.n_layers,
        "ramp_layers": p.ramp_layers,
        "window": {
            "ns": p.window.ns, "ns_per_row": p.window.ns_per_row,
            "ns_per_prompt_row": p.window.ns_per_prompt_row,
        },
        "ramp": line(&p.ramp),
        "segments": segments,
    })
    .to_string()
}

/// The error names the field and what was expected of it.
pub fn from_json(text: &str) -> Result<Profile, String> {
    let root: Value = serde_json::from_str(text).map_err(|e| format!("not JSON: {e}"))?;
    if root.get(KEY).and_then(Value::as_u64) != Some(VERSION) {
        let got = root.get(KEY).unwrap_or(&Value::Null);
        return Err(format!("{KEY} is {got}; expected {VERSION}"));
    }
    let n_layers = int(&root, "n_layers")?;
    let ramps = array(&root, "ramp_layers")?;
    let ramp_layers: Vec<u32> = ramps
        .iter()
        .enumerate()
        .map(|(i, v)| whole(v, &format!("ramp_layers[{i}]")))
        .collect::<Result<_, _>>()?;
    let mut before = 0;
    for (i, &l) in ramp_layers.iter().enumerate() {
        if l <= before || l >= n_layers {
            return Err(format!(
                "ramp_layers[{i}] is {l}; expected increasing numbers in 1..{}",
                n_layers.saturating_sub(1)
            ));
        }
        before = l;
    }
    let mut segments = Vec::new();
    for (i, v) in array(&root, "segments")?.iter().enumerate() {
        let name = format!("segments[{i}]");
        let at = |key| number(v, &name, key);
        let ns_per_row = at("ns_per_row")?;
        segments.push(Segment {
            ns: at("ns")?,
            ns_per_row,
            ns_per_prompt_row: per_prompt_row(v, &name, ns_per_row)?,
            ns_per_cell: at("ns_per_cell")?,
        });
    }
    let line = |key: &str| -> Result<Line, String> {
        let v = root.get(key).unwrap_or(&Value::Null);
        Ok(Line {
            ns: number(v, key, "ns")?,
            ns_per_row: number(v, key, "ns_per_row")?,
        })
    };
    let window = line("window")?;
    let per_prompt = root.get("window").unwrap_or(&Value::Null);
    let profile = Profile {
        n_layers,
        ramp_layers,
        window: Window {
            ns: window.ns,
            ns_per_row: window.ns_per_row,
            ns_per_prompt_row: per_prompt_row(per_prompt, "window", window.ns_per_row)?,
        },
        ramp: line("ramp")?,
        segments,
    };
    profile.validate().map_err(|e| e.to_string())?;
    if profile.time(0, profile.segments.len(), 1.0, 0.0) <= 0.0 {
        return Err("segments say that a full pass takes no time".into());
    }
    Ok(profile)
}

fn whole(v: &Value, name: &str) -> Result<u32, String> {
    v.as_u64()
        .and_then(|n| u32::try_from(n).ok())
        .ok_or_else(|| format!("{name} is {v}; expected a whole number"))
}

fn int(root: &Value, key: &str) -> Result<u32, String> {
    whole(root.get(key).unwrap_or(&Value::Null), key)
}

fn array<'a>(root: &'a Value, key: &str) -> Result<&'a Vec<Value>, String> {
    let v = root.get(key).unwrap_or(&Value::Null);
    v.as_array()
        .ok_or_else(|| format!("{key} is {v}; expected an array"))
}

fn number(v: &Value, name: &str, key: &str) -> Result<f64, String> {
    let n = v.get(key).unwrap_or(&Value::Null);
    match n.as_f64() {
        Some(x) if (0.0..=MAX_NS).contains(&x) => Ok(x),
        _ => Err(format!(
            "{name}.{key} is {n}; expected a number from 0 to {MAX_NS:e}"
        )),
    }
}

/// A file may lack it: a prompt row then costs what a decode row costs.
fn per_prompt_row(v: &Value, name: &str, ns_per_row: f64) -> Result<f64, String> {
    const KEY: &str = "ns_per_prompt_row";
    match v.get(KEY) {
        None => Ok(ns_per_row),
        Some(_) => number(v, name, KEY),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_errors() {
        let p = Profile {
            n_layers: 16,
            ramp_layers: vec![4, 8],
            window: Window {
                ns: 1.5,
                ns_per_row: 0.25,
                ns_per_prompt_row: 0.75,
            },
            ramp: Line {
                ns: 2e6,
                ns_per_row: 0.0,
            },
            segments: vec![
                Segment {
                    ns: 1.0,
                    ns_per_row: 2.0,
                    ns_per_prompt_row: 1.75,
                    ns_per_cell: 0.125
                };
                3
            ],
        };
        let text = to_json(&p);
        assert_eq!(from_json(&text).unwrap(), p);
        // A file of an earlier version: a prompt row costs what a row costs.
        let before = text
            .replace(",\"ns_per_prompt_row\":0.75", "")
            .replace(",\"ns_per_prompt_row\":1.75", "");
        assert!(!before.contains("prompt"), "{before}");
        let mut q = p.clone();
        q.window.ns_per_prompt_row = 0.25;
        for s in &mut q.segments {
            s.ns_per_prompt_row = 2.0;
        }
        assert_eq!(from_json(&before).unwrap(), q);
        for (from, to, says) in [
            (
                "\"drex_profile\":1",
                "\"drex_profile\":9",
                "drex_profile is 9",
            ),
            ("[4,8]", "[8,4]", "ramp_layers[1] is 4"),
            ("[4,8]", "[8]", "segments"),
            ("0.25", "-1", "window.ns_per_row is -1"),
            ("0.125", "1e308", "segments[0].ns_per_cell is 1e+308"),
            ("0.125", "null", "segments[0].ns_per_cell is null"),
            ("1.75", "\"x\"", "segments[0].ns_per_prompt_row is \"x\""),
            ("0.75", "-2", "window.ns_per_prompt_row is -2"),
            ("{\"", "", "not JSON"),
        ] {
            let bad = text.replacen(from, to, 1);
            assert_ne!(bad, text);
            let e = from_json(&bad).unwrap_err();
            assert!(e.contains(says), "{e}");
        }
    }
}
