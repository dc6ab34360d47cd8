// SPDX-License-Identifier: Apache-2.0
//! The library in a server that has next to nothing of Triton's API: this process.

use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, Ordering};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

static MINOR: AtomicU32 = AtomicU32::new(0);

struct Error(u32, CString);

#[unsafe(no_mangle)]
extern "C" fn TRITONSERVER_ErrorNew(code: u32, text: *const c_char) -> *mut c_void {
    // SAFETY: a text that ends with a 0 byte.
    let text = unsafe { CStr::from_ptr(text) }.to_owned();
    Box::into_raw(Box::new(Error(code, text))).cast()
}
#[unsafe(no_mangle)]
extern "C" fn TRITONSERVER_ErrorDelete(error: *mut c_void) {
    // SAFETY: made above.
    drop(unsafe { Box::from_raw(error.cast::<Error>()) });
}
#[unsafe(no_mangle)]
extern "C" fn TRITONSERVER_ErrorCode(error: *mut c_void) -> u32 {
    // SAFETY: made above.
    unsafe { (*error.cast::<Error>()).0 }
}
#[unsafe(no_mangle)]
extern "C" fn TRITONSERVER_ErrorMessage(error: *mut c_void) -> *const c_char {
    // SAFETY: made above.
    unsafe { (*error.cast::<Error>()).1.as_ptr() }
}
#[unsafe(no_mangle)]
extern "C" fn TRITONBACKEND_ApiVersion(major: *mut u32, minor: *mut u32) -> *mut c_void {
    // SAFETY: two places to write to.
    unsafe { (*major, *minor) = (1, MINOR.load(Ordering::Relaxed)) };
    null_mut()
}

#[test]
fn the_library_loads_into_an_older_server_and_says_what_it_needs() {
    let mut path = std::env::current_exe().unwrap();
    path.set_file_name("libtriton_drex.so");
    // SAFETY: as Triton loads a backend: all symbols at once, for itself. The function has this type.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.unwrap();
    let initialize = unsafe {
        library
            .get::<unsafe extern "C" fn(*mut c_void) -> *mut c_void>(b"TRITONBACKEND_Initialize\0")
            .unwrap()
    };
    for (minor, parts) in [
        (15, ["1.15", "1.16"]),
        // The version would do, but a function is not there: the first one is named.
        (16, ["TRITONBACKEND_", "has no"]),
    ] {
        MINOR.store(minor, Ordering::Relaxed);
        // SAFETY: refused before the backend is looked at.
        let error = unsafe { initialize(null_mut()) };
        assert!(!error.is_null());
        // SAFETY: made above.
        let text = unsafe { CStr::from_ptr(TRITONSERVER_ErrorMessage(error)) };
        let text = text.to_str().unwrap();
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        assert_eq!(TRITONSERVER_ErrorCode(error), 5, "unsupported");
        println!("{text}");
        TRITONSERVER_ErrorDelete(error);
    }
}
