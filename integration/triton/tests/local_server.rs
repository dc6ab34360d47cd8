// SPDX-License-Identifier: Apache-2.0
//! The library in a program that has loaded Triton's for itself alone, as Python programs do: the linker shows its functions
//! to nobody.

use std::ffi::{CStr, c_char, c_void};
use std::path::PathBuf;
use std::process::Command;
use std::ptr::null_mut;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

#[test]
fn the_library_finds_a_server_that_is_loaded_for_its_program_alone() {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let server = folder.join("libtritonserver-local.so");
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local_server.c");
    let done = Command::new(compiler)
        .args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", source, "-o"])
        .arg(&server)
        .status()
        .unwrap();
    assert!(done.success());
    let mut path = std::env::current_exe().unwrap();
    path.set_file_name("libtriton_drex.so");
    // SAFETY: both have no code that runs when they are loaded; the functions have these types, and the error is deleted once.
    unsafe {
        let server = Library::open(Some(server), RTLD_NOW | RTLD_LOCAL).unwrap();
        let library = Library::open(Some(path), RTLD_NOW | RTLD_LOCAL).unwrap();
        let of = |library: &Library, name: &str| -> *mut c_void {
            *library.get::<*mut c_void>(name.as_bytes()).unwrap()
        };
        let initialize: extern "C" fn(*mut c_void) -> *mut c_void =
            std::mem::transmute(of(&library, "TRITONBACKEND_Initialize\0"));
        let message: extern "C" fn(*mut c_void) -> *const c_char =
            std::mem::transmute(of(&server, "TRITONSERVER_ErrorMessage\0"));
        let delete: extern "C" fn(*mut c_void) =
            std::mem::transmute(of(&server, "TRITONSERVER_ErrorDelete\0"));
        let error = initialize(null_mut());
        assert!(!error.is_null());
        let text = CStr::from_ptr(message(error)).to_str().unwrap();
        assert!(text.contains("this server has 1.15"), "{text}");
        delete(error);
    }
}
