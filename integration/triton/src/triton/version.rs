// SPDX-License-Identifier: Apache-2.0
//! Which servers the backend loads into.

use super::{abi, error::Failure, error::check};

/// Major version of the backend API; another one is another API.
pub const MAJOR: u32 = 1;
/// The oldest minor version with every function that `abi` requires.
pub const MIN_MINOR: u32 = 16;

/// Refuses a server whose backend API is too old, or another one.
pub fn require() -> Result<(), Failure> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: two places to write to.
    unsafe { check(abi::TRITONBACKEND_ApiVersion(&mut major, &mut minor))? };
    if major == MAJOR && minor >= MIN_MINOR {
        return Ok(());
    }
    Err(Failure::unsupported(format!(
        "drex needs Triton's backend API {MAJOR}.{MIN_MINOR} or a newer {MAJOR}.x, this server has {major}.{minor}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::triton::fake_host;

    #[test]
    fn newer_minor_versions_are_taken_and_older_refused() {
        for (major, minor, taken) in [
            (1, 16, true),
            (1, 19, true),
            (1, 99, true),
            (1, 15, false),
            (2, 16, false),
            (0, 19, false),
        ] {
            fake_host::set_version(major, minor);
            let result = require();
            assert_eq!(result.is_ok(), taken, "{major}.{minor}");
            if let Err(failure) = result {
                assert_eq!(failure.code, abi::ERROR_UNSUPPORTED);
                assert!(
                    failure.text.contains(&format!("{major}.{minor}"))
                        && failure.text.contains("1.16"),
                    "{}",
                    failure.text
                );
            }
        }
    }
}
