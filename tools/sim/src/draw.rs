// SPDX-License-Identifier: Apache-2.0

//! Random numbers that depend on what they are for and on nothing else, so
//! that every policy meets the same tokens, arrivals and noise.

fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Uniform in [0, 1).
pub fn uniform(seed: u64, purpose: u64, a: u64, b: u64) -> f64 {
    let z = mix(mix(mix(seed ^ purpose.rotate_left(32)).wrapping_add(a)).wrapping_add(b));
    (z >> 11) as f64 / (1u64 << 53) as f64
}

/// Standard normal, by Box and Muller.
pub fn normal(seed: u64, purpose: u64, a: u64) -> f64 {
    let u = 1.0 - uniform(seed, purpose, a, 1);
    let v = uniform(seed, purpose, a, 2);
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// Exponential with mean 1.
pub fn exponential(seed: u64, purpose: u64, a: u64) -> f64 {
    -(1.0 - uniform(seed, purpose, a, 1)).ln()
}

/// What a number is for.
pub mod purpose {
    pub const EXIT: u64 = 1;
    pub const REQUEST: u64 = 2;
    pub const LENGTH: u64 = 3;
    pub const ARRIVAL: u64 = 4;
    pub const NOISE: u64 = 5;
    pub const OUTLIER: u64 = 6;
    pub const PRIORITY: u64 = 7;
    pub const UNKNOWN: u64 = 8;
    pub const ACCEPT: u64 = 9;
    pub const PROMPT: u64 = 10;
    pub const HARM: u64 = 11;
}
