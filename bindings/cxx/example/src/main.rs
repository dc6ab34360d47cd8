// SPDX-License-Identifier: Apache-2.0

//! A model in C++ (toy.cpp), served from Rust.

use drex_cxx::{Error, Host, Token};

const POLICY_HOLD: u32 = drex::ffi::DREX_POLICY_HOLD;

#[cxx::bridge(namespace = "toy")]
mod ffi {
    unsafe extern "C++" {
        include!("drex-cxx-example/src/toy.hpp");

        #[namespace = "drex::model"]
        type Model = drex_cxx::Model;
        fn make_toy(requests: u32, tokens: u32, fail_at: u32) -> UniquePtr<Model>;
        fn filled_right(model: &Model) -> u32;
    }
}

/// Serves requests 0.. until each has its tokens; windows that fail are tried again.
/// Returns the tokens in the order in which they came, the failures, and how many
/// tokens' K/V are right in the end.
fn serve(requests: u32, tokens: u32, fail_at: u32) -> Result<(Vec<Token>, Vec<Error>, u32), Error> {
    let model = ffi::make_toy(requests, tokens, fail_at);
    let mut host = Host::new(model, POLICY_HOLD, 0.7, requests)?;
    let mut clock = 0;
    let mut now = move || {
        clock += 1000;
        clock
    };
    for id in 0..requests {
        host.add(u64::from(id), now())?;
    }
    let mut all: Vec<Token> = Vec::new();
    let mut failures = Vec::new();
    loop {
        let first = all.len();
        match host.step(&mut now, &mut all) {
            Ok(true) => {}
            Ok(false) => break,
            Err(error) if failures.len() < 10 => failures.push(error),
            Err(error) => return Err(error),
        }
        for i in first..all.len() {
            let id = all[i].request;
            let count = all.iter().filter(|t| t.request == id).count();
            if count < tokens as usize {
                host.ready(id, now())?;
            } else {
                host.remove(id)?;
            }
        }
    }
    let right = ffi::filled_right(host.model());
    Ok((all, failures, right))
}

fn main() -> Result<(), Error> {
    let (tokens, _, right) = serve(4, 8, 0)?;
    let early = tokens.iter().filter(|t| t.ramp.is_some()).count();
    println!(
        "{} tokens, {early} of them early, {right} with the right K/V",
        tokens.len()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn streams(tokens: &[Token]) -> Vec<Vec<i32>> {
        let of = |id| tokens.iter().filter(move |t| t.request == id);
        (0..4).map(|id| of(id).map(|t| t.token).collect()).collect()
    }

    #[test]
    fn tokens_and_cache_are_what_the_model_makes() {
        let (tokens, failures, right) = serve(4, 8, 0).unwrap();
        assert!(failures.is_empty());
        assert_eq!(streams(&tokens), vec![(0..8).collect::<Vec<i32>>(); 4]);
        assert!(
            tokens
                .iter()
                .all(|t| t.ramp.is_some() == (t.token % 2 == 0))
        );
        assert_eq!(right, 32);
    }

    #[test]
    fn an_exception_loses_nothing() {
        for fail_at in 1..10 {
            let (tokens, failures, right) = serve(4, 8, fail_at).unwrap();
            assert_eq!(failures.len(), 1, "window {fail_at}");
            assert_eq!(failures[0].to_string(), "the model: out of toys");
            assert_eq!(streams(&tokens), vec![(0..8).collect::<Vec<i32>>(); 4]);
            assert_eq!(right, 32);
        }
    }

    #[test]
    fn what_drex_refuses_is_an_error() {
        match Host::new(ffi::make_toy(1, 1, 0), 99, 0.7, 1) {
            Err(Error::Drex(2, text)) => assert!(text.contains("policy is 99"), "{text}"),
            other => panic!("{:?}", other.err()),
        }
    }
}
