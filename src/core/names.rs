// SPDX-License-Identifier: Apache-2.0

//! Enumerations whose values have a number and a name that programs see, both
//! spelled here.

/// An enumeration, numbered from 0 in the order of its values.
macro_rules! named {
    (
        $(#[$about:meta])*
        $t:ident { $($(#[$says:meta])* $value:ident = $name:literal,)* }
    ) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $t { $($(#[$says])* $value,)* }

        impl $t {
            pub const ALL: [$t; [$($name),*].len()] = [$($t::$value),*];

            /// In lower case, ended by 0 for C.
            pub const fn c_name(self) -> &'static std::ffi::CStr {
                match self { $($t::$value => $name,)* }
            }

            pub fn name(self) -> &'static str {
                self.c_name().to_str().unwrap_or_default()
            }

            pub fn from_number(n: u32) -> Option<$t> {
                $t::ALL.get(n as usize).copied()
            }
        }
    };
}

pub(crate) use named;
