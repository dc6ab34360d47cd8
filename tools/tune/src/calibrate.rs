// SPDX-License-Identifier: Apache-2.0

//! From a confidence to the chance that the full model agrees: Platt's scaling of its log odds.

use drex::core::calibration::{Platt, log_odds};

pub const NONE: Platt = Platt {
    scale: 1.0,
    shift: 0.0,
};

/// A smaller scale would make confidences of a useless exit all the same.
const LEAST_SCALE: f64 = 0.01;

fn chance(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// The likeliest scaling for these confidences and outcomes: logistic regression by Newton's method, with Platt's prior
/// counts, so that a sample without errors gives no certainty.
pub fn fit(pairs: &[(f32, bool)]) -> Platt {
    let right = pairs.iter().filter(|p| p.1).count() as f64;
    let wrong = pairs.len() as f64 - right;
    let yes = (right + 1.0) / (right + 2.0);
    let no = 1.0 / (wrong + 2.0);
    let (mut a, mut b) = (1.0f64, 0.0f64);
    for _ in 0..50 {
        let (mut ga, mut gb) = (0.0, 0.0);
        let (mut haa, mut hab, mut hbb) = (1e-9, 0.0, 1e-9);
        for &(confidence, is_right) in pairs {
            let x = log_odds(confidence);
            let p = chance(a * x + b);
            let error = p - if is_right { yes } else { no };
            let w = p * (1.0 - p);
            ga += error * x;
            gb += error;
            haa += w * x * x;
            hab += w * x;
            hbb += w;
        }
        let det = haa * hbb - hab * hab;
        if det.abs() < 1e-12 {
            break;
        }
        let da = ((hbb * ga - hab * gb) / det).clamp(-1.0, 1.0);
        let db = ((haa * gb - hab * ga) / det).clamp(-2.0, 2.0);
        a -= da;
        b -= db;
        if da.abs() + db.abs() < 1e-8 {
            break;
        }
    }
    if a < LEAST_SCALE {
        a = LEAST_SCALE;
        b = shift(pairs, a, yes, no);
    }
    Platt {
        scale: a as f32,
        shift: b.clamp(-30.0, 30.0) as f32,
    }
}

/// The likeliest shift for a scale.
fn shift(pairs: &[(f32, bool)], scale: f64, yes: f64, no: f64) -> f64 {
    let mut b = 0.0f64;
    for _ in 0..50 {
        let (mut g, mut h) = (0.0, 1e-9);
        for &(confidence, is_right) in pairs {
            let p = chance(scale * log_odds(confidence) + b);
            g += p - if is_right { yes } else { no };
            h += p * (1.0 - p);
        }
        b -= (g / h).clamp(-2.0, 2.0);
    }
    b
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quality::calibration_error;

    #[test]
    fn an_overconfident_exit_is_brought_down() {
        // Confidence c is right in c^2 of the cases.
        let mut pairs = Vec::new();
        let mut k = 7u64;
        for i in 0..40_000 {
            k = k
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let u = (k >> 11) as f64 / (1u64 << 53) as f64;
            let c = (i % 1000) as f64 / 1000.0;
            pairs.push((c as f32, u < c * c));
        }
        let before = calibration_error(pairs.iter().copied());
        let fitted = fit(&pairs);
        let after = calibration_error(pairs.iter().map(|p| (fitted.apply(p.0), p.1)));
        assert!(before > 0.15 && after < 0.03, "{before} {after} {fitted:?}");
        for w in [0.1, 0.5, 0.9] {
            assert!(fitted.apply(w) < fitted.apply(w + 0.05), "{fitted:?}");
        }
    }

    /// The surer, the more often wrong: no scaling keeps the order and is right, but the chance of all of them is known.
    #[test]
    fn a_useless_exit_has_the_chance_of_its_samples() {
        let pairs: Vec<(f32, bool)> = (0..1000)
            .map(|i| {
                let right = i % 2 == 0;
                (if right { 0.88 } else { 0.93 }, right)
            })
            .collect();
        let fitted = fit(&pairs);
        assert!(fitted.scale > 0.0, "{fitted:?}");
        for (c, _) in pairs {
            assert!((fitted.apply(c) - 0.5).abs() < 0.02, "{fitted:?}");
        }
    }

    #[test]
    fn samples_without_errors_give_no_certainty() {
        let fitted = fit(&[(0.5, true); 10]);
        let sure = fitted.apply(0.5);
        assert!(sure > 0.8 && sure < 0.95, "{sure}");
    }
}
