// SPDX-License-Identifier: Apache-2.0

//! The table of handles when it is full. On its own, since engines count per
//! process.

mod common;

use common::*;

#[test]
fn there_is_room_for_256_engines_and_no_more() {
    let ramps = [4];
    let c = config(&ramps, 1, 1, DREX_POLICY_HOLD);
    let mut all: Vec<Engine> = (0..256).map(|_| Engine::new(&c)).collect();
    assert_eq!(Engine::try_new(&c).err(), Some(Failed(DREX_ERROR_CAPACITY)));
    assert!(text().contains("drex_create: 256 engines"), "{}", text());
    all.swap_remove(100);
    all.push(Engine::new(&c));
    assert!(Engine::try_new(&c).is_err());
}
