// SPDX-License-Identifier: Apache-2.0

//! No panic leaves a call: neither one of drex, nor one of a watching host.

mod common;
mod headers;

use std::panic;
use std::path::Path;
use std::ptr::null_mut;

use common::*;
use tracing::span;

/// A Rust host's subscriber with a bug.
struct Broken;

impl tracing::Subscriber for Broken {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        panic!("subscriber got a {}", event.metadata().level());
    }
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

#[test]
fn a_subscriber_that_panics_poisons_its_engine_and_nothing_else() {
    let ramps = [4];
    let c = config(&ramps, 2, 2, DREX_POLICY_HOLD);
    let (refused, served, other) = (Engine::new(&c), Engine::new(&c), Engine::new(&c));
    served.add(1).unwrap();
    served.ready(1, 0).unwrap();
    panic::set_hook(Box::new(|_| {}));
    let poisoned = Err(Failed(DREX_ERROR_PANIC));
    tracing::subscriber::with_default(Broken, || {
        // Who watches is looked for at a plan; one without rows says nothing.
        refused.plan(0, 2).unwrap();
        // In the event of a refused call, after its body.
        assert_eq!(refused.remove(9), poisoned);
        assert_eq!(
            text(),
            "drex_request_remove: internal error: subscriber got a WARN"
        );
        // Within a call's body.
        assert_eq!(served.plan(0, 2).unwrap_err(), Failed(DREX_ERROR_PANIC));
        assert!(text().contains("subscriber got a TRACE"), "{}", text());
        // While an engine is made: it is gone, and nothing was written.
        let mut raw = null_mut();
        // SAFETY: valid pointers.
        assert_eq!(ok(unsafe { drex_create(&c, &mut raw) }), poisoned);
        assert!(raw.is_null());
    });
    for engine in [&refused, &served] {
        assert_eq!(engine.add(5), poisoned);
        assert!(text().contains("expected its destruction"), "{}", text());
        // SAFETY: a handle.
        ok(unsafe { drex_destroy(engine.raw) }).unwrap();
        assert_eq!(engine.add(5), Err(Failed(DREX_ERROR_INVALID_HANDLE)));
    }
    other.add(1).unwrap();
    let _ = panic::take_hook();
}

/// Functions that cannot fail, and look something up in a constant table.
const WITHOUT: [&str; 11] = [
    "drex_version",
    "drex_abi_version",
    "drex_status_name",
    "drex_status_text",
    "drex_last_error",
    "drex_policy_name",
    "drex_metric_name",
    "drex_fill_name",
    "drex_decision_name",
    "drex_flush_reason_name",
    "drex_miss_reason_name",
];

/// Every exported function is one expression: a call of what has the boundary.
#[test]
fn every_function_goes_through_the_boundary() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let header = std::fs::read_to_string(root.join("include/drex.h")).unwrap();
    let header = headers::Header::parse(&header);
    let mut missing: Vec<&str> = header.functions().collect();
    for file in std::fs::read_dir(root.join("src/ffi")).unwrap() {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        for part in text.split("#[unsafe(no_mangle)]\n").skip(1) {
            let (head, rest) = part.split_once(" {\n").unwrap();
            let body = rest.split("\n}\n").next().unwrap();
            let name = head.split_once("extern \"C\" fn ").unwrap().1;
            let name = name.split('(').next().unwrap();
            let lines = body.lines().map(str::trim);
            let code: String = lines.filter(|l| !l.starts_with("//")).collect();
            let code = code.strip_prefix("unsafe {").unwrap_or(&code).trim_start();
            let guarded = ["call", "with", "copy_rows"]
                .iter()
                .any(|f| code.starts_with(&format!("{f}(\"{name}\",")));
            // And it is the whole body: nothing runs after it.
            let whole = body.lines().filter(|l| l.starts_with("    }")).count() == 1
                || !body.contains("\n    }");
            let known = WITHOUT.contains(&name);
            assert!(known || (guarded && whole), "{name}: {body}");
            assert!(!(known && guarded), "{name} need not be listed");
            missing.retain(|m| *m != name);
        }
    }
    assert_eq!(missing, Vec::<&str>::new(), "declared, and not found");
    for name in WITHOUT {
        assert!(header.functions().any(|f| f == name), "{name}");
    }
}
