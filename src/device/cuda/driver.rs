// SPDX-License-Identifier: Apache-2.0

//! The functions of the CUDA driver that drex calls.
//!
//! cudarc finds the library and names the types. The functions are looked up
//! here, all of them before the first is called, with numbers as results: a
//! driver may be older than a symbol, and newer than an enumeration.

#![allow(non_snake_case)]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use cudarc::driver::sys::{
    CUcontext, CUdeviceptr, CUevent, CUfunction, CUmodule, CUstream, culib, is_culib_present,
};
use once_cell::sync::OnceCell;

use crate::core::error::{Error, Result};

macro_rules! driver {
    ($($name:ident($($arg:ident: $type:ty),*);)*) => {
        /// One function pointer each, with the driver's own signature.
        pub struct Driver {
            $($name: unsafe extern "C" fn($($type),*) -> c_int,)*
        }

        // The two that give texts are called by their pointers.
        #[allow(dead_code, clippy::too_many_arguments)]
        impl Driver {
            fn load() -> Result<Driver> {
                // SAFETY: loads the system's CUDA driver, whose initialisers
                // are as safe as they come.
                if !unsafe { is_culib_present() } {
                    return Err(missing("the CUDA driver library (libcuda.so.1) was not found"));
                }
                // SAFETY: it is there.
                let library = unsafe { culib() };
                Ok(Driver { $(
                    // SAFETY: the signature is the driver API's.
                    $name: unsafe {
                        *library.get(concat!(stringify!($name), "\0").as_bytes()).map_err(|_| {
                            missing(concat!("the CUDA driver has no ", stringify!($name)))
                        })?
                    },
                )* })
            }

            $(
                /// # Safety
                /// As the driver API's function of this name.
                pub unsafe fn $name(&self, $($arg: $type),*) -> Result<()> {
                    // SAFETY: by this function's contract.
                    let code = unsafe { (self.$name)($($arg),*) };
                    self.check(stringify!($name), code)
                }
            )*
        }
    };
}

driver! {
    cuCtxGetCurrent(context: *mut CUcontext);
    cuCtxPushCurrent_v2(context: CUcontext);
    cuCtxPopCurrent_v2(context: *mut CUcontext);
    cuModuleLoadData(module: *mut CUmodule, image: *const c_void);
    cuModuleUnload(module: CUmodule);
    cuModuleGetFunction(function: *mut CUfunction, module: CUmodule, name: *const c_char);
    cuFuncGetAttribute(value: *mut c_int, attribute: c_int, function: CUfunction);
    cuMemAlloc_v2(pointer: *mut CUdeviceptr, bytes: usize);
    cuMemFree_v2(pointer: CUdeviceptr);
    cuMemHostAlloc(pointer: *mut *mut c_void, bytes: usize, flags: c_uint);
    cuMemHostGetDevicePointer_v2(device: *mut CUdeviceptr, host: *mut c_void, flags: c_uint);
    cuMemFreeHost(pointer: *mut c_void);
    cuMemsetD8_v2(pointer: CUdeviceptr, value: u8, bytes: usize);
    cuMemcpyHtoD_v2(to: CUdeviceptr, from: *const c_void, bytes: usize);
    cuMemcpyDtoHAsync_v2(to: *mut c_void, from: CUdeviceptr, bytes: usize, stream: CUstream);
    cuPointerGetAttribute(value: *mut c_void, attribute: c_int, pointer: CUdeviceptr);
    cuEventCreate(event: *mut CUevent, flags: c_uint);
    cuEventDestroy_v2(event: CUevent);
    cuEventRecord(event: CUevent, stream: CUstream);
    cuEventSynchronize(event: CUevent);
    cuStreamIsCapturing(stream: CUstream, status: *mut c_int);
    cuStreamSynchronize(stream: CUstream);
    cuLaunchKernel(
        function: CUfunction,
        grid_x: c_uint, grid_y: c_uint, grid_z: c_uint,
        block_x: c_uint, block_y: c_uint, block_z: c_uint,
        shared_bytes: c_uint,
        stream: CUstream,
        args: *mut *mut c_void,
        extra: *mut *mut c_void
    );
    cuGetErrorName(code: c_int, text: *mut *const c_char);
    cuGetErrorString(code: c_int, text: *mut *const c_char);
}

fn missing(why: &'static str) -> Error {
    Error::Unsupported {
        field: "device",
        value: 1,
        why,
    }
}

impl Driver {
    /// Looked for again at each call until it is found.
    pub fn get() -> Result<&'static Driver> {
        static DRIVER: OnceCell<Driver> = OnceCell::new();
        DRIVER.get_or_try_init(Driver::load)
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        Err(Error::Driver {
            call,
            code,
            name: self.text(self.cuGetErrorName, code),
            text: self.text(self.cuGetErrorString, code),
        })
    }

    fn text(
        &self,
        of: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int,
        code: c_int,
    ) -> &'static str {
        let mut text = std::ptr::null();
        // SAFETY: writes a pointer to a static string, or fails.
        if unsafe { of(code, &mut text) } != 0 || text.is_null() {
            return "unknown error";
        }
        // SAFETY: the driver's own static text; the library is never unloaded.
        unsafe { CStr::from_ptr(text) }
            .to_str()
            .unwrap_or("unknown error")
    }
}

/// A context made current for as long as this lives, and the one before it
/// after that.
pub struct Current<'a> {
    driver: &'a Driver,
    pushed: bool,
}

impl<'a> Current<'a> {
    pub fn of(driver: &'a Driver, context: CUcontext) -> Result<Self> {
        let mut now: CUcontext = std::ptr::null_mut();
        // SAFETY: writes one handle.
        unsafe { driver.cuCtxGetCurrent(&mut now)? };
        let pushed = now != context;
        if pushed {
            // SAFETY: the host's context; a dead one is an error.
            unsafe { driver.cuCtxPushCurrent_v2(context)? };
        }
        Ok(Current { driver, pushed })
    }
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        if self.pushed {
            let mut old: CUcontext = std::ptr::null_mut();
            // SAFETY: ours is on top of this thread's stack. There is nobody
            // to tell of an error.
            let _ = unsafe { self.driver.cuCtxPopCurrent_v2(&mut old) };
        }
    }
}
