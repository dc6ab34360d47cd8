// SPDX-License-Identifier: Apache-2.0

//! What becomes of a row.

use crate::core::names::named;

named! {
    /// The verdict on a row at a ramp, or at the last layer.
    Decision {
        Exit = c"exit",
        Hold = c"hold",
        Stay = c"stay",
        Gone = c"gone",
        /// Left before; the row goes along with its request.
        Pending = c"pending",
        /// The draft is what the full model says.
        Accept = c"accept",
        /// The full model says otherwise, and that is emitted instead.
        Replace = c"replace",
        /// Follows a draft that was replaced.
        Drop = c"drop",
    }
}

impl Decision {
    /// A token is the host's to give to its client, at a ramp where nothing
    /// is left to verify or at the last layer.
    pub fn emits(self) -> bool {
        matches!(self, Decision::Exit | Decision::Accept | Decision::Replace)
    }
}
