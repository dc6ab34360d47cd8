// SPDX-License-Identifier: Apache-2.0

//! Confidences as chances that the full model agrees.

use super::error::{Error, Result};
use super::metric::Metric;

/// Platt's scaling of a confidence's log odds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Platt {
    pub scale: f32,
    pub shift: f32,
}

/// Distance that confidences keep from 0 and 1, whose log odds are infinite.
const EDGE: f64 = 1e-6;

/// NaN stays NaN.
pub fn log_odds(confidence: f32) -> f64 {
    let c = f64::from(confidence).clamp(EDGE, 1.0 - EDGE);
    (c / (1.0 - c)).ln()
}

impl Platt {
    /// NaN stays NaN.
    pub fn apply(&self, confidence: f32) -> f32 {
        let x = f64::from(self.scale) * log_odds(confidence) + f64::from(self.shift);
        (1.0 / (1.0 + (-x).exp())) as f32
    }
}

/// A scaling for each metric.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Calibration(pub [Platt; 3]);

impl Calibration {
    pub fn validate(&self) -> Result<()> {
        for (i, p) in self.0.iter().enumerate() {
            if !(p.scale.is_finite() && p.scale > 0.0) {
                let error = Error::float(
                    "logits.calibration.scale",
                    p.scale,
                    "a finite number above 0",
                );
                return Err(error.at(i));
            }
            if !p.shift.is_finite() {
                let error = Error::float("logits.calibration.shift", p.shift, "a finite number");
                return Err(error.at(i));
            }
        }
        Ok(())
    }

    pub fn apply(&self, metric: Metric, confidence: f32) -> f32 {
        let i = match metric {
            Metric::Gap => 0,
            Metric::MaxProb => 1,
            Metric::Entropy => 2,
        };
        self.0[i].apply(confidence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odds_are_scaled_and_shifted() {
        // 0.8 has odds of 4, their square root is 2, and half of that is 1.
        let p = Platt {
            scale: 0.5,
            shift: -(2.0f32.ln()),
        };
        assert!((p.apply(0.8) - 0.5).abs() < 1e-6);
        assert!(p.apply(0.0) > 0.0 && p.apply(1.0) < 1.0);
        assert!(p.apply(f32::NAN).is_nan());
        let same = Platt {
            scale: 1.0,
            shift: 0.0,
        };
        for c in [0.001, 0.25, 0.7, 0.999] {
            assert!((same.apply(c) - c).abs() < 1e-6);
        }
    }

    #[test]
    fn order_is_kept_or_refused() {
        let with = |scale, shift| {
            let fine = Platt {
                scale: 1.0,
                shift: 0.0,
            };
            Calibration([fine, Platt { scale, shift }, fine]).validate()
        };
        assert!(with(0.1, -3.0).is_ok());
        for (scale, shift, says) in [
            (0.0, 0.0, "logits.calibration[1].scale is 0"),
            (f32::NAN, 0.0, "logits.calibration[1].scale is NaN"),
            (1.0, f32::INFINITY, "logits.calibration[1].shift is inf"),
        ] {
            let error = with(scale, shift).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
