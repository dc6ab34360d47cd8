// SPDX-License-Identifier: Apache-2.0

//! A target agreement: the promise holds over text that changes, and it pays where compute bounds the time.

use drex_sim::agreement::{Options, promises, speed};
use drex_sim::profiles::CLASSES;

const O: Options = Options {
    tokens: 120_000,
    seed: 1,
    noise: 0.1,
};

#[test]
fn the_promise_is_kept_where_text_changes() {
    for p in promises(3, &O, |_, _| ()).unwrap() {
        assert!(p.kept == p.runs, "{p:?}");
        // Else nothing was tried, and nothing could break.
        assert!(p.audited > 0 || p.target > 0.99, "{p:?}");
        assert!(1.0 - p.least < 1.3 * (1.0 - p.target), "{p:?}");
    }
}

#[test]
fn a_target_is_never_much_slower_than_lossless_and_pays_where_compute_bounds_the_time() {
    for class in CLASSES {
        let s = speed(class, ("little", 0.01), 0.95, &O).unwrap();
        assert!(
            s.vs_lossless() > 0.95,
            "{}: {}",
            class.name,
            s.vs_lossless()
        );
        if class.name == "compute" {
            assert!(s.vs_off() > 1.15, "{}", s.vs_off());
            assert!(s.report.audited > 0);
        }
        assert_eq!(s.report.involuntary_exits, 0);
    }
}
