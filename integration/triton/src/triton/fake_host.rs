// SPDX-License-Identifier: Apache-2.0
//! Triton's functions for unit tests: they write down what is called, and count what is not deleted. Per thread.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::null_mut;

use super::abi::{Error, Factory, Instance, Output, Request, Response};
use super::reply::Reply;

#[derive(Default)]
struct State {
    log: Vec<String>,
    live: i64,
    version: (u32, u32),
    memory: u32,
    refuse: bool,
    cancelled: bool,
}

thread_local!(static STATE: RefCell<State> = RefCell::default());

fn with<T>(f: impl FnOnce(&mut State) -> T) -> T {
    STATE.with_borrow_mut(f)
}

struct FakeError(u32, CString);
#[derive(Default)]
struct FakeResponse(Vec<u8>);

pub fn set_version(major: u32, minor: u32) {
    with(|s| s.version = (major, minor));
}
pub fn set_memory(kind: u32) {
    with(|s| s.memory = kind);
}
pub fn refuse_responses(refuse: bool) {
    with(|s| s.refuse = refuse);
}
pub fn cancel(cancelled: bool) {
    with(|s| s.cancelled = cancelled);
}
pub fn take_log() -> Vec<String> {
    with(|s| std::mem::take(&mut s.log))
}
/// Errors, responses and factories that were made and not deleted.
pub fn live() -> i64 {
    with(|s| s.live)
}
pub fn reply() -> Reply {
    // SAFETY: the functions below do not look at these.
    unsafe { Reply::new(null_mut::<Instance>(), null_mut::<Request>()) }.unwrap()
}

fn log(line: impl Into<String>) -> *mut Error {
    with(|s| s.log.push(line.into()));
    null_mut()
}

#[unsafe(no_mangle)]
extern "C" fn TRITONSERVER_ErrorNew(code: u32, message: *const c_char) -> *mut Error {
    with(|s| s.live += 1);
    let text = unsafe { CStr::from_ptr(message) }.to_owned();
    Box::into_raw(Box::new(FakeError(code, text))).cast()
}
#[unsafe(no_mangle)]
extern "C" fn TRITONSERVER_ErrorDelete(error: *mut Error) {
    with(|s| s.live -= 1);
    drop(unsafe { Box::from_raw(error.cast::<FakeError>()) });
}
#[unsafe(no_mangle)]
extern "C" fn TRITONSERVER_ErrorCode(error: *mut Error) -> u32 {
    unsafe { (*error.cast::<FakeError>()).0 }
}
#[unsafe(no_mangle)]
extern "C" fn TRITONSERVER_ErrorMessage(error: *mut Error) -> *const c_char {
    unsafe { (*error.cast::<FakeError>()).1.as_ptr() }
}
#[unsafe(no_mangle)]
extern "C" fn TRITONBACKEND_ApiVersion(major: *mut u32, minor: *mut u32) -> *mut Error {
    let version = with(|s| s.version);
    unsafe { (*major, *minor) = version };
    null_mut()
}
#[unsafe(no_mangle)]
extern "C" fn TRITONBACKEND_RequestRelease(_: *mut Request, flags: u32) -> *mut Error {
    assert_eq!(flags, 1);
    log("release")
}
#[unsafe(no_mangle)]
extern "C" fn TRITONBACKEND_ResponseFactoryNew(
    out: *mut *mut Factory,
    _: *mut Request,
) -> *mut Error {
    with(|s| s.live += 1);
    unsafe { *out = Box::into_raw(Box::new(0u8)).cast() };
    null_mut()
}
#[unsafe(no_mangle)]
extern "C" fn TRITONBACKEND_ResponseFactoryDelete(factory: *mut Factory) -> *mut Error {
    with(|s| s.live -= 1);
    drop(unsafe { Box::from_raw(factory.cast::<u8>()) });
    log("delete factory")
}
#[unsafe(no_mangle)]
extern "C" fn TRITONBACKEND_ResponseFactorySendFlags(_: *mut Factory, flags: u32) -> *mut Error {
    log(format!("flags {flags}"))
}
#[unsafe(no_mangle)]
extern "C" fn TRITONBACKEND_ResponseFactoryIsCancelled(
    _: *mut Factory,
    out: *mut bool,
) -> *mut Error {
    let cancelled = with(|s| s.cancelled);
    unsafe { *out = cancelled };
    null_mut()
}
#[unsafe(no_mangle)]
extern "C" fn TRITONBACKEND_ResponseNewFromFactory(
    out: *mut *mut Response,
    _: *mut Factory,
) -> *mut Error {
    if with(|s| s.refuse) {
        return TRITONSERVER_ErrorNew(1, c"refused".as_ptr());
    }
    with(|s| s.live += 1);
    unsafe { *out = Box::into_raw(Box::<FakeResponse>::default()).cast() };
    null_mut()
}
#[unsafe(no_mangle)]
extern "C" fn TRITONBACKEND_ResponseDelete(response: *mut Response) -> *mut Error {
    with(|s| s.live -= 1);
    drop(unsafe { Box::from_raw(response.cast::<FakeResponse>()) });
    null_mut()
}
#[unsafe(no_mangle)]
extern "C" fn TRITONBACKEND_ResponseOutput(
    response: *mut Response,
    output: *mut *mut Output,
    _: *const c_char,
    datatype: u32,
    shape: *const i64,
    dims: u32,
) -> *mut Error {
    unsafe {
        assert_eq!((datatype, dims, *shape), (13, 1, 1));
        *output = response.cast();
    }
    null_mut()
}
#[unsafe(no_mangle)]
extern "C" fn TRITONBACKEND_OutputBuffer(
    output: *mut Output,
    buffer: *mut *mut c_void,
    size: u64,
    kind: *mut u32,
    _: *mut i64,
) -> *mut Error {
    let response = unsafe { &mut *output.cast::<FakeResponse>() };
    response.0 = vec![0; size as usize];
    let memory = with(|s| s.memory);
    unsafe { (*buffer, *kind) = (response.0.as_mut_ptr().cast(), memory) };
    null_mut()
}
#[unsafe(no_mangle)]
extern "C" fn TRITONBACKEND_ResponseSend(
    response: *mut Response,
    flags: u32,
    error: *mut Error,
) -> *mut Error {
    let what = if error.is_null() {
        let bytes = unsafe { &(*response.cast::<FakeResponse>()).0 };
        String::from_utf8(bytes[4..].to_vec()).unwrap()
    } else {
        let text = unsafe { CStr::from_ptr(TRITONSERVER_ErrorMessage(error)) };
        format!("error {}", text.to_str().unwrap())
    };
    TRITONBACKEND_ResponseDelete(response);
    log(format!("send {flags} {what}"))
}
#[unsafe(no_mangle)]
extern "C" fn TRITONBACKEND_ModelInstanceReportStatistics(
    _: *mut Instance,
    _: *mut Request,
    success: bool,
    _: u64,
    _: u64,
    _: u64,
    _: u64,
) -> *mut Error {
    log(format!("statistics {success}"))
}
