// SPDX-License-Identifier: Apache-2.0
//! What a request asks for: its inputs, its parameters, the outputs it wants.

use std::ffi::{CStr, c_void};
use std::ptr::{null, null_mut};

use serde_json::{Value, json};

use crate::sampling::{Said, Sampling, Source};
use crate::settings::{INPUTS, OUTPUTS};
use crate::triton::error::{Failure, check};
use crate::triton::{abi, memory, tensor};

pub struct Asked {
    pub prompt: String,
    pub stream: bool,
    pub sampling: Sampling,
    pub want: Want,
}

/// Which outputs to send.
#[derive(Default, Clone)]
pub struct Want {
    pub text: bool,
    pub finish_reason: bool,
    pub num_input_tokens: bool,
    pub num_output_tokens: bool,
    pub token_ids: bool,
    /// The prompt stands before the answer.
    pub prepend: Option<String>,
}

struct Input {
    name: String,
    datatype: u32,
    shape: Vec<i64>,
    bytes: Vec<u8>,
}

/// # Safety
/// The request is live and ours.
pub unsafe fn read(request: *mut abi::Request) -> Result<Asked, Failure> {
    let mut prompt = None;
    let mut stream = false;
    let mut said = Said::default();
    let (mut tensors, mut json) = (Vec::new(), Vec::new());
    let mut exclude = None;
    let (mut reason, mut n_in, mut n_out, mut ids) = (None, None, None, None);
    // SAFETY: by the caller.
    unsafe {
        for (name, value) in parameters(request)? {
            said.add(Source::Parameter, &name, value)?;
        }
        let mut count = 0;
        check(abi::TRITONBACKEND_RequestInputCount(request, &mut count))?;
        for index in 0..count {
            let input = input(request, index)?;
            match input.name.as_str() {
                "text_input" => prompt = Some(text(&input)?),
                "sampling_parameters" => {
                    let value: Value = serde_json::from_str(&text(&input)?).map_err(|error| {
                        Failure::invalid(format!("sampling_parameters: not JSON: {error}"))
                    })?;
                    let Value::Object(object) = value else {
                        return Err(Failure::invalid(format!(
                            "sampling_parameters: not a JSON object: {value}"
                        )));
                    };
                    json.extend(object);
                }
                "stream" => stream = flag(&input)?,
                "exclude_input_in_output" => exclude = Some(flag(&input)?),
                "return_finish_reason" => reason = Some(flag(&input)?),
                "return_num_input_tokens" => n_in = Some(flag(&input)?),
                "return_num_output_tokens" => n_out = Some(flag(&input)?),
                "return_token_ids" => ids = Some(flag(&input)?),
                name if INPUTS.iter().any(|(known, ..)| *known == name) => {
                    let value = tensor::value(name, input.datatype, &input.shape, &input.bytes)?;
                    tensors.push((name.to_owned(), value));
                }
                name => return Err(Failure::invalid(format!("unknown input {name}"))),
            }
        }
        for (source, names) in [(Source::Input, tensors), (Source::Json, json)] {
            for (name, value) in names {
                said.add(source, &name, value)?;
            }
        }
        let prompt = prompt.ok_or_else(|| Failure::invalid("text_input is missing"))?;
        let mut sampling = said.sampling()?;
        if let Some(microseconds) = timeout(request)
            && sampling.timeout_us == 0
        {
            sampling.timeout_us = microseconds;
        }
        let prepend = !exclude.unwrap_or(stream);
        if prepend && stream {
            return Err(Failure::invalid(
                "exclude_input_in_output is false, must be true with stream",
            ));
        }
        let wanted = outputs(request)?;
        let has = |name: &str| wanted.iter().any(|w| w == name);
        // A client that names no output wants all of them, as Triton tells it: then the flags decide.
        let named = wanted.len() < OUTPUTS.len();
        let wants = |name: &str, flag: Option<bool>| has(name) && flag.unwrap_or(named);
        let want = Want {
            text: has("text_output"),
            finish_reason: wants("finish_reason", reason),
            num_input_tokens: wants("num_input_tokens", n_in),
            num_output_tokens: wants("num_output_tokens", n_out),
            token_ids: wants("token_ids", ids),
            prepend: prepend.then(|| prompt.clone()),
        };
        Ok(Asked {
            prompt,
            stream,
            sampling,
            want,
        })
    }
}

/// # Safety
/// As `read`.
unsafe fn input(request: *mut abi::Request, index: u32) -> Result<Input, Failure> {
    let mut input = null_mut();
    let (mut name, mut datatype, mut shape, mut dims) = (null(), 0, null(), 0);
    let (mut size, mut buffers) = (0, 0);
    // SAFETY: Triton fills what the pointers name; it all lives as long as the request.
    unsafe {
        check(abi::TRITONBACKEND_RequestInputByIndex(
            request, index, &mut input,
        ))?;
        check(abi::TRITONBACKEND_InputProperties(
            input,
            &mut name,
            &mut datatype,
            &mut shape,
            &mut dims,
            &mut size,
            &mut buffers,
        ))?;
        let name = CStr::from_ptr(name).to_string_lossy().into_owned();
        let shape = if dims == 0 {
            Vec::new()
        } else {
            std::slice::from_raw_parts(shape, dims as usize).to_vec()
        };
        let mut bytes = Vec::with_capacity(size as usize);
        for at in 0..buffers {
            let (mut buffer, mut length) = (null(), 0);
            let (mut kind, mut id) = (abi::MEMORY_CPU, 0);
            check(abi::TRITONBACKEND_InputBuffer(
                input,
                at,
                &mut buffer,
                &mut length,
                &mut kind,
                &mut id,
            ))?;
            memory::read(&name, (kind, id), buffer, length as usize, &mut bytes)?;
        }
        Ok(Input {
            name,
            datatype,
            shape,
            bytes,
        })
    }
}

fn one(input: &Input, datatype: u32, what: &str) -> Result<(), Failure> {
    if input.datatype != datatype {
        return Err(Failure::invalid(format!(
            "{}: has data type {}, must be {what}",
            input.name, input.datatype
        )));
    }
    if input.shape.iter().product::<i64>() != 1 {
        return Err(Failure::invalid(format!(
            "{}: has shape {:?}, must have one element",
            input.name, input.shape
        )));
    }
    Ok(())
}

fn text(input: &Input) -> Result<String, Failure> {
    one(input, abi::TYPE_BYTES, "BYTES")?;
    Ok(tensor::strings(&input.name, &input.bytes, 1)?[0].to_owned())
}

fn flag(input: &Input) -> Result<bool, Failure> {
    one(input, abi::TYPE_BOOL, "BOOL")?;
    match input.bytes[..] {
        [byte] => Ok(byte != 0),
        _ => Err(Failure::invalid(format!(
            "{}: has {} bytes, must have 1",
            input.name,
            input.bytes.len()
        ))),
    }
}

/// # Safety
/// As `read`.
unsafe fn outputs(request: *mut abi::Request) -> Result<Vec<String>, Failure> {
    let mut count = 0;
    let mut names = Vec::new();
    // SAFETY: by the caller.
    unsafe {
        check(abi::TRITONBACKEND_RequestOutputCount(request, &mut count))?;
        for index in 0..count {
            let mut name = null();
            check(abi::TRITONBACKEND_RequestOutputName(
                request, index, &mut name,
            ))?;
            names.push(CStr::from_ptr(name).to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

/// The request's parameters: what the body of /generate has beside the inputs arrives here.
///
/// # Safety
/// As `read`.
unsafe fn parameters(request: *mut abi::Request) -> Result<Vec<(String, Value)>, Failure> {
    let mut count = 0;
    let mut out = Vec::new();
    // SAFETY: Triton's texts and values live as long as the request; the type's name says what a value is.
    unsafe {
        check(abi::TRITONBACKEND_RequestParameterCount(
            request, &mut count,
        ))?;
        for index in 0..count {
            let (mut name, mut kind, mut value): (_, _, *const c_void) = (null(), 0, null());
            check(abi::TRITONBACKEND_RequestParameter(
                request, index, &mut name, &mut kind, &mut value,
            ))?;
            let name = CStr::from_ptr(name).to_string_lossy().into_owned();
            // The server has its own parameters. The identifier of a request in /generate is for whoever reads a trace.
            if name.starts_with("triton_") || name == "id" {
                continue;
            }
            let kind = CStr::from_ptr(abi::TRITONSERVER_ParameterTypeString(kind));
            let value = match kind.to_bytes() {
                b"STRING" => json!(CStr::from_ptr(value.cast()).to_string_lossy()),
                b"INT" => json!(value.cast::<i64>().read_unaligned()),
                b"BOOL" => json!(value.cast::<bool>().read_unaligned()),
                b"DOUBLE" => json!(value.cast::<f64>().read_unaligned()),
                other => {
                    return Err(Failure::invalid(format!(
                        "parameter {name} has type {}",
                        String::from_utf8_lossy(other)
                    )));
                }
            };
            out.push((name, value));
        }
    }
    Ok(out)
}

/// The request's timeout in microseconds; None without one, and with servers that do not tell.
///
/// # Safety
/// As `read`.
unsafe fn timeout(request: *mut abi::Request) -> Option<u64> {
    let ask = abi::TRITONBACKEND_InferenceRequestTimeoutMicroseconds()?;
    let mut microseconds = 0;
    // SAFETY: by the caller.
    unsafe { check(ask(request, &mut microseconds)).ok()? };
    (microseconds > 0).then_some(microseconds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::triton::fake_host::{self as host, FakeInput};

    #[test]
    fn inputs_are_read_wherever_they_lie() {
        let of = |memory| {
            vec![
                FakeInput {
                    name: c"text_input".into(),
                    datatype: abi::TYPE_BYTES,
                    bytes: tensor::element("hello").unwrap(),
                    memory,
                },
                FakeInput {
                    name: c"stream".into(),
                    datatype: abi::TYPE_BOOL,
                    bytes: vec![1],
                    memory: abi::MEMORY_CPU_PINNED,
                },
            ]
        };
        let mut inputs = of(abi::MEMORY_GPU);
        // SAFETY: the fake host's request.
        let asked = |inputs: &mut Vec<FakeInput>| unsafe { read(host::request(inputs)) };
        let failure = asked(&mut inputs).err().unwrap();
        assert!(
            failure.text.starts_with("text_input: ") && failure.text.contains("GPU 2"),
            "{}",
            failure.text
        );
        memory::fake::set_driver(true);
        let gpu = asked(&mut inputs).unwrap();
        memory::fake::set_driver(false);
        assert_eq!(
            memory::fake::take_log(),
            ["retain 102", "push 102", "to host 9", "pop", "release 102"]
        );
        let cpu = asked(&mut of(abi::MEMORY_CPU)).unwrap();
        for asked in [gpu, cpu] {
            assert_eq!(asked.prompt, "hello");
            assert!(asked.stream && asked.want.text);
            assert_eq!(asked.sampling.timeout_us, 250_000);
        }
    }
}
