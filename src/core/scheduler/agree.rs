// SPDX-License-Identifier: Apache-2.0

//! Requests with a target agreement: how each is served, and its audit.

use super::Scheduler;
use crate::core::config::{Fill, Quality};
use crate::core::error::{Error, Result};
use crate::core::estimate::acceptance::Cycle;
use crate::core::estimate::agreement::{self, Agreement, Prices, RUNGS, Terms};
use crate::core::estimate::reliability::bin;
use crate::core::policy::rule::SURVIVAL;
use crate::core::rows::requests::RequestConfig;

/// Rows that an audit's pass is thought to have, where as many fit into one.
const AUDIT_ROWS: u32 = 128;

/// How a request is served, as far as its quality decides it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Serving {
    pub fill: Fill,
    pub threshold: Option<f32>,
    pub learns: bool,
    /// Nothing of its answer differs from the full model's.
    pub lossless: bool,
    pub terms: Option<Terms>,
}

/// Predicted time of a token where `rows` requests fit into one window, of whose rows a
/// share exits, and the others are held until enough of them are. A cycle begins with
/// no row held: each window leaves the share in it, so that of n rows h are held after
/// ln(1 - h/n) / ln(exits) windows, and the tokens until then, with those of the deep
/// window, are h / (1 - exits).
fn held_price(
    rows: f64,
    exits: f64,
    shallow: impl Fn(f64) -> f64,
    deep: impl Fn(f64) -> f64,
) -> f64 {
    let exits = exits.clamp(0.01, 0.99);
    let price = |share: f64| {
        let held = (share * rows).max(1.0);
        let left = (1.0 - held / rows).max(0.5 / rows);
        let windows = (left.ln() / exits.ln()).max(1.0);
        // The mean of the rows of its windows.
        let mean = 0.5 * (rows + rows * left);
        (windows * shallow(mean) + deep(held)) * (1.0 - exits) / held
    };
    let shares = [0.25, 0.5, 0.75, 1.0].map(price);
    shares.into_iter().fold(f64::INFINITY, f64::min)
}

impl Scheduler {
    pub fn agreement(&self) -> &Agreement {
        &self.agreement
    }

    /// Index of the target that was last asked for, or the engine's; `None`: there
    /// has been none.
    pub fn target(&self) -> Option<u8> {
        self.target
    }

    /// Checks what the request says of its quality and how its holes are filled.
    /// Thresholds and a fill that it names go before the engine's quality, and clash
    /// with its own.
    pub(super) fn quality_of(&self, request: &RequestConfig) -> Result<Quality> {
        let quality = request.quality.unwrap_or(self.config.quality);
        let own = request.quality.is_some();
        match (quality, request.fill) {
            (Quality::Lossless, Some(f)) if own && f != Fill::Verify => {
                return Err(Error::int(
                    "fill",
                    f as u32,
                    "DREX_FILL_VERIFY or DREX_FILL_DEFAULT, since quality is 1",
                ));
            }
            (Quality::Agreement(_), _) if own && request.threshold.is_some() => {
                return Err(Error::float(
                    "threshold",
                    request.threshold.unwrap_or(f32::NAN),
                    "NaN, since quality names an agreement, which thresholds follow from",
                ));
            }
            _ => {}
        }
        let named = match quality {
            Quality::Agreement(_) => request.fill.is_some() || request.threshold.is_some(),
            _ => request.fill.is_some_and(|f| f != Fill::Verify),
        };
        Ok(match named && !own {
            true => Quality::Given,
            false => quality,
        })
    }

    /// How the request is served. Draws whether it is audited, so what comes out must
    /// be entered.
    pub(super) fn serve(&mut self, request: &RequestConfig, quality: Quality) -> Serving {
        // Confidences of different metrics are worth different chances.
        let usual = request.metric.is_none_or(|m| m == self.config.metric);
        let fill = request.fill.unwrap_or(self.config.fill_of(quality));
        let mut serving = Serving {
            fill,
            threshold: request.threshold,
            learns: quality == Quality::Lossless && request.threshold.is_none() && usual,
            lossless: fill == Fill::Verify,
            terms: None,
        };
        let Quality::Agreement(target) = quality else {
            return serving;
        };
        self.target = Some(target);
        if usual && fill != Fill::Verify {
            let prices = self.prices();
            let draws = [self.rng.share(), self.rng.share()];
            let terms = self
                .agreement
                .admit(target, request.max_tokens, &prices, draws);
            serving.terms = Some(terms);
            serving.threshold = agreement::floor(terms.rung);
        }
        if serving.threshold.is_none() {
            serving.lossless = true;
            if self.config.pending() > 0 {
                serving.fill = Fill::Verify;
                serving.learns = usual;
            } else {
                // Without room for drafts, only who does not exit is like the full model.
                serving.threshold = Some(f32::INFINITY);
            }
        }
        serving
    }

    /// Predicted time of a token at each rung, where all requests are served so. While
    /// nothing is known, as if only rows cost time.
    fn prices(&self) -> Prices {
        let batch = self.config.batch();
        let b = self.decoding.clamp(1, batch) as u32;
        let rows = f64::from(b);
        let last = self.config.n_layers;
        let full = self.cost.predict(0, last, b).unwrap_or(rows);
        let mut token = [full / rows; RUNGS];
        for (ramp, &layer) in self.config.ramp_layers.iter().enumerate() {
            let share = f64::from(layer) / f64::from(last);
            let whole = |rows: f64| rows.round().max(1.0) as u32;
            let shallow = |rows: f64| {
                let known = self.cost.predict(0, layer, whole(rows));
                known.unwrap_or(share * rows)
            };
            let deep = |rows: f64| {
                let known = self.cost.remaining(layer, whole(rows));
                known.unwrap_or((1.0 - share) * rows)
            };
            let spread = self.reliability.spread(None, ramp);
            for (rung, ns) in token.iter_mut().enumerate() {
                let time = match agreement::floor(rung as u8) {
                    Some(floor) => {
                        let exits: f64 = spread.share[bin(floor).into()..].iter().sum();
                        // More requests than fit into a batch fill deep ones, too.
                        let dense = (shallow(rows) + (1.0 - exits) * deep(rows)) / rows;
                        match self.decoding >= 2 * batch {
                            true => dense,
                            false => held_price(rows, exits, shallow, deep),
                        }
                    }
                    None => {
                        let from = spread.from(SURVIVAL);
                        let drafts: f64 = spread.share[from..].iter().sum();
                        let stand = spread.share.iter().zip(&spread.chance).skip(from);
                        let stand: f64 = stand.map(|(s, &c)| s * f64::from(c)).sum();
                        let stand = stand / drafts.max(f64::MIN_POSITIVE);
                        let chain = |most: u32| {
                            let cycle = Cycle::new(drafts, most, stand);
                            let all = 1.0 + cycle.rows;
                            let time = all * shallow(rows) + deep(rows * all);
                            time / (rows * all * cycle.worth)
                        };
                        let chains = (1..=self.config.pending()).map(chain);
                        chains.fold(f64::INFINITY, f64::min)
                    }
                };
                *ns = ns.min(time);
            }
        }
        let in_one = AUDIT_ROWS.min(self.config.pass_rows() as u32);
        let audit = self.cost.predict(0, last, in_one);
        Prices {
            token,
            audit: audit.map_or(1.0, |ns| ns / f64::from(in_one)),
        }
    }

    /// The request's answer is to be audited, so far as it goes.
    pub fn audit_due(&self, id: u64) -> Result<bool> {
        let r = self.request(id)?;
        let chosen = r.terms.is_some_and(|t| t.audit > 0.0);
        Ok(chosen && r.tokens > 0 && r.audited.is_none())
    }

    /// The full model has read so many tokens of the request's answer, and would have
    /// chosen `differing` of them otherwise.
    pub fn audit(&mut self, id: u64, tokens: u64, differing: u64) -> Result<()> {
        if !self.audit_due(id)? {
            return Err(Error::CallOrder(
                "the request is not to be audited; see drex_request_info.audit_due",
            ));
        }
        if differing > tokens {
            return Err(Error::Conflict {
                field: "n_differing",
                index: None,
                value: differing,
                other: "n_tokens",
                other_value: tokens,
                why: "only tokens that were compared can differ",
            });
        }
        let i = self.requests.find(id)?;
        let r = self.requests.get_mut(i);
        // The first token is the prompt's, and a host may compare it, too.
        if tokens == 0 || tokens > r.tokens + 1 {
            return Err(Error::Conflict {
                field: "n_tokens",
                index: None,
                value: tokens,
                other: "the request's tokens",
                other_value: r.tokens,
                why: "at least one is compared, and at most all",
            });
        }
        r.audited = Some((tokens, differing));
        // The time since the last window was not the host's own work.
        self.host_time.idle();
        Ok(())
    }
}
