// SPDX-License-Identifier: Apache-2.0
fn main() {
    // The test's own functions are those that the backend links to, as a server's are.
    println!("cargo:rustc-link-arg-tests=-rdynamic");
    println!("cargo:rerun-if-changed=build.rs");
}
