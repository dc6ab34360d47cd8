// SPDX-License-Identifier: Apache-2.0

//! Reads memory that was given back: what a sanitiser must see.

fn main() {
    let memory = Box::into_raw(Box::new(std::hint::black_box(1u64)));
    // SAFETY: none. This is a fault, on purpose.
    let read = unsafe {
        drop(Box::from_raw(memory));
        std::ptr::read_volatile(memory)
    };
    println!("{read}");
}
