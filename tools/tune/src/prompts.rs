// SPDX-License-Identifier: Apache-2.0

//! What the model is asked where nobody names a text: every form with every topic, in turn, and some plain ones between.

const FORMS: &str = include_str!("../prompts/forms.txt");
const TOPICS: &str = include_str!("../prompts/topics.txt");
const PLAIN: &str = include_str!("../prompts/plain.txt");

fn lines(text: &str) -> Vec<&str> {
    text.lines().filter(|l| !l.is_empty()).collect()
}

pub fn all() -> Vec<String> {
    let (forms, topics, plain) = (lines(FORMS), lines(TOPICS), lines(PLAIN));
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
        let all = all();
        let n = lines(FORMS).len() * lines(TOPICS).len() + lines(PLAIN).len();
        assert_eq!(all.len(), n);
        let unique: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(unique.len(), n);
        assert!(all.iter().all(|p| !p.contains('{')));
    }
}
