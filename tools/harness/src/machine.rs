// SPDX-License-Identifier: Apache-2.0

//! The machine that measures.

use std::{fs, time::Duration};

/// Its processor, number of cores and system.
pub fn name() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = cpu
        .lines()
        .find_map(|line| {
            line.strip_prefix("model name")?
                .split_once(':')
                .map(|(_, name)| name.trim().to_owned())
        })
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let cores = std::thread::available_parallelism().map_or(1, Into::into);
    format!("{name}, {cores} cores, {}", std::env::consts::OS)
}

/// Threads that compute where nothing else is said: all cores but one, which the client needs.
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get().saturating_sub(1).max(1))
}

/// Says so where other programs run.
pub fn warn_if_busy() {
    if let Some(busy) = busy().filter(|busy| *busy > 0.15) {
        eprintln!(
            "warning: other programs keep {:.0} % of this machine busy; nothing measured now means much",
            busy * 100.0
        );
    }
}

/// The share of all cores that something is running on.
fn busy() -> Option<f64> {
    let read = || -> Option<(u64, u64)> {
        let stat = fs::read_to_string("/proc/stat").ok()?;
        let times: Vec<u64> = stat
            .lines()
            .next()?
            .split_whitespace()
            .skip(1)
            .filter_map(|t| t.parse().ok())
            .collect();
        Some((times.iter().take(8).sum(), times.get(3)? + times.get(4)?))
    };
    let (total, idle) = read()?;
    std::thread::sleep(Duration::from_millis(500));
    let (total2, idle2) = read()?;
    Some(1.0 - idle2.saturating_sub(idle) as f64 / (total2 - total).max(1) as f64)
}
