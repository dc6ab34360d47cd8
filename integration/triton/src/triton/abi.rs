// SPDX-License-Identifier: Apache-2.0
//! The part of `tritonserver.h` and `tritonbackend.h` that is used, declared by hand.
//!
//! Enumerations are `u32` constants, since a newer server may send values that are not known here.
//!
//! Triton resolves all symbols of a backend before it calls it: a server that lacks one would end with the linker's words. A
//! program of another language may have loaded the server for itself, and then the linker finds none of them. So nothing is
//! linked by name: what it takes to compare versions is looked up first, and the rest after that.

use std::ffi::{CStr, OsString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStringExt;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_LAZY};

use super::error::Failure;

macro_rules! opaque {
    ($($name:ident),*) => { $(
        #[repr(C)]
        pub struct $name { _private: [u8; 0] }
    )* };
}
opaque!(
    Error,
    Backend,
    BackendAttribute,
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
    MetricArgs,
    ResponseStatistics,
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
pub const METRIC_HISTOGRAM: u32 = 2;

pub const KIND_CPU: u32 = 1;
pub const KIND_GPU: u32 = 2;

pub const LOG_INFO: u32 = 0;
pub const LOG_WARN: u32 = 1;
pub const LOG_ERROR: u32 = 2;

macro_rules! functions {
    (
        $table:ident in $found:ident;
        required { $(fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $out:ty)?;)* }
        optional { $(fn $maybe:ident($($maybe_arg:ident: $maybe_type:ty),* $(,)?) $(-> $maybe_out:ty)?;)* }
    ) => {
        #[allow(non_snake_case)]
        pub struct $table {
            $($name: unsafe extern "C" fn($($type),*) $(-> $out)?,)*
            $($maybe: Option<unsafe extern "C" fn($($maybe_type),*) $(-> $maybe_out)?>,)*
        }

        static $found: OnceLock<$table> = OnceLock::new();

        impl $table {
            /// Looked up before.
            fn get() -> &'static Self {
                #[cfg(test)]
                if $found.get().is_none() {
                    let _ = load_from(super::fake_host::find);
                }
                $found.get().expect("looked up before Triton calls anything else")
            }

            /// Looks all up. Err: the first that must be there and is not.
            ///
            /// # Safety
            /// What `find` gives for a name is NULL or the function declared here.
            unsafe fn find(find: impl Fn(&str) -> *mut c_void) -> Result<Self, &'static str> {
                // SAFETY: by the caller; NULL is None.
                unsafe {
                    Ok(Self {
                        $($name: std::mem::transmute::<
                            *mut c_void,
                            Option<unsafe extern "C" fn($($type),*) $(-> $out)?>,
                        >(find(stringify!($name)))
                        .ok_or(stringify!($name))?,)*
                        $($maybe: std::mem::transmute::<
                            *mut c_void,
                            Option<unsafe extern "C" fn($($maybe_type),*) $(-> $maybe_out)?>,
                        >(find(stringify!($maybe))),)*
                    })
                }
            }
        }

        $(
            /// # Safety
            /// As Triton's function of this name.
            #[allow(non_snake_case, clippy::too_many_arguments)]
            pub unsafe fn $name($($arg: $type),*) $(-> $out)? {
                // SAFETY: by the caller.
                unsafe { ($table::get().$name)($($arg),*) }
            }
        )*
        $(
            /// None with a server that lacks it.
            #[allow(non_snake_case, clippy::type_complexity)]
            pub fn $maybe() -> Option<unsafe extern "C" fn($($maybe_type),*) $(-> $maybe_out)?> {
                $table::get().$maybe
            }
        )*
    };
}

functions! {
    First in FIRST;
    required {
        fn TRITONSERVER_ErrorNew(code: u32, message: *const c_char) -> *mut Error;
        fn TRITONSERVER_ErrorDelete(error: *mut Error);
        fn TRITONSERVER_ErrorCode(error: *mut Error) -> u32;
        fn TRITONSERVER_ErrorMessage(error: *mut Error) -> *const c_char;
        fn TRITONBACKEND_ApiVersion(major: *mut u32, minor: *mut u32) -> *mut Error;
    }
    optional {}
}

functions! {
    Functions in FUNCTIONS;
    required {
        fn TRITONBACKEND_RequestRelease(request: *mut Request, flags: u32) -> *mut Error;
        fn TRITONBACKEND_InputProperties(
            input: *mut Input, name: *mut *const c_char, datatype: *mut u32, shape: *mut *const i64, dims: *mut u32,
            byte_size: *mut u64, buffers: *mut u32,
        ) -> *mut Error;
        fn TRITONBACKEND_InputBuffer(
            input: *mut Input, index: u32, buffer: *mut *const c_void, byte_size: *mut u64, memory_type: *mut u32,
            memory_id: *mut i64,
        ) -> *mut Error;
        fn TRITONBACKEND_ResponseFactoryNew(factory: *mut *mut Factory, request: *mut Request) -> *mut Error;
        fn TRITONBACKEND_ResponseFactoryDelete(factory: *mut Factory) -> *mut Error;
        fn TRITONBACKEND_ResponseFactorySendFlags(factory: *mut Factory, flags: u32) -> *mut Error;
        fn TRITONBACKEND_ResponseFactoryIsCancelled(factory: *mut Factory, cancelled: *mut bool) -> *mut Error;
        fn TRITONBACKEND_ResponseNewFromFactory(response: *mut *mut Response, factory: *mut Factory) -> *mut Error;
        fn TRITONBACKEND_ResponseDelete(response: *mut Response) -> *mut Error;
        fn TRITONBACKEND_ResponseOutput(
            response: *mut Response, output: *mut *mut Output, name: *const c_char, datatype: u32, shape: *const i64,
            dims: u32,
        ) -> *mut Error;
        fn TRITONBACKEND_OutputBuffer(
            output: *mut Output, buffer: *mut *mut c_void, byte_size: u64, memory_type: *mut u32, memory_id: *mut i64,
        ) -> *mut Error;
        fn TRITONBACKEND_ResponseSend(response: *mut Response, flags: u32, error: *mut Error) -> *mut Error;
        fn TRITONBACKEND_ModelInstanceReportStatistics(
            instance: *mut Instance, request: *mut Request, success: bool, exec_start_ns: u64, compute_start_ns: u64,
            compute_end_ns: u64, exec_end_ns: u64,
        ) -> *mut Error;
        fn TRITONBACKEND_BackendArtifacts(
            backend: *mut Backend, kind: *mut u32, location: *mut *const c_char,
        ) -> *mut Error;
        fn TRITONBACKEND_ModelName(model: *mut Model, name: *mut *const c_char) -> *mut Error;
        fn TRITONBACKEND_ModelVersion(model: *mut Model, version: *mut u64) -> *mut Error;
        fn TRITONBACKEND_ModelRepository(
            model: *mut Model, kind: *mut u32, location: *mut *const c_char,
        ) -> *mut Error;
        fn TRITONBACKEND_ModelConfig(model: *mut Model, version: u32, config: *mut *mut Message) -> *mut Error;
        fn TRITONBACKEND_ModelAutoCompleteConfig(model: *mut Model, wanted: *mut bool) -> *mut Error;
        fn TRITONBACKEND_ModelSetConfig(model: *mut Model, version: u32, config: *mut Message) -> *mut Error;
        fn TRITONBACKEND_ModelState(model: *mut Model, state: *mut *mut c_void) -> *mut Error;
        fn TRITONBACKEND_ModelSetState(model: *mut Model, state: *mut c_void) -> *mut Error;
        fn TRITONBACKEND_ModelInstanceName(instance: *mut Instance, name: *mut *const c_char) -> *mut Error;
        fn TRITONBACKEND_ModelInstanceModel(instance: *mut Instance, model: *mut *mut Model) -> *mut Error;
        fn TRITONBACKEND_ModelInstanceState(instance: *mut Instance, state: *mut *mut c_void) -> *mut Error;
        fn TRITONBACKEND_ModelInstanceSetState(instance: *mut Instance, state: *mut c_void) -> *mut Error;
        fn TRITONSERVER_MessageNewFromSerializedJson(
            message: *mut *mut Message, base: *const c_char, byte_size: usize,
        ) -> *mut Error;
        fn TRITONSERVER_MessageSerializeToJson(
            message: *mut Message, base: *mut *const c_char, byte_size: *mut usize,
        ) -> *mut Error;
        fn TRITONSERVER_MessageDelete(message: *mut Message) -> *mut Error;
        fn TRITONBACKEND_RequestInputCount(request: *mut Request, count: *mut u32) -> *mut Error;
        fn TRITONBACKEND_RequestInputByIndex(request: *mut Request, index: u32, input: *mut *mut Input) -> *mut Error;
        fn TRITONBACKEND_RequestOutputCount(request: *mut Request, count: *mut u32) -> *mut Error;
        fn TRITONBACKEND_RequestOutputName(request: *mut Request, index: u32, name: *mut *const c_char) -> *mut Error;
        fn TRITONBACKEND_RequestParameterCount(request: *mut Request, count: *mut u32) -> *mut Error;
        fn TRITONBACKEND_RequestParameter(
            request: *mut Request, index: u32, name: *mut *const c_char, kind: *mut u32, value: *mut *const c_void,
        ) -> *mut Error;
        fn TRITONSERVER_ParameterTypeString(kind: u32) -> *const c_char;
        fn TRITONBACKEND_ResponseSetStringParameter(
            response: *mut Response, name: *const c_char, value: *const c_char,
        ) -> *mut Error;
        fn TRITONBACKEND_ResponseSetIntParameter(
            response: *mut Response, name: *const c_char, value: i64,
        ) -> *mut Error;
        fn TRITONSERVER_ParameterNew(name: *const c_char, kind: u32, value: *const c_void) -> *mut Parameter;
        fn TRITONSERVER_ParameterDelete(parameter: *mut Parameter);
        fn TRITONSERVER_MetricFamilyNew(
            family: *mut *mut MetricFamily, kind: u32, name: *const c_char, description: *const c_char,
        ) -> *mut Error;
        fn TRITONSERVER_MetricFamilyDelete(family: *mut MetricFamily) -> *mut Error;
        fn TRITONSERVER_MetricNew(
            metric: *mut *mut Metric, family: *mut MetricFamily, labels: *const *const Parameter, count: u64,
        ) -> *mut Error;
        fn TRITONSERVER_MetricDelete(metric: *mut Metric) -> *mut Error;
        fn TRITONSERVER_MetricIncrement(metric: *mut Metric, value: f64) -> *mut Error;
        fn TRITONBACKEND_ResponseNew(response: *mut *mut Response, request: *mut Request) -> *mut Error;
        fn TRITONBACKEND_ModelInstanceReportBatchStatistics(
            instance: *mut Instance, batch_size: u64, exec_start_ns: u64, compute_start_ns: u64, compute_end_ns: u64,
            exec_end_ns: u64,
        ) -> *mut Error;
        fn TRITONBACKEND_ModelInstanceKind(instance: *mut Instance, kind: *mut u32) -> *mut Error;
        fn TRITONBACKEND_ModelInstanceDeviceId(instance: *mut Instance, device: *mut i32) -> *mut Error;
        fn TRITONBACKEND_BackendAttributeAddPreferredInstanceGroup(
            attribute: *mut BackendAttribute, kind: u32, count: u64, devices: *const u64, n_devices: u64,
        ) -> *mut Error;
        fn TRITONSERVER_LogMessage(level: u32, file: *const c_char, line: c_int, text: *const c_char) -> *mut Error;
    }
    optional {
        fn TRITONBACKEND_ResponseSetDoubleParameter(
            response: *mut Response, name: *const c_char, value: f64,
        ) -> *mut Error;
        fn TRITONBACKEND_InferenceRequestTimeoutMicroseconds(
            request: *mut Request, microseconds: *mut u64,
        ) -> *mut Error;
        fn TRITONBACKEND_ModelInstanceResponseStatisticsNew(statistics: *mut *mut ResponseStatistics) -> *mut Error;
        fn TRITONBACKEND_ModelInstanceResponseStatisticsDelete(statistics: *mut ResponseStatistics) -> *mut Error;
        fn TRITONBACKEND_ModelInstanceResponseStatisticsSetModelInstance(
            statistics: *mut ResponseStatistics, instance: *mut Instance,
        ) -> *mut Error;
        fn TRITONBACKEND_ModelInstanceResponseStatisticsSetResponseFactory(
            statistics: *mut ResponseStatistics, factory: *mut Factory,
        ) -> *mut Error;
        fn TRITONBACKEND_ModelInstanceResponseStatisticsSetResponseStart(
            statistics: *mut ResponseStatistics, ns: u64,
        ) -> *mut Error;
        fn TRITONBACKEND_ModelInstanceResponseStatisticsSetComputeOutputStart(
            statistics: *mut ResponseStatistics, ns: u64,
        ) -> *mut Error;
        fn TRITONBACKEND_ModelInstanceResponseStatisticsSetResponseEnd(
            statistics: *mut ResponseStatistics, ns: u64,
        ) -> *mut Error;
        fn TRITONBACKEND_ModelInstanceResponseStatisticsSetError(
            statistics: *mut ResponseStatistics, error: *mut Error,
        ) -> *mut Error;
        fn TRITONBACKEND_ModelInstanceReportResponseStatistics(statistics: *mut ResponseStatistics) -> *mut Error;
        fn TRITONSERVER_MetricArgsNew(args: *mut *mut MetricArgs) -> *mut Error;
        fn TRITONSERVER_MetricArgsSetHistogram(args: *mut MetricArgs, bounds: *const f64, count: u64) -> *mut Error;
        fn TRITONSERVER_MetricArgsDelete(args: *mut MetricArgs) -> *mut Error;
        fn TRITONSERVER_MetricNewWithArgs(
            metric: *mut *mut Metric, family: *mut MetricFamily, labels: *const *const Parameter, count: u64,
            args: *const MetricArgs,
        ) -> *mut Error;
        fn TRITONSERVER_MetricObserve(metric: *mut Metric, value: f64) -> *mut Error;
    }
}

/// Looks up what it takes to compare versions and to make errors. Err: the first function that this process lacks.
pub fn load_first() -> Result<(), &'static str> {
    // SAFETY: as `load`.
    let first = unsafe { First::find(|name| find(&places(), name))? };
    let _ = FIRST.set(first);
    Ok(())
}

/// Looks up the other functions, once. After `load_first`.
pub fn load() -> Result<(), Failure> {
    let places = places();
    load_from(|name| find(&places, name))
}

fn load_from(find: impl Fn(&str) -> *mut c_void) -> Result<(), Failure> {
    // SAFETY: Triton keeps a function's type under its name, in an API of the major version that is declared here.
    unsafe {
        #[cfg(test)]
        let _ = First::find(&find).map(|first| FIRST.set(first));
        let functions = Functions::find(find).map_err(|name| {
            Failure::unsupported(format!("this server has no {name}, which drex needs"))
        })?;
        let _ = FUNCTIONS.set(functions);
    }
    Ok(())
}

/// Where functions of Triton may be: in the process for all to see, then in libraries of its name that one program loaded for
/// itself, as a Python program does.
fn places() -> Vec<Library> {
    unsafe extern "C" fn note(
        info: *mut libc::dl_phdr_info,
        _size: usize,
        paths: *mut c_void,
    ) -> c_int {
        // SAFETY: dl_iterate_phdr gives a library's data, and the vector below.
        unsafe {
            let path = CStr::from_ptr((*info).dlpi_name).to_bytes();
            let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
            if name.starts_with(b"libtritonserver") {
                let paths = &mut *paths.cast::<Vec<OsString>>();
                paths.push(OsString::from_vec(path.to_vec()));
            }
        }
        0
    }
    let mut paths: Vec<OsString> = Vec::new();
    // SAFETY: the vector outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(note), std::ptr::from_mut(&mut paths).cast()) };
    let mut places = vec![Library::this()];
    for path in paths {
        // SAFETY: the library is there already, and nothing is loaded.
        let there = unsafe { Library::open(Some(path), libc::RTLD_NOLOAD | RTLD_LAZY) };
        places.extend(there);
    }
    places
}

/// NULL where none of them has it.
fn find(places: &[Library], name: &str) -> *mut c_void {
    let in_one = |place: &Library| {
        // SAFETY: only asks for an address.
        let symbol = unsafe { place.get::<*mut c_void>(name.as_bytes()) };
        symbol.ok().map(|symbol| *symbol)
    };
    places
        .iter()
        .find_map(in_one)
        .unwrap_or(std::ptr::null_mut())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::triton::fake_host;

    #[test]
    fn a_function_that_is_not_there_is_named() {
        for name in ["TRITONBACKEND_ResponseSend", "TRITONSERVER_LogMessage"] {
            let failure = load_from(|wanted| {
                if wanted == name {
                    std::ptr::null_mut()
                } else {
                    fake_host::find(wanted)
                }
            })
            .unwrap_err();
            assert_eq!(failure.code, ERROR_UNSUPPORTED);
            assert!(failure.text.contains(name), "{}", failure.text);
        }
    }

    #[test]
    fn what_newer_servers_have_may_be_missing() {
        let without = |wanted: &str| {
            if wanted == "TRITONSERVER_MetricObserve" {
                std::ptr::null_mut()
            } else {
                fake_host::find(wanted)
            }
        };
        // SAFETY: the fake host's functions have the types that are declared here.
        let functions = unsafe { Functions::find(without) }.unwrap();
        assert!(functions.TRITONSERVER_MetricObserve.is_none());
        assert!(functions.TRITONSERVER_MetricArgsNew.is_some());
    }
}
