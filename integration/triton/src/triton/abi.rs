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
    Error,
    Backend,
    Model,
    Request,
    Factory,
    Response,
    Input,
    Output,
    Instance,
    Message,
    MetricFamily,
    Metric,
    Parameter
);

pub const ERROR_INTERNAL: u32 = 1;
pub const ERROR_INVALID_ARG: u32 = 3;
pub const ERROR_UNAVAILABLE: u32 = 4;
pub const ERROR_UNSUPPORTED: u32 = 5;
pub const ERROR_CANCELLED: u32 = 7;

/// Version of the configurations' layout.
pub const CONFIG_VERSION: u32 = 1;

pub const TYPE_BOOL: u32 = 1;
pub const TYPE_UINT32: u32 = 4;
pub const TYPE_UINT64: u32 = 5;
pub const TYPE_INT32: u32 = 8;
pub const TYPE_FP32: u32 = 11;
pub const TYPE_BYTES: u32 = 13;

pub const MEMORY_CPU: u32 = 0;
pub const MEMORY_CPU_PINNED: u32 = 1;
pub const MEMORY_GPU: u32 = 2;

pub const RESPONSE_COMPLETE_FINAL: u32 = 1;
pub const REQUEST_RELEASE_ALL: u32 = 1;

pub const ARTIFACT_FILESYSTEM: u32 = 0;
pub const PARAMETER_STRING: u32 = 0;
pub const METRIC_COUNTER: u32 = 0;
pub const METRIC_GAUGE: u32 = 1;

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

    pub fn TRITONBACKEND_BackendArtifacts(
        backend: *mut Backend,
        kind: *mut u32,
        location: *mut *const c_char,
    ) -> *mut Error;
    pub fn TRITONBACKEND_ModelBackend(model: *mut Model, backend: *mut *mut Backend) -> *mut Error;
    pub fn TRITONBACKEND_ModelName(model: *mut Model, name: *mut *const c_char) -> *mut Error;
    pub fn TRITONBACKEND_ModelVersion(model: *mut Model, version: *mut u64) -> *mut Error;
    pub fn TRITONBACKEND_ModelRepository(
        model: *mut Model,
        kind: *mut u32,
        location: *mut *const c_char,
    ) -> *mut Error;
    pub fn TRITONBACKEND_ModelConfig(
        model: *mut Model,
        version: u32,
        config: *mut *mut Message,
    ) -> *mut Error;
    pub fn TRITONBACKEND_ModelAutoCompleteConfig(
        model: *mut Model,
        wanted: *mut bool,
    ) -> *mut Error;
    pub fn TRITONBACKEND_ModelSetConfig(
        model: *mut Model,
        version: u32,
        config: *mut Message,
    ) -> *mut Error;
    pub fn TRITONBACKEND_ModelState(model: *mut Model, state: *mut *mut c_void) -> *mut Error;
    pub fn TRITONBACKEND_ModelSetState(model: *mut Model, state: *mut c_void) -> *mut Error;
    pub fn TRITONBACKEND_ModelInstanceName(
        instance: *mut Instance,
        name: *mut *const c_char,
    ) -> *mut Error;
    pub fn TRITONBACKEND_ModelInstanceModel(
        instance: *mut Instance,
        model: *mut *mut Model,
    ) -> *mut Error;
    pub fn TRITONBACKEND_ModelInstanceState(
        instance: *mut Instance,
        state: *mut *mut c_void,
    ) -> *mut Error;
    pub fn TRITONBACKEND_ModelInstanceSetState(
        instance: *mut Instance,
        state: *mut c_void,
    ) -> *mut Error;

    pub fn TRITONSERVER_MessageNewFromSerializedJson(
        message: *mut *mut Message,
        base: *const c_char,
        byte_size: usize,
    ) -> *mut Error;
    pub fn TRITONSERVER_MessageSerializeToJson(
        message: *mut Message,
        base: *mut *const c_char,
        byte_size: *mut usize,
    ) -> *mut Error;
    pub fn TRITONSERVER_MessageDelete(message: *mut Message) -> *mut Error;

    pub fn TRITONBACKEND_RequestInputCount(request: *mut Request, count: *mut u32) -> *mut Error;
    pub fn TRITONBACKEND_RequestInputByIndex(
        request: *mut Request,
        index: u32,
        input: *mut *mut Input,
    ) -> *mut Error;
    pub fn TRITONBACKEND_RequestOutputCount(request: *mut Request, count: *mut u32) -> *mut Error;
    pub fn TRITONBACKEND_RequestOutputName(
        request: *mut Request,
        index: u32,
        name: *mut *const c_char,
    ) -> *mut Error;
    pub fn TRITONBACKEND_RequestParameterCount(
        request: *mut Request,
        count: *mut u32,
    ) -> *mut Error;
    pub fn TRITONBACKEND_RequestParameter(
        request: *mut Request,
        index: u32,
        name: *mut *const c_char,
        kind: *mut u32,
        value: *mut *const c_void,
    ) -> *mut Error;
    pub fn TRITONSERVER_ParameterTypeString(kind: u32) -> *const c_char;

    pub fn TRITONBACKEND_ResponseSetStringParameter(
        response: *mut Response,
        name: *const c_char,
        value: *const c_char,
    ) -> *mut Error;
    pub fn TRITONBACKEND_ResponseSetIntParameter(
        response: *mut Response,
        name: *const c_char,
        value: i64,
    ) -> *mut Error;

    pub fn TRITONSERVER_ParameterNew(
        name: *const c_char,
        kind: u32,
        value: *const c_void,
    ) -> *mut Parameter;
    pub fn TRITONSERVER_ParameterDelete(parameter: *mut Parameter);
    pub fn TRITONSERVER_MetricFamilyNew(
        family: *mut *mut MetricFamily,
        kind: u32,
        name: *const c_char,
        description: *const c_char,
    ) -> *mut Error;
    pub fn TRITONSERVER_MetricFamilyDelete(family: *mut MetricFamily) -> *mut Error;
    pub fn TRITONSERVER_MetricNew(
        metric: *mut *mut Metric,
        family: *mut MetricFamily,
        labels: *const *const Parameter,
        count: u64,
    ) -> *mut Error;
    pub fn TRITONSERVER_MetricDelete(metric: *mut Metric) -> *mut Error;
    pub fn TRITONSERVER_MetricIncrement(metric: *mut Metric, value: f64) -> *mut Error;
    pub fn TRITONSERVER_MetricSet(metric: *mut Metric, value: f64) -> *mut Error;
}
