// SPDX-License-Identifier: Apache-2.0
//! Triton's functions for unit tests: they write down what is called, and count what is not deleted. Per thread.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr::null_mut;

use super::abi::*;
use super::reply::Reply;

#[derive(Default)]
struct State {
    log: Vec<String>,
    messages: Vec<String>,
    responses: Vec<FakeStatistics>,
    executions: Vec<u64>,
    times: [u64; 4],
    metrics: BTreeMap<String, (usize, f64)>,
    observed: Vec<f64>,
    live: i64,
    version: (u32, u32),
    memory: u32,
    refuse: bool,
    refuse_factories: bool,
    cancelled: bool,
}

thread_local!(static STATE: RefCell<State> = RefCell::default());

fn with<T>(f: impl FnOnce(&mut State) -> T) -> T {
    STATE.with_borrow_mut(f)
}

struct FakeError(u32, CString);
#[derive(Default)]
struct FakeResponse(Vec<u8>);
#[derive(Default, Clone, Debug, PartialEq)]
pub struct FakeStatistics {
    pub start: u64,
    pub computed: u64,
    pub end: u64,
    pub error: Option<u32>,
}
pub struct FakeInput {
    pub name: CString,
    pub datatype: u32,
    pub bytes: Vec<u8>,
    pub memory: u32,
}
struct FakeFamily(u32, String);
struct FakeMetric {
    key: String,
    kind: u32,
}

pub fn set_version(major: u32, minor: u32) {
    with(|s| s.version = (major, minor));
}
pub fn set_memory(kind: u32) {
    with(|s| s.memory = kind);
}
pub fn refuse_responses(refuse: bool) {
    with(|s| s.refuse = refuse);
}
pub fn refuse_factories(refuse: bool) {
    with(|s| s.refuse_factories = refuse);
}
pub fn cancel(cancelled: bool) {
    with(|s| s.cancelled = cancelled);
}
pub fn take_log() -> Vec<String> {
    with(|s| std::mem::take(&mut s.log))
}
/// Of Triton's log.
pub fn take_messages() -> Vec<String> {
    with(|s| std::mem::take(&mut s.messages))
}
/// Statistics of responses.
pub fn take_responses() -> Vec<FakeStatistics> {
    with(|s| std::mem::take(&mut s.responses))
}
/// Rows of executions.
pub fn take_executions() -> Vec<u64> {
    with(|s| std::mem::take(&mut s.executions))
}
/// Of the last request whose statistics were reported: exec_start, compute_start, compute_end, exec_end.
pub fn times() -> [u64; 4] {
    with(|s| s.times)
}
/// The metrics that there are, by name{label=value,...}.
pub fn metrics() -> BTreeMap<String, f64> {
    with(|s| {
        s.metrics
            .iter()
            .map(|(key, (_, v))| (key.clone(), *v))
            .collect()
    })
}
pub fn take_observed() -> Vec<f64> {
    with(|s| std::mem::take(&mut s.observed))
}
/// What was made and not deleted: errors, responses, factories, statistics, families, metrics and their arguments.
pub fn live() -> i64 {
    with(|s| s.live)
}
pub fn reply() -> Reply {
    // SAFETY: the functions below do not look at these.
    unsafe { Reply::new(null_mut::<Instance>(), null_mut::<Request>()) }.unwrap()
}
/// A request that has these inputs and wants text_output.
pub fn request(inputs: &mut Vec<FakeInput>) -> *mut Request {
    std::ptr::from_mut(inputs).cast()
}

fn log(line: impl Into<String>) -> *mut Error {
    with(|s| s.log.push(line.into()));
    null_mut()
}
fn make<T>(value: T) -> *mut T {
    with(|s| s.live += 1);
    Box::into_raw(Box::new(value))
}
unsafe fn take<T>(at: *mut T) -> T {
    with(|s| s.live -= 1);
    *unsafe { Box::from_raw(at) }
}
unsafe fn text(at: *const c_char) -> String {
    unsafe { CStr::from_ptr(at) }.to_str().unwrap().to_owned()
}

// What the functions below call themselves.
#[allow(non_snake_case)]
extern "C" fn TRITONSERVER_ErrorNew(code: u32, message: *const c_char) -> *mut Error {
    make(FakeError(
        code,
        unsafe { CStr::from_ptr(message) }.to_owned(),
    ))
    .cast()
}
#[allow(non_snake_case)]
extern "C" fn TRITONSERVER_ErrorDelete(error: *mut Error) {
    drop(unsafe { take(error.cast::<FakeError>()) });
}
#[allow(non_snake_case)]
extern "C" fn TRITONSERVER_ErrorCode(error: *mut Error) -> u32 {
    unsafe { (*error.cast::<FakeError>()).0 }
}
#[allow(non_snake_case)]
extern "C" fn TRITONSERVER_ErrorMessage(error: *mut Error) -> *const c_char {
    unsafe { (*error.cast::<FakeError>()).1.as_ptr() }
}
#[allow(non_snake_case)]
extern "C" fn TRITONBACKEND_ApiVersion(major: *mut u32, minor: *mut u32) -> *mut Error {
    unsafe { (*major, *minor) = with(|s| s.version) };
    null_mut()
}

/// A function of Triton's that no test should come to.
extern "C" fn not_faked() {
    eprintln!("the fake host lacks a function that was called");
    std::process::abort();
}

macro_rules! fakes {
    ($(fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $out:ty)? $body:block)*) => {
        /// As dlsym.
        pub fn find(name: &str) -> *mut c_void {
            $(
                #[allow(non_snake_case)]
                unsafe extern "C" fn $name($($arg: $type),*) $(-> $out)? {
                    #[allow(unused_unsafe)]
                    unsafe { $body }
                }
            )*
            match name {
                $(stringify!($name) => $name as *mut c_void,)*
                "TRITONSERVER_ErrorNew" => TRITONSERVER_ErrorNew as *mut c_void,
                "TRITONSERVER_ErrorDelete" => TRITONSERVER_ErrorDelete as *mut c_void,
                "TRITONSERVER_ErrorCode" => TRITONSERVER_ErrorCode as *mut c_void,
                "TRITONSERVER_ErrorMessage" => TRITONSERVER_ErrorMessage as *mut c_void,
                "TRITONBACKEND_ApiVersion" => TRITONBACKEND_ApiVersion as *mut c_void,
                _ => not_faked as *mut c_void,
            }
        }
    };
}

fakes! {
    fn TRITONBACKEND_RequestRelease(_request: *mut Request, flags: u32) -> *mut Error {
        assert_eq!(flags, 1);
        log("release")
    }
    fn TRITONBACKEND_ResponseFactoryNew(out: *mut *mut Factory, _request: *mut Request) -> *mut Error {
        if with(|s| s.refuse_factories) {
            return TRITONSERVER_ErrorNew(1, c"no factory".as_ptr());
        }
        *out = make(0u8).cast();
        null_mut()
    }
    fn TRITONBACKEND_ResponseFactoryDelete(factory: *mut Factory) -> *mut Error {
        take(factory.cast::<u8>());
        log("delete factory")
    }
    fn TRITONBACKEND_ResponseFactorySendFlags(_factory: *mut Factory, flags: u32) -> *mut Error {
        log(format!("flags {flags}"))
    }
    fn TRITONBACKEND_ResponseFactoryIsCancelled(_factory: *mut Factory, out: *mut bool) -> *mut Error {
        *out = with(|s| s.cancelled);
        null_mut()
    }
    fn TRITONBACKEND_ResponseNewFromFactory(out: *mut *mut Response, _factory: *mut Factory) -> *mut Error {
        if with(|s| s.refuse) {
            return TRITONSERVER_ErrorNew(1, c"refused".as_ptr());
        }
        *out = make(FakeResponse::default()).cast();
        null_mut()
    }
    fn TRITONBACKEND_ResponseNew(out: *mut *mut Response, _request: *mut Request) -> *mut Error {
        *out = make(FakeResponse::default()).cast();
        null_mut()
    }
    fn TRITONBACKEND_ResponseDelete(response: *mut Response) -> *mut Error {
        take(response.cast::<FakeResponse>());
        null_mut()
    }
    fn TRITONBACKEND_ResponseOutput(
        response: *mut Response, output: *mut *mut Output, _name: *const c_char, datatype: u32, shape: *const i64, dims: u32
    ) -> *mut Error {
        assert_eq!((datatype, dims, *shape), (13, 1, 1));
        *output = response.cast();
        null_mut()
    }
    fn TRITONBACKEND_OutputBuffer(
        output: *mut Output, buffer: *mut *mut c_void, size: u64, kind: *mut u32, device: *mut i64
    ) -> *mut Error {
        let response = &mut *output.cast::<FakeResponse>();
        response.0 = vec![0; size as usize];
        assert_eq!(*kind, MEMORY_CPU, "host memory is what is asked for");
        (*buffer, *kind, *device) = (response.0.as_mut_ptr().cast(), with(|s| s.memory), 1);
        null_mut()
    }
    fn TRITONBACKEND_ResponseSetStringParameter(
        _response: *mut Response, name: *const c_char, value: *const c_char
    ) -> *mut Error {
        log(format!("{} {}", text(name), text(value)))
    }
    fn TRITONBACKEND_ResponseSetIntParameter(_response: *mut Response, name: *const c_char, value: i64) -> *mut Error {
        log(format!("{} {value}", text(name)))
    }
    fn TRITONBACKEND_ResponseSetDoubleParameter(
        _response: *mut Response, name: *const c_char, value: f64
    ) -> *mut Error {
        log(format!("{} {value}", text(name)))
    }
    fn TRITONBACKEND_ResponseSend(response: *mut Response, flags: u32, error: *mut Error) -> *mut Error {
        let response = take(response.cast::<FakeResponse>());
        let what = if error.is_null() {
            response.0.get(4..).map_or(String::new(), |b| String::from_utf8(b.to_vec()).unwrap())
        } else {
            format!("error {}", text(TRITONSERVER_ErrorMessage(error)))
        };
        log(format!("send {flags} {what}"))
    }
    fn TRITONBACKEND_ModelInstanceReportStatistics(
        _instance: *mut Instance, _request: *mut Request, success: bool, exec_start: u64, compute_start: u64,
        compute_end: u64, exec_end: u64
    ) -> *mut Error {
        with(|s| s.times = [exec_start, compute_start, compute_end, exec_end]);
        log(format!("statistics {success}"))
    }
    fn TRITONBACKEND_ModelInstanceReportBatchStatistics(
        _instance: *mut Instance, rows: u64, exec_start: u64, compute_start: u64, compute_end: u64, exec_end: u64
    ) -> *mut Error {
        assert!(0 < exec_start && exec_start <= compute_start && compute_start <= compute_end && compute_end <= exec_end);
        with(|s| s.executions.push(rows));
        null_mut()
    }
    fn TRITONBACKEND_ModelInstanceResponseStatisticsNew(out: *mut *mut ResponseStatistics) -> *mut Error {
        *out = make(FakeStatistics::default()).cast();
        null_mut()
    }
    fn TRITONBACKEND_ModelInstanceResponseStatisticsDelete(this: *mut ResponseStatistics) -> *mut Error {
        take(this.cast::<FakeStatistics>());
        null_mut()
    }
    fn TRITONBACKEND_ModelInstanceResponseStatisticsSetModelInstance(
        _this: *mut ResponseStatistics, _instance: *mut Instance
    ) -> *mut Error {
        null_mut()
    }
    fn TRITONBACKEND_ModelInstanceResponseStatisticsSetResponseFactory(
        _this: *mut ResponseStatistics, factory: *mut Factory
    ) -> *mut Error {
        assert!(!factory.is_null());
        null_mut()
    }
    fn TRITONBACKEND_ModelInstanceResponseStatisticsSetResponseStart(this: *mut ResponseStatistics, ns: u64) -> *mut Error {
        (*this.cast::<FakeStatistics>()).start = ns;
        null_mut()
    }
    fn TRITONBACKEND_ModelInstanceResponseStatisticsSetComputeOutputStart(
        this: *mut ResponseStatistics, ns: u64
    ) -> *mut Error {
        (*this.cast::<FakeStatistics>()).computed = ns;
        null_mut()
    }
    fn TRITONBACKEND_ModelInstanceResponseStatisticsSetResponseEnd(this: *mut ResponseStatistics, ns: u64) -> *mut Error {
        (*this.cast::<FakeStatistics>()).end = ns;
        null_mut()
    }
    fn TRITONBACKEND_ModelInstanceResponseStatisticsSetError(this: *mut ResponseStatistics, error: *mut Error) -> *mut Error {
        let code = (!error.is_null()).then(|| TRITONSERVER_ErrorCode(error));
        (*this.cast::<FakeStatistics>()).error = code;
        null_mut()
    }
    fn TRITONBACKEND_ModelInstanceReportResponseStatistics(this: *mut ResponseStatistics) -> *mut Error {
        let one = (*this.cast::<FakeStatistics>()).clone();
        with(|s| s.responses.push(one));
        null_mut()
    }
    fn TRITONSERVER_LogMessage(level: u32, _file: *const c_char, _line: c_int, message: *const c_char) -> *mut Error {
        let line = format!("{level} {}", text(message));
        with(|s| s.messages.push(line));
        null_mut()
    }

    fn TRITONBACKEND_RequestInputCount(request: *mut Request, count: *mut u32) -> *mut Error {
        *count = (*request.cast::<Vec<FakeInput>>()).len() as u32;
        null_mut()
    }
    fn TRITONBACKEND_RequestInputByIndex(request: *mut Request, index: u32, out: *mut *mut Input) -> *mut Error {
        let inputs = &mut *request.cast::<Vec<FakeInput>>();
        *out = std::ptr::from_mut(&mut inputs[index as usize]).cast();
        null_mut()
    }
    fn TRITONBACKEND_InputProperties(
        input: *mut Input, name: *mut *const c_char, datatype: *mut u32, shape: *mut *const i64, dims: *mut u32,
        byte_size: *mut u64, buffers: *mut u32
    ) -> *mut Error {
        const SHAPE: [i64; 1] = [1];
        let input = &*input.cast::<FakeInput>();
        (*name, *datatype) = (input.name.as_ptr(), input.datatype);
        (*shape, *dims) = (SHAPE.as_ptr(), 1);
        (*byte_size, *buffers) = (input.bytes.len() as u64, 1);
        null_mut()
    }
    fn TRITONBACKEND_InputBuffer(
        input: *mut Input, _index: u32, buffer: *mut *const c_void, byte_size: *mut u64, kind: *mut u32, device: *mut i64
    ) -> *mut Error {
        let input = &*input.cast::<FakeInput>();
        assert_eq!(*kind, MEMORY_CPU, "host memory is what is asked for");
        (*buffer, *byte_size) = (input.bytes.as_ptr().cast(), input.bytes.len() as u64);
        (*kind, *device) = (input.memory, 2);
        null_mut()
    }
    fn TRITONBACKEND_RequestOutputCount(_request: *mut Request, count: *mut u32) -> *mut Error {
        *count = 1;
        null_mut()
    }
    fn TRITONBACKEND_RequestOutputName(_request: *mut Request, _index: u32, name: *mut *const c_char) -> *mut Error {
        *name = c"text_output".as_ptr();
        null_mut()
    }
    fn TRITONBACKEND_RequestParameterCount(_request: *mut Request, count: *mut u32) -> *mut Error {
        *count = 0;
        null_mut()
    }
    fn TRITONBACKEND_InferenceRequestTimeoutMicroseconds(_request: *mut Request, microseconds: *mut u64) -> *mut Error {
        *microseconds = 250_000;
        null_mut()
    }

    fn TRITONSERVER_ParameterNew(name: *const c_char, kind: u32, value: *const c_void) -> *mut Parameter {
        assert_eq!(kind, PARAMETER_STRING);
        make(format!("{}={}", text(name), text(value.cast()))).cast()
    }
    fn TRITONSERVER_ParameterDelete(parameter: *mut Parameter) {
        take(parameter.cast::<String>());
    }
    fn TRITONSERVER_MetricFamilyNew(
        out: *mut *mut MetricFamily, kind: u32, name: *const c_char, help: *const c_char
    ) -> *mut Error {
        assert!(!text(help).is_empty());
        *out = make(FakeFamily(kind, text(name))).cast();
        null_mut()
    }
    fn TRITONSERVER_MetricFamilyDelete(family: *mut MetricFamily) -> *mut Error {
        take(family.cast::<FakeFamily>());
        null_mut()
    }
    // Equal labels are one metric, as in Triton.
    fn TRITONSERVER_MetricNew(
        out: *mut *mut Metric, family: *mut MetricFamily, labels: *const *const Parameter, count: u64
    ) -> *mut Error {
        let FakeFamily(kind, name) = &*family.cast::<FakeFamily>();
        let labels = if count == 0 { &[] } else { std::slice::from_raw_parts(labels, count as usize) };
        let labels: Vec<String> = labels.iter().map(|l| (*l.cast::<String>()).clone()).collect();
        let key = format!("{name}{{{}}}", labels.join(","));
        with(|s| s.metrics.entry(key.clone()).or_insert((0, 0.0)).0 += 1);
        *out = make(FakeMetric { key, kind: *kind }).cast();
        null_mut()
    }
    fn TRITONSERVER_MetricDelete(metric: *mut Metric) -> *mut Error {
        let FakeMetric { key, .. } = take(metric.cast::<FakeMetric>());
        with(|s| {
            let uses = &mut s.metrics.get_mut(&key).unwrap().0;
            *uses -= 1;
            if *uses == 0 {
                s.metrics.remove(&key);
            }
        });
        null_mut()
    }
    fn TRITONSERVER_MetricIncrement(metric: *mut Metric, value: f64) -> *mut Error {
        let FakeMetric { key, kind } = &*metric.cast::<FakeMetric>();
        assert!(*kind == METRIC_GAUGE || (*kind == METRIC_COUNTER && value >= 0.0), "{key} {value}");
        with(|s| s.metrics.get_mut(key).unwrap().1 += value);
        null_mut()
    }
    fn TRITONSERVER_MetricArgsNew(out: *mut *mut MetricArgs) -> *mut Error {
        *out = make(0u8).cast();
        null_mut()
    }
    fn TRITONSERVER_MetricArgsSetHistogram(_args: *mut MetricArgs, bounds: *const f64, count: u64) -> *mut Error {
        let bounds = std::slice::from_raw_parts(bounds, count as usize);
        assert!(bounds.is_sorted());
        null_mut()
    }
    fn TRITONSERVER_MetricArgsDelete(args: *mut MetricArgs) -> *mut Error {
        take(args.cast::<u8>());
        null_mut()
    }
    fn TRITONSERVER_MetricNewWithArgs(
        out: *mut *mut Metric, family: *mut MetricFamily, labels: *const *const Parameter, count: u64,
        args: *const MetricArgs
    ) -> *mut Error {
        assert!(!args.is_null());
        super::abi::TRITONSERVER_MetricNew(out, family, labels, count)
    }
    fn TRITONSERVER_MetricObserve(metric: *mut Metric, value: f64) -> *mut Error {
        assert_eq!((*metric.cast::<FakeMetric>()).kind, METRIC_HISTOGRAM);
        with(|s| s.observed.push(value));
        null_mut()
    }
}
