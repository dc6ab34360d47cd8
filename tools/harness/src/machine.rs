// SPDX-License-Identifier: Apache-2.0

//! The machine that measures.

use std::{fs, time::Duration};

/// Its processor, number of cores and system.
pub fn name() -> String {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
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

/// Warns where other programs run.
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
    let (all, running) = core_ticks()?;
    std::thread::sleep(Duration::from_millis(500));
    let (all_then, running_then) = core_ticks()?;
    Some((running_then - running) / (all_then - all).max(1.0))
}

/// Seconds of all cores together that something ran on; 0 where there is no `/proc`.
pub fn busy_seconds() -> f64 {
    core_ticks().map_or(0.0, |(_, running)| running) / ticks_per_second()
}

/// Seconds of a core that a process used, its threads together; 0 where there is no `/proc`.
pub fn cpu_seconds(pid: u32) -> f64 {
    let read = || -> Option<f64> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name may hold blanks and brackets; it ends at the last one.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        Some(fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?)
    };
    read().unwrap_or(0.0) / ticks_per_second()
}

/// Ticks of all cores together since the start: all of them, and those in which something ran, what a hypervisor took
/// included.
fn core_ticks() -> Option<(f64, f64)> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let times: Vec<f64> = stat
        .lines()
        .next()?
        .split_whitespace()
        .skip(1)
        .take(8)
        .filter_map(|t| t.parse().ok())
        .collect();
    let all = times.iter().sum::<f64>();
    Some((all, all - times.get(3)? - times.get(4)?))
}

fn ticks_per_second() -> f64 {
    // SAFETY: a question without arguments by reference.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    if ticks > 0 { ticks as f64 } else { 100.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn the_time_of_a_process_grows_while_it_works() {
        let before = (cpu_seconds(std::process::id()), busy_seconds());
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(120) {
            std::hint::black_box(cpu_seconds(1));
        }
        assert!(cpu_seconds(std::process::id()) > before.0);
        assert!(busy_seconds() > before.1);
    }
}
