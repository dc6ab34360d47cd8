// SPDX-License-Identifier: Apache-2.0
//! A request that is ours, and the one final flag that it gets.

use std::ffi::{CStr, CString};
use std::ptr::null_mut;

use super::error::{Failure, check};
use super::{abi, tensor};

/// A request between `ModelInstanceExecute` and its release.
///
/// However it ends, Triton gets in this order: one final flag, the factory's deletion, the statistics, the release. The
/// release comes last, since it may let Triton unload the model.
pub struct Reply {
    request: *mut abi::Request,
    factory: *mut abi::Factory,
    instance: *mut abi::Instance,
    times: Times,
    finished: bool,
    success: bool,
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

// SAFETY: Triton lets any thread answer a request, one at a time.
unsafe impl Send for Reply {}

impl Reply {
    /// Takes the request over. Where Triton gives no factory, it stays the caller's.
    ///
    /// # Safety
    /// `request` and `instance` are Triton's and live; nobody else releases the request.
    pub unsafe fn new(
        instance: *mut abi::Instance,
        request: *mut abi::Request,
    ) -> Result<Self, Failure> {
        let mut factory = null_mut();
        // SAFETY: by the caller.
        unsafe { check(abi::TRITONBACKEND_ResponseFactoryNew(&mut factory, request))? };
        Ok(Self {
            request,
            factory,
            instance,
            times: Times::default(),
            finished: false,
            success: false,
        })
    }

    pub fn set_times(&mut self, times: Times) {
        self.times = times;
    }

    pub fn times(&self) -> Times {
        self.times
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
    pub fn send_text(&mut self, output: &CStr, text: &str, last: bool) -> Result<(), Failure> {
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
            if let Err(failure) = fill(response, outputs, parameters) {
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
        }
        self.success = last;
        Ok(())
    }

    /// Ends the request with an error.
    pub fn fail(mut self, failure: Failure) {
        self.send_failure(failure);
    }

    fn send_failure(&mut self, failure: Failure) {
        if self.finished {
            return;
        }
        self.finished = true;
        let mut response = null_mut();
        // SAFETY: as above. The error stays ours.
        unsafe {
            if check(abi::TRITONBACKEND_ResponseNewFromFactory(
                &mut response,
                self.factory,
            ))
            .is_err()
            {
                let _ = check(abi::TRITONBACKEND_ResponseFactorySendFlags(
                    self.factory,
                    abi::RESPONSE_COMPLETE_FINAL,
                ));
                return;
            }
            let error = failure.into_raw();
            let _ = check(abi::TRITONBACKEND_ResponseSend(
                response,
                abi::RESPONSE_COMPLETE_FINAL,
                error,
            ));
            abi::TRITONSERVER_ErrorDelete(error);
        }
    }
}

/// # Safety
/// `response` is live.
unsafe fn fill(
    response: *mut abi::Response,
    outputs: &[(&CStr, Tensor)],
    parameters: &[(CString, Parameter)],
) -> Result<(), Failure> {
    // SAFETY: by the caller; Triton copies names and values.
    unsafe {
        for (name, tensor) in outputs {
            write(response, name, tensor)?;
        }
        for (name, value) in parameters {
            check(match value {
                Parameter::Int(value) => {
                    abi::TRITONBACKEND_ResponseSetIntParameter(response, name.as_ptr(), *value)
                }
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
unsafe fn write(response: *mut abi::Response, name: &CStr, tensor: &Tensor) -> Result<(), Failure> {
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
    let shape = [elements];
    // SAFETY: by the caller; the buffer has the size asked for.
    unsafe {
        check(abi::TRITONBACKEND_ResponseOutput(
            response,
            &mut output,
            name.as_ptr(),
            datatype,
            shape.as_ptr(),
            1,
        ))?;
        check(abi::TRITONBACKEND_OutputBuffer(
            output,
            &mut buffer,
            bytes.len() as u64,
            &mut kind,
            &mut id,
        ))?;
        if kind != abi::MEMORY_CPU && kind != abi::MEMORY_CPU_PINNED {
            return Err(Failure::unsupported(format!(
                "output {}: the server gave memory of type {kind}, only host memory (0, 1) is written",
                name.to_string_lossy()
            )));
        }
        if !bytes.is_empty() {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), buffer.cast(), bytes.len());
        }
    }
    Ok(())
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.send_failure(Failure::internal("the request was given up"));
        let t = self.times;
        // SAFETY: all three live until the release. A failure here can reach nobody.
        unsafe {
            let _ = check(abi::TRITONBACKEND_ResponseFactoryDelete(self.factory));
            let _ = check(abi::TRITONBACKEND_ModelInstanceReportStatistics(
                self.instance,
                self.request,
                self.success,
                t.exec_start,
                t.compute_start,
                t.compute_end,
                t.exec_end,
            ));
            let _ = check(abi::TRITONBACKEND_RequestRelease(
                self.request,
                abi::REQUEST_RELEASE_ALL,
            ));
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

        host::reply().fail(Failure::invalid("bad"));
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
    fn memory_that_cannot_be_written_is_refused_and_nothing_leaks() {
        let mut reply = host::reply();
        host::set_memory(abi::MEMORY_GPU);
        let failure = reply.send_text(c"text_output", "a", false).unwrap_err();
        assert!(
            failure.text.contains("text_output") && failure.text.contains("type 2"),
            "{}",
            failure.text
        );
        host::set_memory(abi::MEMORY_CPU_PINNED);
        reply.send_text(c"text_output", "b", true).unwrap();
        drop(reply);
        assert_eq!(host::take_log(), [&["send 1 b"][..], &END].concat());
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
