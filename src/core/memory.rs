// SPDX-License-Identifier: Apache-2.0

//! Memory that is asked for: what grows with a configuration may be refused,
//! and the host hears of it instead of being ended.

use std::mem::size_of;

use crate::core::error::{Error, Result};

/// An empty vector with room for `n`.
pub fn room<T>(n: usize) -> Result<Vec<T>> {
    let mut v = Vec::new();
    match v.try_reserve_exact(n) {
        Ok(()) => Ok(v),
        Err(_) => Err(Error::Memory {
            bytes: (n as u64).saturating_mul(size_of::<T>() as u64),
        }),
    }
}

pub fn filled<T: Clone>(value: T, n: usize) -> Result<Vec<T>> {
    let mut v = room(n)?;
    v.resize(n, value);
    Ok(v)
}

/// n - 1 to 0: a stack of free numbers that gives the lowest first.
pub fn free_list(n: u32) -> Result<Vec<u32>> {
    let mut v = room(n as usize)?;
    v.extend((0..n).rev());
    Ok(v)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_much_is_refused() {
        for n in [usize::MAX / 4, usize::MAX] {
            let bytes = (n as u64).saturating_mul(4);
            assert_eq!(filled(0u32, n), Err(Error::Memory { bytes }));
        }
        assert_eq!(free_list(3).unwrap(), [2, 1, 0]);
        assert_eq!(filled(7u8, 2).unwrap(), [7, 7]);
    }
}
