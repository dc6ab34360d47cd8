// SPDX-License-Identifier: Apache-2.0

//! The fake CUDA driver of `tests/cuda/fake_driver.cpp`, and the kernels on a
//! CPU. Compiled by the system's C++ compiler, once for each test program.

#![allow(dead_code)] // every test file uses its own part

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use libloading::Library;

pub type Emulate =
    unsafe extern "C" fn(*const c_char, u32, u32, u32, *const c_void, c_int) -> c_int;

/// The kernels as a library, under the name by which the driver is looked for.
fn compile() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let name = format!("fake-cuda-{}.so", std::process::id());
    let out = dir.join(name);
    let cxx = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let status = Command::new(cxx)
        .args(["-std=c++17", "-O2", "-g", "-Wall", "-Wextra", "-Werror"])
        .args(["-Wno-unknown-pragmas", "-fPIC", "-shared"])
        // Its check of long jumps does not know of fibres.
        .arg("-U_FORTIFY_SOURCE")
        // By this name it is found although it lies elsewhere: the loader
        // takes what is loaded already.
        .args(["-Wl,-soname,libcuda.so", "-o"])
        .arg(&out)
        .arg(root.join("kernels/host/emulate.cpp"))
        .arg(root.join("tests/cuda/fake_driver.cpp"))
        .status()
        .expect("a C++ compiler");
    assert!(status.success(), "{status}");
    out
}

pub fn library() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let path = compile();
        // SAFETY: our own; it has no initialisers to speak of.
        let library = unsafe { Library::new(&path) }.unwrap();
        std::fs::remove_file(&path).unwrap();
        library
    })
}

pub fn function<T: Copy>(name: &str) -> T {
    // SAFETY: the caller gives the type that the C++ source has.
    unsafe { *library().get::<T>(name.as_bytes()).unwrap() }
}

pub fn emulate() -> Emulate {
    function("drex_emulate")
}

fn number(name: &str) -> usize {
    // SAFETY: as declared there.
    unsafe { function::<unsafe extern "C" fn() -> usize>(name)() }
}

/// Handles that are alive in the driver.
pub fn alive() -> usize {
    number("drex_fake_alive")
}

/// Contexts on the calling thread's stack.
pub fn depth() -> usize {
    number("drex_fake_depth")
}

pub fn calls() -> usize {
    number("drex_fake_calls")
}

/// What the program did wrong.
pub fn errors() -> String {
    let get = function::<unsafe extern "C" fn() -> *const c_char>("drex_fake_errors");
    // SAFETY: a text that ends in 0.
    unsafe { CStr::from_ptr(get()) }
        .to_str()
        .unwrap()
        .to_owned()
}

/// Makes the n-th call from now fail; counts from 0. -1: none.
pub fn fail_at(n: i64) {
    // SAFETY: as declared there.
    unsafe { function::<unsafe extern "C" fn(i64)>("drex_fake_fail_at")(n) }
}

/// Makes the next call of this name fail.
pub fn fail_call(name: &CStr) {
    let set = function::<unsafe extern "C" fn(*const c_char)>("drex_fake_fail_call");
    // SAFETY: as declared there; the name is copied.
    unsafe { set(name.as_ptr()) }
}

pub fn order(turned: bool) {
    // SAFETY: as declared there.
    unsafe { function::<unsafe extern "C" fn(c_int)>("drex_fake_order")(turned.into()) }
}

fn on(name: &str, p: *mut c_void) {
    // SAFETY: as declared there.
    unsafe { function::<unsafe extern "C" fn(*mut c_void)>(name)(p) }
}

/// The calling thread's current context; NULL: none.
pub fn context(c: usize) {
    on("drex_fake_context", std::ptr::without_provenance_mut(c));
}

/// The calling thread's, as an address.
pub fn current() -> usize {
    number("drex_fake_current")
}

/// Whether a call is still to fail.
pub fn armed() -> bool {
    number("drex_fake_armed") != 0
}

/// What the next load of an image comes to.
pub fn image(code: c_int) {
    // SAFETY: as declared there.
    unsafe { function::<unsafe extern "C" fn(c_int)>("drex_fake_image")(code) }
}

/// Handles that are alive are nobody's any more.
pub fn leak() {
    // SAFETY: as declared there.
    unsafe { function::<unsafe extern "C" fn()>("drex_fake_leak")() }
}

pub fn wait(stream: *mut c_void) {
    on("drex_fake_wait", stream);
}

/// Launches what was captured.
pub fn launch(stream: *mut c_void) {
    on("drex_fake_launch", stream);
}

pub fn capture(stream: *mut c_void, on: bool) {
    let f = function::<unsafe extern "C" fn(*mut c_void, c_int)>("drex_fake_capture");
    // SAFETY: as declared there.
    unsafe { f(stream, on.into()) }
}

pub fn pending(stream: *mut c_void) -> usize {
    let f = function::<unsafe extern "C" fn(*mut c_void) -> usize>("drex_fake_pending");
    // SAFETY: as declared there.
    unsafe { f(stream) }
}

/// Device memory of the host's.
pub struct Memory {
    pub at: *mut u8,
    pub bytes: usize,
}

impl Memory {
    pub fn new(bytes: usize) -> Memory {
        let f = function::<unsafe extern "C" fn(usize) -> *mut c_void>("drex_fake_alloc");
        // SAFETY: as declared there.
        let at = unsafe { f(bytes) }.cast();
        Memory { at, bytes }
    }

    pub fn of(bytes: &[u8]) -> Memory {
        let m = Memory::new(bytes.len());
        // SAFETY: as long.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), m.at, bytes.len()) };
        m
    }

    pub fn read(&self) -> Vec<u8> {
        // SAFETY: ours.
        unsafe { std::slice::from_raw_parts(self.at, self.bytes) }.to_vec()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        on("drex_fake_free", self.at.cast());
    }
}
