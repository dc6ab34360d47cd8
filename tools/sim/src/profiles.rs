// SPDX-License-Identifier: Apache-2.0

//! Cost profiles: the bundled classes of machine, or a file.

use anyhow::{Context, Result};
use drex::core::estimate::profile::{Line, Profile, Segment, Window};

/// A pass over b rows takes `t0 + t1 b`; the ramp's head takes 2 % of `t0`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Class {
    pub name: &'static str,
    pub t0: f64,
    pub t1: f64,
}

/// A unit of time of the classes.
pub const UNIT_NS: f64 = 1e7;
const HEAD: f64 = 0.02;

pub const CLASSES: [Class; 3] = [
    Class {
        name: "memory",
        t0: 1.0,
        t1: 0.002,
    },
    Class {
        name: "mixed",
        t0: 1.0,
        t1: 0.05,
    },
    Class {
        name: "compute",
        t0: 0.2,
        t1: 0.2,
    },
];

impl Class {
    /// For a model of `n_layers` layers that cost the same.
    pub fn profile(&self, n_layers: u32, ramp_layers: &[u32]) -> Profile {
        let mut bounds = vec![0];
        bounds.extend_from_slice(ramp_layers);
        bounds.push(n_layers);
        let segment = |w: &[u32]| {
            let share = f64::from(w[1] - w[0]) / f64::from(n_layers) * UNIT_NS;
            Segment {
                ns: share * self.t0,
                ns_per_row: share * self.t1,
                ns_per_prompt_row: share * self.t1,
                ns_per_cell: 0.0,
            }
        };
        Profile {
            n_layers,
            ramp_layers: ramp_layers.to_vec(),
            window: Window::default(),
            ramp: Line {
                ns: HEAD * self.t0 * UNIT_NS,
                ns_per_row: 0.0,
            },
            segments: bounds.windows(2).map(segment).collect(),
        }
    }
}

/// A class by name, or a JSON file as `drex_profile_save` writes it.
pub fn load(name: &str, n_layers: u32, ramp_layers: &[u32]) -> Result<Profile> {
    if let Some(class) = CLASSES.iter().find(|c| c.name == name) {
        return Ok(class.profile(n_layers, ramp_layers));
    }
    let text = std::fs::read_to_string(name)
        .with_context(|| format!("--profile {name}: expected memory, mixed, compute or a file"))?;
    drex::profile::from_json(&text).map_err(|e| anyhow::anyhow!("--profile {name}: {e}"))
}
