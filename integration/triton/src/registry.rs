// SPDX-License-Identifier: Apache-2.0
//! The metrics of the process: families, one for each name, and what they are made of.
//!
//! A server without metrics is no error: then there are none.

use std::ffi::CString;
use std::ptr::{null, null_mut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use drex::ffi::DREX_ABI_VERSION;

use crate::families::{About, BUILD, FAMILIES, OTHERS};
use crate::triton::abi;
use crate::triton::error::check;

#[derive(Default)]
struct Registry {
    /// Without those that the server refused.
    families: Vec<(&'static str, *mut abi::MetricFamily)>,
    build: Option<Metric>,
}
// SAFETY: Triton's metrics may be used from any thread.
unsafe impl Send for Registry {}

/// There is one for the process: two families of one name would be an error.
static MADE: Mutex<Registry> = Mutex::new(Registry {
    families: Vec::new(),
    build: None,
});

fn made() -> MutexGuard<'static, Registry> {
    MADE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes the families, when the backend is loaded.
pub fn register() {
    let all = FAMILIES.iter().map(|f| (f.kind, f.name, f.help));
    // Older servers have no histograms.
    let can = |kind| kind != abi::METRIC_HISTOGRAM || abi::TRITONSERVER_MetricObserve().is_some();
    made().families = all
        .chain(OTHERS)
        .filter(|(kind, ..)| can(*kind))
        .filter_map(|(kind, name, help)| {
            let (c_name, help) = (text(name), text(help));
            let mut family = null_mut();
            // SAFETY: Triton copies the texts.
            let new = unsafe {
                check(abi::TRITONSERVER_MetricFamilyNew(
                    &mut family,
                    kind,
                    c_name.as_ptr(),
                    help.as_ptr(),
                ))
            };
            new.ok().map(|()| (name, family))
        })
        .collect();
    let labels = [
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("abi", DREX_ABI_VERSION.to_string()),
    ];
    let build = Metric::of(BUILD.1, &labels);
    if let Some(build) = &build {
        build.add(1.0);
    }
    made().build = build;
}

/// When the backend is unloaded; every other metric is gone by then.
pub fn unregister() {
    let mut made = made();
    made.build = None;
    for (_, family) in made.families.drain(..) {
        // SAFETY: made above, deleted once.
        let _ = unsafe { check(abi::TRITONSERVER_MetricFamilyDelete(family)) };
    }
}

fn text(text: &str) -> CString {
    CString::new(text).unwrap_or_default()
}

pub type Label = (&'static str, String);

/// A metric of a family. Triton gives metrics of equal labels the same value.
pub struct Metric(*mut abi::Metric);
// SAFETY: as above.
unsafe impl Send for Metric {}
// SAFETY: as above.
unsafe impl Sync for Metric {}

impl Drop for Metric {
    fn drop(&mut self) {
        // SAFETY: made below, deleted once.
        let _ = unsafe { check(abi::TRITONSERVER_MetricDelete(self.0)) };
    }
}

impl Metric {
    /// None: the server refused it, or has no such family.
    pub fn of(family: &str, labels: &[Label]) -> Option<Self> {
        make(family, labels, null())
    }

    /// `bounds` as Prometheus has them: each belongs to the bucket below it.
    pub fn histogram(about: About, labels: &[Label], bounds: &[f64]) -> Option<Self> {
        let new = abi::TRITONSERVER_MetricArgsNew()?;
        let set = abi::TRITONSERVER_MetricArgsSetHistogram()?;
        let delete = abi::TRITONSERVER_MetricArgsDelete()?;
        let mut args = null_mut();
        // SAFETY: Triton copies the bounds; the arguments are deleted after the metric is made.
        unsafe {
            check(new(&mut args)).ok()?;
            let metric = check(set(args, bounds.as_ptr(), bounds.len() as u64))
                .ok()
                .and_then(|()| make(about.1, labels, args));
            let _ = check(delete(args));
            metric
        }
    }

    /// Whether it was added.
    pub fn add(&self, change: f64) -> bool {
        // SAFETY: the metric lives as long as this.
        unsafe { check(abi::TRITONSERVER_MetricIncrement(self.0, change)) }.is_ok()
    }

    /// To a histogram.
    pub fn observe(&self, value: f64) {
        if let Some(observe) = abi::TRITONSERVER_MetricObserve() {
            // SAFETY: the metric lives as long as this.
            let _ = unsafe { check(observe(self.0, value)) };
        }
    }
}

/// `args` NULL: none.
fn make(family: &str, labels: &[Label], args: *const abi::MetricArgs) -> Option<Metric> {
    let family = {
        let made = made();
        made.families.iter().find(|(name, _)| *name == family)?.1
    };
    let mut metric = null_mut();
    // SAFETY: Triton copies the texts; labels are deleted after the metric is made.
    unsafe {
        let labels: Vec<*const abi::Parameter> = labels
            .iter()
            .map(|(name, value)| {
                let (name, value) = (text(name), text(value));
                abi::TRITONSERVER_ParameterNew(
                    name.as_ptr(),
                    abi::PARAMETER_STRING,
                    value.as_ptr().cast(),
                )
                .cast_const()
            })
            .collect();
        let (list, count) = (labels.as_ptr(), labels.len() as u64);
        let made = if args.is_null() {
            check(abi::TRITONSERVER_MetricNew(
                &mut metric,
                family,
                list,
                count,
            ))
            .ok()
        } else {
            abi::TRITONSERVER_MetricNewWithArgs()
                .and_then(|new| check(new(&mut metric, family, list, count, args)).ok())
        };
        for label in labels {
            abi::TRITONSERVER_ParameterDelete(label.cast_mut());
        }
        made.map(|()| Metric(metric))
    }
}
