// SPDX-License-Identifier: Apache-2.0
//! A request that is ours, and the one final flag that it gets.

use std::ffi::{CStr, CString};
use std::ptr::null_mut;

use super::error::{Failure, check};
use super::statistics::{self, Span};
use super::{abi, log, memory, tensor};
use crate::clock::now_ns;

/// A request between `ModelInstanceExecute` and its release.
///
/// However it ends, Triton gets in this order: one final flag, the factory's deletion, the statistics, the release. The
/// release comes last, since it may let Triton unload the model.
pub struct Reply {
    request: *mut abi::Request,
    factory: *mut abi::Factory,
    instance: *mut abi::Instance,
    times: Times,
    span: Span,
    finished: bool,
    success: bool,
    /// Triton counts it: it succeeded, or failed for a reason of ours.
    counts: bool,
    /// Outputs have a leading dimension of 1.
    leading: bool,
}

/// A one-dimensional output.
pub enum Tensor<'a> {
    /// one string
    Text(&'a str),
    /// one UINT32
    Count(u32),
    /// INT32
    Tokens(&'a [i32]),
}

/// A parameter of a response.
pub enum Parameter {
    Int(i64),
    /// A text, with servers that take no numbers with a fraction.
    Number(f64),
    Text(CString),
}

/// Nanoseconds of CLOCK_MONOTONIC.
#[derive(Debug, Clone, Copy, Default)]
pub struct Times {
    pub exec_start: u64,
    pub compute_start: u64,
    pub compute_end: u64,
    pub exec_end: u64,
}

impl Times {
    /// All at once, for a request that did not run.
    pub fn at(now: u64) -> Self {
        Self {
            exec_start: now,
            compute_start: now,
            compute_end: now,
            exec_end: now,
        }
    }
}

// SAFETY: Triton lets any thread answer a request, one at a time.
unsafe impl Send for Reply {}

impl Reply {
    /// Takes the request over. None: Triton gave no factory, and the request has ended with an error.
    ///
    /// # Safety
    /// `request` and `instance` are Triton's and live; nobody else releases the request.
    pub unsafe fn new(instance: *mut abi::Instance, request: *mut abi::Request) -> Option<Self> {
        let mut factory = null_mut();
        // SAFETY: by the caller.
        let made = unsafe { check(abi::TRITONBACKEND_ResponseFactoryNew(&mut factory, request)) };
        if let Err(failure) = made {
            // SAFETY: by the caller.
            unsafe { refuse(instance, request, failure) };
            return None;
        }
        Some(Self {
            request,
            factory,
            instance,
            times: Times::default(),
            span: Span::default(),
            finished: false,
            success: false,
            counts: true,
            leading: false,
        })
    }

    pub fn set_leading(&mut self, leading: bool) {
        self.leading = leading;
    }

    pub fn set_times(&mut self, times: Times) {
        self.times = times;
    }

    pub fn times(&self) -> Times {
        self.times
    }

    /// When the next response was made.
    pub fn set_span(&mut self, span: Span) {
        self.span = span;
    }

    /// Whether the client went away or asked to stop.
    pub fn is_cancelled(&self) -> bool {
        let mut cancelled = false;
        // SAFETY: the factory lives as long as this.
        let asked = unsafe {
            check(abi::TRITONBACKEND_ResponseFactoryIsCancelled(
                self.factory,
                &mut cancelled,
            ))
        };
        asked.is_ok() && cancelled
    }

    /// Sends one string output; `last` makes it the final response. After that, nothing more can be sent.
    #[cfg(test)]
    fn send_text(&mut self, output: &CStr, text: &str, last: bool) -> Result<(), Failure> {
        self.send(&[(output, Tensor::Text(text))], &[], last)
    }

    /// Sends one response with these outputs and parameters; `last` makes it the final one.
    pub fn send(
        &mut self,
        outputs: &[(&CStr, Tensor)],
        parameters: &[(CString, Parameter)],
        last: bool,
    ) -> Result<(), Failure> {
        if self.finished {
            return Err(Failure::internal("a response after the final one"));
        }
        let mut response = null_mut();
        // SAFETY: the factory lives; the response is sent or deleted below, once.
        unsafe {
            check(abi::TRITONBACKEND_ResponseNewFromFactory(
                &mut response,
                self.factory,
            ))?;
            if let Err(failure) = fill(response, outputs, parameters, self.leading) {
                // The write's failure says more than one of the deletion.
                let _ = check(abi::TRITONBACKEND_ResponseDelete(response));
                return Err(failure);
            }
            let flags = if last {
                abi::RESPONSE_COMPLETE_FINAL
            } else {
                0
            };
            // Sending takes the response in any case, and the flag with it.
            self.finished = last;
            check(abi::TRITONBACKEND_ResponseSend(response, flags, null_mut()))?;
            statistics::response(self.instance, self.factory, self.span, now_ns(), null_mut());
        }
        self.success = last;
        Ok(())
    }

    /// Ends the request with an error.
    pub fn fail(mut self, failure: Failure) {
        if self.times.exec_start == 0 {
            self.times = Times::at(now_ns());
        }
        self.send_failure(failure);
    }

    fn send_failure(&mut self, failure: Failure) {
        if self.finished {
            return;
        }
        self.finished = true;
        // Triton has one reason for all failures that a backend reports, "BACKEND", which alerts watch. What the client took
        // back or got wrong, and what there is no room for, is none; `drex_requests_ended_total` has them.
        self.counts = !matches!(
            failure.code,
            abi::ERROR_CANCELLED
                | abi::ERROR_INVALID_ARG
                | abi::ERROR_UNSUPPORTED
                | abi::ERROR_UNAVAILABLE
        );
        let mut response = null_mut();
        // SAFETY: as above.
        unsafe {
            if check(abi::TRITONBACKEND_ResponseNewFromFactory(
                &mut response,
                self.factory,
            ))
            .is_err()
            {
                log::error(&format!(
                    "a request ends without a response: {}",
                    failure.text
                ));
                let _ = check(abi::TRITONBACKEND_ResponseFactorySendFlags(
                    self.factory,
                    abi::RESPONSE_COMPLETE_FINAL,
                ));
                return;
            }
            let error = send_error(response, failure);
            let end = now_ns();
            let span = Span {
                start: if self.span.start > 0 {
                    self.span.start
                } else {
                    end
                },
                computed: 0,
            };
            statistics::response(self.instance, self.factory, span, end, error);
            abi::TRITONSERVER_ErrorDelete(error);
        }
    }
}

/// Sends an error as the final response. The error that comes back is the caller's to delete.
///
/// # Safety
/// `response` is live; it is given away.
unsafe fn send_error(response: *mut abi::Response, failure: Failure) -> *mut abi::Error {
    let error = failure.into_raw();
    // SAFETY: by the caller.
    unsafe {
        let _ = check(abi::TRITONBACKEND_ResponseSend(
            response,
            abi::RESPONSE_COMPLETE_FINAL,
            error,
        ));
    }
    error
}

/// Ends a request that has no factory.
///
/// # Safety
/// As `Reply::new`.
unsafe fn refuse(instance: *mut abi::Instance, request: *mut abi::Request, failure: Failure) {
    let now = now_ns();
    let mut response = null_mut();
    log::error(&format!("a request without a factory: {}", failure.text));
    // SAFETY: by the caller; the release is the last call.
    unsafe {
        if check(abi::TRITONBACKEND_ResponseNew(&mut response, request)).is_ok() {
            abi::TRITONSERVER_ErrorDelete(send_error(response, failure));
        }
        end(instance, request, Some((false, Times::at(now))));
    }
}

/// `counted`: what Triton's statistics have of it, if anything.
///
/// # Safety
/// Both are live; the request is given away.
unsafe fn end(
    instance: *mut abi::Instance,
    request: *mut abi::Request,
    counted: Option<(bool, Times)>,
) {
    // SAFETY: by the caller. A failure here can reach nobody.
    unsafe {
        if let Some((success, t)) = counted {
            let _ = check(abi::TRITONBACKEND_ModelInstanceReportStatistics(
                instance,
                request,
                success,
                t.exec_start,
                t.compute_start,
                t.compute_end,
                t.exec_end,
            ));
        }
        let _ = check(abi::TRITONBACKEND_RequestRelease(
            request,
            abi::REQUEST_RELEASE_ALL,
        ));
    }
}

/// # Safety
/// `response` is live.
unsafe fn fill(
    response: *mut abi::Response,
    outputs: &[(&CStr, Tensor)],
    parameters: &[(CString, Parameter)],
    leading: bool,
) -> Result<(), Failure> {
    // SAFETY: by the caller; Triton copies names and values.
    unsafe {
        for (name, tensor) in outputs {
            write(response, name, tensor, leading)?;
        }
        for (name, value) in parameters {
            check(match value {
                Parameter::Int(value) => {
                    abi::TRITONBACKEND_ResponseSetIntParameter(response, name.as_ptr(), *value)
                }
                Parameter::Number(value) => number(response, name, *value),
                Parameter::Text(value) => abi::TRITONBACKEND_ResponseSetStringParameter(
                    response,
                    name.as_ptr(),
                    value.as_ptr(),
                ),
            })?;
        }
    }
    Ok(())
}

/// # Safety
/// `response` is live.
unsafe fn number(response: *mut abi::Response, name: &CStr, value: f64) -> *mut abi::Error {
    // SAFETY: by the caller; Triton copies name and value.
    unsafe {
        if let Some(set) = abi::TRITONBACKEND_ResponseSetDoubleParameter() {
            return set(response, name.as_ptr(), value);
        }
        let text = CString::new(value.to_string()).unwrap_or_default();
        abi::TRITONBACKEND_ResponseSetStringParameter(response, name.as_ptr(), text.as_ptr())
    }
}

/// # Safety
/// `response` is live.
unsafe fn write(
    response: *mut abi::Response,
    name: &CStr,
    tensor: &Tensor,
    leading: bool,
) -> Result<(), Failure> {
    let (datatype, elements, bytes) = match tensor {
        Tensor::Text(text) => (abi::TYPE_BYTES, 1, tensor::element(text)?),
        Tensor::Count(count) => (abi::TYPE_UINT32, 1, count.to_le_bytes().to_vec()),
        Tensor::Tokens(tokens) => (
            abi::TYPE_INT32,
            tokens.len() as i64,
            tokens.iter().flat_map(|t| t.to_le_bytes()).collect(),
        ),
    };
    let (mut output, mut buffer) = (null_mut(), null_mut());
    let (mut kind, mut id) = (abi::MEMORY_CPU, 0);
    let shape = [1, elements];
    let shape = if leading { &shape[..] } else { &shape[1..] };
    // SAFETY: by the caller; the buffer has the size asked for.
    unsafe {
        check(abi::TRITONBACKEND_ResponseOutput(
            response,
            &mut output,
            name.as_ptr(),
            datatype,
            shape.as_ptr(),
            shape.len() as u32,
        ))?;
        check(abi::TRITONBACKEND_OutputBuffer(
            output,
            &mut buffer,
            bytes.len() as u64,
            &mut kind,
            &mut id,
        ))?;
        memory::write(&name.to_string_lossy(), (kind, id), buffer, &bytes)
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.send_failure(Failure::internal("the request was given up"));
        // SAFETY: all three live until the release. A failure here can reach nobody.
        unsafe {
            let _ = check(abi::TRITONBACKEND_ResponseFactoryDelete(self.factory));
            let counted = self.counts.then_some((self.success, self.times));
            end(self.instance, self.request, counted);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::triton::fake_host as host;

    const END: [&str; 3] = ["delete factory", "statistics true", "release"];

    #[test]
    fn one_final_flag_however_a_request_ends() {
        let mut reply = host::reply();
        reply.send_text(c"text_output", "a", false).unwrap();
        reply.send_text(c"text_output", "b", true).unwrap();
        assert!(reply.send_text(c"text_output", "c", true).is_err());
        drop(reply);
        assert_eq!(
            host::take_log(),
            [&["send 0 a", "send 1 b"][..], &END].concat()
        );

        host::reply().fail(Failure::internal("bad"));
        assert_eq!(
            host::take_log(),
            [
                "send 1 error bad",
                "delete factory",
                "statistics false",
                "release"
            ]
        );

        drop(host::reply());
        assert_eq!(
            host::take_log(),
            [
                "send 1 error the request was given up",
                "delete factory",
                "statistics false",
                "release"
            ]
        );
        assert_eq!(host::live(), 0, "errors and responses that nobody deleted");
    }

    #[test]
    fn what_the_client_got_wrong_is_no_failure_of_the_backend() {
        for failure in [
            Failure::invalid("x"),
            Failure::unsupported("x"),
            Failure::unavailable("x"),
            Failure {
                code: abi::ERROR_CANCELLED,
                text: "x".into(),
            },
        ] {
            host::reply().fail(failure);
            assert_eq!(
                host::take_log(),
                ["send 1 error x", "delete factory", "release"]
            );
        }
        assert_eq!(host::live(), 0);
    }

    #[test]
    fn a_panic_ends_the_request_too() {
        let result = std::panic::catch_unwind(|| {
            let _reply = host::reply();
            panic!("a step failed");
        });
        assert!(result.is_err());
        assert_eq!(host::take_log().last().unwrap(), "release");
        assert_eq!(host::live(), 0);
    }

    #[test]
    fn outputs_go_where_the_server_wants_them_and_a_failure_leaks_nothing() {
        let mut reply = host::reply();
        host::set_memory(abi::MEMORY_GPU);
        let failure = reply.send_text(c"text_output", "a", false).unwrap_err();
        assert!(
            failure.text.contains("text_output") && failure.text.contains("GPU 1"),
            "{}",
            failure.text
        );
        memory::fake::set_driver(true);
        reply.send_text(c"text_output", "gpu", false).unwrap();
        memory::fake::set_driver(false);
        assert_eq!(
            memory::fake::take_log(),
            [
                "retain 101",
                "push 101",
                "to device 7",
                "synchronize",
                "pop",
                "release 101"
            ]
        );
        host::set_memory(abi::MEMORY_CPU_PINNED);
        reply.send_text(c"text_output", "b", true).unwrap();
        drop(reply);
        assert_eq!(
            host::take_log(),
            [&["send 0 gpu", "send 1 b"][..], &END].concat()
        );
        assert_eq!(host::live(), 0);
    }

    #[test]
    fn each_response_has_its_own_times() {
        let mut reply = host::reply();
        reply.set_span(Span {
            start: 5,
            computed: 7,
        });
        reply.send_text(c"text_output", "a", false).unwrap();
        reply.set_span(Span {
            start: 7,
            computed: 9,
        });
        reply.fail(Failure {
            code: abi::ERROR_CANCELLED,
            text: "gone".into(),
        });
        let [first, last] = &host::take_responses()[..] else {
            panic!("two responses")
        };
        assert_eq!((first.start, first.computed, first.error), (5, 7, None));
        assert_eq!(
            (last.start, last.computed, last.error),
            (7, 0, Some(abi::ERROR_CANCELLED))
        );
        assert!(first.end > 9 && last.end >= first.end);
        host::take_log();
        assert_eq!(host::live(), 0);
    }

    #[test]
    fn a_request_without_a_factory_ends_with_an_error() {
        host::refuse_factories(true);
        // SAFETY: the fake host looks at neither.
        let reply = unsafe { Reply::new(null_mut(), null_mut()) };
        host::refuse_factories(false);
        assert!(reply.is_none());
        assert_eq!(
            host::take_log(),
            ["send 1 error no factory", "statistics false", "release"]
        );
        assert_eq!(
            host::take_messages(),
            ["2 drex: a request without a factory: no factory"]
        );
        assert_eq!(host::live(), 0);
    }

    #[test]
    fn without_a_response_the_flag_alone_is_sent() {
        let reply = host::reply();
        host::refuse_responses(true);
        drop(reply);
        host::refuse_responses(false);
        assert_eq!(
            host::take_log(),
            ["flags 1", "delete factory", "statistics false", "release"]
        );
        assert_eq!(host::live(), 0);
    }

    #[test]
    fn cancellation_is_seen() {
        let reply = host::reply();
        assert!(!reply.is_cancelled());
        host::cancel(true);
        assert!(reply.is_cancelled());
        host::cancel(false);
        drop(reply);
        host::take_log();
    }
}
