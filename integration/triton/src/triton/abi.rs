// SPDX-License-Identifier: Apache-2.0
//! The part of `tritonserver.h` and `tritonbackend.h` that is used, declared by hand.
//!
//! Enumerations are `u32` constants, since a newer server may send values that are not known here.

use std::ffi::{c_char, c_void};

macro_rules! opaque {
    ($($name:ident),*) => { $(
        #[repr(C)]
        pub struct $name { _private: [u8; 0] }
    )* };
}
opaque!(
    Error, Backend, Request, Factory, Response, Input, Output, Instance
);

pub const ERROR_INTERNAL: u32 = 1;
pub const ERROR_INVALID_ARG: u32 = 3;
pub const ERROR_UNAVAILABLE: u32 = 4;
pub const ERROR_UNSUPPORTED: u32 = 5;
pub const ERROR_CANCELLED: u32 = 7;

pub const TYPE_BOOL: u32 = 1;
pub const TYPE_INT32: u32 = 8;
pub const TYPE_BYTES: u32 = 13;

pub const MEMORY_CPU: u32 = 0;
pub const MEMORY_CPU_PINNED: u32 = 1;
pub const MEMORY_GPU: u32 = 2;

pub const RESPONSE_COMPLETE_FINAL: u32 = 1;
pub const REQUEST_RELEASE_ALL: u32 = 1;

unsafe extern "C" {
    pub fn TRITONSERVER_ErrorNew(code: u32, message: *const c_char) -> *mut Error;
    pub fn TRITONSERVER_ErrorDelete(error: *mut Error);
    pub fn TRITONSERVER_ErrorCode(error: *mut Error) -> u32;
    pub fn TRITONSERVER_ErrorMessage(error: *mut Error) -> *const c_char;

    pub fn TRITONBACKEND_ApiVersion(major: *mut u32, minor: *mut u32) -> *mut Error;

    pub fn TRITONBACKEND_RequestRelease(request: *mut Request, flags: u32) -> *mut Error;
    pub fn TRITONBACKEND_RequestInput(
        request: *mut Request,
        name: *const c_char,
        input: *mut *mut Input,
    ) -> *mut Error;
    pub fn TRITONBACKEND_InputProperties(
        input: *mut Input,
        name: *mut *const c_char,
        datatype: *mut u32,
        shape: *mut *const i64,
        dims: *mut u32,
        byte_size: *mut u64,
        buffers: *mut u32,
    ) -> *mut Error;
    pub fn TRITONBACKEND_InputBuffer(
        input: *mut Input,
        index: u32,
        buffer: *mut *const c_void,
        byte_size: *mut u64,
        memory_type: *mut u32,
        memory_id: *mut i64,
    ) -> *mut Error;

    pub fn TRITONBACKEND_ResponseFactoryNew(
        factory: *mut *mut Factory,
        request: *mut Request,
    ) -> *mut Error;
    pub fn TRITONBACKEND_ResponseFactoryDelete(factory: *mut Factory) -> *mut Error;
    pub fn TRITONBACKEND_ResponseFactorySendFlags(factory: *mut Factory, flags: u32) -> *mut Error;
    pub fn TRITONBACKEND_ResponseFactoryIsCancelled(
        factory: *mut Factory,
        cancelled: *mut bool,
    ) -> *mut Error;
    pub fn TRITONBACKEND_ResponseNewFromFactory(
        response: *mut *mut Response,
        factory: *mut Factory,
    ) -> *mut Error;
    pub fn TRITONBACKEND_ResponseDelete(response: *mut Response) -> *mut Error;
    pub fn TRITONBACKEND_ResponseOutput(
        response: *mut Response,
        output: *mut *mut Output,
        name: *const c_char,
        datatype: u32,
        shape: *const i64,
        dims: u32,
    ) -> *mut Error;
    pub fn TRITONBACKEND_OutputBuffer(
        output: *mut Output,
        buffer: *mut *mut c_void,
        byte_size: u64,
        memory_type: *mut u32,
        memory_id: *mut i64,
    ) -> *mut Error;
    pub fn TRITONBACKEND_ResponseSend(
        response: *mut Response,
        flags: u32,
        error: *mut Error,
    ) -> *mut Error;
    pub fn TRITONBACKEND_ModelInstanceReportStatistics(
        instance: *mut Instance,
        request: *mut Request,
        success: bool,
        exec_start_ns: u64,
        compute_start_ns: u64,
        compute_end_ns: u64,
        exec_end_ns: u64,
    ) -> *mut Error;
}
