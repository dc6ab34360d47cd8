// SPDX-License-Identifier: Apache-2.0
//! What Triton calls. No panic leaves.

use std::ffi::{CStr, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::ptr::{null, null_mut};
use std::sync::Arc;

use crate::instance::Instance;
use crate::model::Model;
use crate::triton::error::{Failure, check};
use crate::triton::reply::Reply;
use crate::triton::{abi, log, version};
use crate::{llama, registry, request};

fn entry(f: impl FnOnce() -> Result<(), Failure>) -> *mut abi::Error {
    let result = catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        Err(Failure::internal(format!(
            "drex: a panic was caught: {}",
            log::panic_text(&*panic)
        )))
    });
    match result {
        Ok(()) => null_mut(),
        Err(failure) => failure.into_raw(),
    }
}

/// # Safety
/// Called by Triton, when it loads the backend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn TRITONBACKEND_Initialize(backend: *mut abi::Backend) -> *mut abi::Error {
    if let Err(name) = abi::load_first() {
        // There is nothing that an error could be made with.
        eprintln!("drex: this process has no {name}: it is no server of Triton's");
        std::process::abort();
    }
    entry(|| {
        version::require()?;
        abi::load()?;
        // SAFETY: texts of Triton live as long as the backend.
        let folder = unsafe {
            let (mut kind, mut location) = (0, null());
            check(abi::TRITONBACKEND_BackendArtifacts(
                backend,
                &mut kind,
                &mut location,
            ))?;
            if kind != abi::ARTIFACT_FILESYSTEM {
                return Err(Failure::unsupported(format!(
                    "the backend lies in a place of type {kind}; only file systems (0) are read"
                )));
            }
            PathBuf::from(CStr::from_ptr(location).to_string_lossy().into_owned())
        };
        llama::load(&folder)?;
        registry::register();
        Ok(())
    })
}

/// Where models run whose configuration does not say it: without this, Triton puts one instance on each GPU.
///
/// # Safety
/// Called by Triton, after `TRITONBACKEND_Initialize`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn TRITONBACKEND_GetBackendAttribute(
    _: *mut abi::Backend,
    attribute: *mut abi::BackendAttribute,
) -> *mut abi::Error {
    // SAFETY: live during the call; no devices are named.
    entry(|| unsafe {
        check(
            abi::TRITONBACKEND_BackendAttributeAddPreferredInstanceGroup(
                attribute,
                abi::KIND_CPU,
                1,
                null(),
                0,
            ),
        )
    })
}

/// # Safety
/// Called by Triton, after the last model is gone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn TRITONBACKEND_Finalize(_: *mut abi::Backend) -> *mut abi::Error {
    entry(|| {
        registry::unregister();
        Ok(())
    })
}

/// # Safety
/// Called by Triton.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn TRITONBACKEND_ModelInitialize(model: *mut abi::Model) -> *mut abi::Error {
    // SAFETY: Triton's model is live; the state is taken back in ModelFinalize.
    entry(|| unsafe {
        let state = Arc::into_raw(Arc::new(Model::new(model)?)).cast_mut();
        check(abi::TRITONBACKEND_ModelSetState(model, state.cast())).inspect_err(|_| {
            drop(Arc::from_raw(state));
        })
    })
}

/// # Safety
/// Called by Triton, also after ModelInitialize failed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn TRITONBACKEND_ModelFinalize(model: *mut abi::Model) -> *mut abi::Error {
    // SAFETY: the state is NULL or what ModelInitialize set.
    entry(|| unsafe {
        let mut state: *mut c_void = null_mut();
        check(abi::TRITONBACKEND_ModelState(model, &mut state))?;
        check(abi::TRITONBACKEND_ModelSetState(model, null_mut()))?;
        if !state.is_null() {
            drop(Arc::from_raw(state.cast::<Model>()));
        }
        Ok(())
    })
}

/// # Safety
/// Called by Triton.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn TRITONBACKEND_ModelInstanceInitialize(
    instance: *mut abi::Instance,
) -> *mut abi::Error {
    // SAFETY: as above.
    entry(|| unsafe {
        let (mut model, mut state) = (null_mut(), null_mut());
        check(abi::TRITONBACKEND_ModelInstanceModel(instance, &mut model))?;
        check(abi::TRITONBACKEND_ModelState(model, &mut state))?;
        if state.is_null() {
            return Err(Failure::internal("the model was not initialized"));
        }
        let mut name = null();
        check(abi::TRITONBACKEND_ModelInstanceName(instance, &mut name))?;
        let name = CStr::from_ptr(name).to_string_lossy();
        let (mut kind, mut device) = (0, 0);
        check(abi::TRITONBACKEND_ModelInstanceKind(instance, &mut kind))?;
        check(abi::TRITONBACKEND_ModelInstanceDeviceId(
            instance,
            &mut device,
        ))?;
        let gpu = (kind == abi::KIND_GPU).then_some(device);
        let model = state.cast::<Model>().cast_const();
        Arc::increment_strong_count(model);
        let model = Arc::from_raw(model);
        let started = Instance::start(&model, instance, &name, gpu)?;
        let state = Box::into_raw(Box::new(started));
        check(abi::TRITONBACKEND_ModelInstanceSetState(
            instance,
            state.cast(),
        ))
        .inspect_err(|_| drop(Box::from_raw(state)))
    })
}

/// # Safety
/// Called by Triton, also after ModelInstanceInitialize failed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn TRITONBACKEND_ModelInstanceFinalize(
    instance: *mut abi::Instance,
) -> *mut abi::Error {
    // SAFETY: as above.
    entry(|| unsafe {
        let mut state: *mut c_void = null_mut();
        check(abi::TRITONBACKEND_ModelInstanceState(instance, &mut state))?;
        check(abi::TRITONBACKEND_ModelInstanceSetState(
            instance,
            null_mut(),
        ))?;
        if !state.is_null() {
            drop(Box::from_raw(state.cast::<Instance>()));
        }
        Ok(())
    })
}

/// Takes every request over and never fails: each is answered later, or now where it asks for what cannot be.
///
/// # Safety
/// Called by Triton.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn TRITONBACKEND_ModelInstanceExecute(
    instance: *mut abi::Instance,
    requests: *mut *mut abi::Request,
    count: u32,
) -> *mut abi::Error {
    let mut state: *mut c_void = null_mut();
    // SAFETY: as above. Until the first request is taken, an error may be returned: all are then Triton's.
    let asked = unsafe { check(abi::TRITONBACKEND_ModelInstanceState(instance, &mut state)) };
    if let Err(failure) = asked {
        return failure.into_raw();
    }
    if state.is_null() {
        return Failure::internal("the instance was not initialized").into_raw();
    }
    for i in 0..count as usize {
        // SAFETY: Triton gives `count` live requests, which are ours now.
        let taken = catch_unwind(AssertUnwindSafe(|| unsafe {
            let request = *requests.add(i);
            let Some(reply) = Reply::new(instance, request) else {
                return;
            };
            let instance = &*state.cast::<Instance>();
            match request::read(request) {
                Ok(asked) => instance.submit(reply, asked),
                Err(failure) => instance.refuse(reply, failure),
            }
        }));
        // The panic has dropped the reply, which ended the request.
        if let Err(panic) = taken {
            log::error(&format!(
                "a request was given up by a panic: {}",
                log::panic_text(&*panic)
            ));
        }
    }
    null_mut()
}
