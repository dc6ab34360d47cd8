// SPDX-License-Identifier: Apache-2.0

//! What the model is asked where nobody names a text: every form with every topic, in turn, and some plain ones between.
//!
//! Exits are fitted, judged and measured on topics of their own.

const FORMS: &str = include_str!("../prompts/forms.txt");
const TOPICS: &str = include_str!("../prompts/topics.txt");
const PLAIN: &str = include_str!("../prompts/plain.txt");

fn lines(text: &str) -> Vec<&str> {
    text.lines().filter(|l| !l.is_empty()).collect()
}

/// What prompts are for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Use {
    Fit,
    Judge,
    Measure,
}

impl Use {
    /// Of ten topics or plain prompts, eight are to fit on.
    fn has(self, i: usize) -> bool {
        self == match i % 10 {
            4 => Use::Judge,
            9 => Use::Measure,
            _ => Use::Fit,
        }
    }
}

pub fn all(of: Use) -> Vec<String> {
    let mine = |text| -> Vec<&str> {
        let all = lines(text).into_iter().enumerate();
        all.filter(|(i, _)| of.has(*i)).map(|(_, l)| l).collect()
    };
    let (forms, topics, plain) = (lines(FORMS), mine(TOPICS), mine(PLAIN));
    let each = plain.len().div_ceil(forms.len());
    let mut all = Vec::new();
    for round in 0..forms.len() {
        for (i, topic) in topics.iter().enumerate() {
            all.push(forms[(i + round) % forms.len()].replace("{topic}", topic));
        }
        let some = plain.iter().skip(round * each).take(each);
        all.extend(some.map(|p| (*p).to_owned()));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_prompt_is_another() {
        let all = [Use::Fit, Use::Judge, Use::Measure].map(all).concat();
        let n = lines(FORMS).len() * lines(TOPICS).len() + lines(PLAIN).len();
        assert_eq!(all.len(), n);
        let unique: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(unique.len(), n);
        assert!(all.iter().all(|p| !p.contains('{')));
    }
}
