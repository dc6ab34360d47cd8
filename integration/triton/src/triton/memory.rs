// SPDX-License-Identifier: Apache-2.0
//! The bytes of inputs and outputs, in whichever memory Triton has them.
//!
//! Host memory is asked for, since texts are made there. Where a client shares GPU memory with the server, that is where
//! the server has the bytes, and one copy by the CUDA driver takes them over. The driver is looked for when it is needed.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::{null, null_mut};

use super::abi;
use super::error::Failure;

/// Appends the bytes of a buffer of Triton's. `what` is named in the error.
///
/// # Safety
/// At `from`, in memory of this kind, lie so many bytes.
pub unsafe fn read(
    what: &str,
    (kind, device): (u32, i64),
    from: *const c_void,
    count: usize,
    out: &mut Vec<u8>,
) -> Result<(), Failure> {
    if count == 0 {
        return Ok(());
    }
    // SAFETY: by the caller; the vector has room.
    unsafe {
        if is_host(what, kind)? {
            out.extend_from_slice(std::slice::from_raw_parts(from.cast::<u8>(), count));
            return Ok(());
        }
        out.reserve(count);
        let to = out.as_mut_ptr().add(out.len()).cast();
        on_device(what, device, |driver| {
            (driver.cuMemcpyDtoH_v2)(to, from as u64, count)
        })?;
        out.set_len(out.len() + count);
    }
    Ok(())
}

/// Writes a buffer of Triton's.
///
/// # Safety
/// At `to`, in memory of this kind, is room for the bytes.
pub unsafe fn write(
    what: &str,
    (kind, device): (u32, i64),
    to: *mut c_void,
    bytes: &[u8],
) -> Result<(), Failure> {
    if bytes.is_empty() {
        return Ok(());
    }
    // SAFETY: by the caller.
    unsafe {
        if is_host(what, kind)? {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.cast(), bytes.len());
            return Ok(());
        }
        on_device(what, device, |driver| {
            let code = (driver.cuMemcpyHtoD_v2)(to as u64, bytes.as_ptr().cast(), bytes.len());
            if code != 0 {
                return code;
            }
            // From pageable memory the call returns before the last bytes have arrived.
            (driver.cuStreamSynchronize)(null_mut())
        })
    }
}

fn is_host(what: &str, kind: u32) -> Result<bool, Failure> {
    match kind {
        abi::MEMORY_CPU | abi::MEMORY_CPU_PINNED => Ok(true),
        abi::MEMORY_GPU => Ok(false),
        _ => Err(Failure::unsupported(format!(
            "{what}: lies in memory of type {kind}, known are host memory (0, 1) and GPU memory (2)"
        ))),
    }
}

macro_rules! driver {
    ($(fn $name:ident($($arg:ty),*);)*) => {
        #[allow(non_snake_case)]
        struct Driver { $($name: unsafe extern "C" fn($($arg),*) -> c_int,)* }

        #[cfg(not(test))]
        impl Driver {
            /// Err: what is missing.
            fn load() -> Result<Self, String> {
                // SAFETY: the system's CUDA driver, whose functions have these types. It is never unloaded.
                unsafe {
                    let library = libloading::Library::new("libcuda.so.1").map_err(|e| crate::loader::reason(&e))?;
                    let library = std::mem::ManuallyDrop::new(library);
                    Ok(Self {
                        $($name: *library
                            .get(concat!(stringify!($name), "\0").as_bytes())
                            .map_err(|e| crate::loader::reason(&e))?,)*
                    })
                }
            }
        }
    };
}

driver! {
    fn cuInit(c_uint);
    fn cuDeviceGet(*mut c_int, c_int);
    fn cuDevicePrimaryCtxRetain(*mut *mut c_void, c_int);
    fn cuDevicePrimaryCtxRelease_v2(c_int);
    fn cuCtxPushCurrent_v2(*mut c_void);
    fn cuCtxPopCurrent_v2(*mut *mut c_void);
    fn cuMemcpyDtoH_v2(*mut c_void, u64, usize);
    fn cuMemcpyHtoD_v2(u64, *const c_void, usize);
    fn cuStreamSynchronize(*mut c_void);
    fn cuGetErrorName(c_int, *mut *const c_char);
}

impl Driver {
    fn failed(&self, call: &str, code: c_int) -> String {
        let mut name = null();
        // SAFETY: writes a pointer to a static text, or NULL.
        let name = unsafe {
            (self.cuGetErrorName)(code, &mut name);
            if name.is_null() {
                "unknown".into()
            } else {
                CStr::from_ptr(name).to_string_lossy()
            }
        };
        format!("{call} failed: {name} ({code})")
    }

    /// Calls `f` with the device's primary context as the current one, which is the one of Triton's own memory.
    fn run(&self, device: i64, f: impl FnOnce(&Self) -> c_int) -> Result<(), String> {
        let number = c_int::try_from(device).map_err(|_| format!("there is no device {device}"))?;
        let ok = |call, code| {
            if code == 0 {
                Ok(())
            } else {
                Err(self.failed(call, code))
            }
        };
        let (mut device, mut context, mut old) = (0, null_mut(), null_mut());
        // SAFETY: places to write to; what is retained is released, what is pushed is popped.
        unsafe {
            ok("cuInit", (self.cuInit)(0))?;
            ok("cuDeviceGet", (self.cuDeviceGet)(&mut device, number))?;
            ok(
                "cuDevicePrimaryCtxRetain",
                (self.cuDevicePrimaryCtxRetain)(&mut context, device),
            )?;
            let mut done = ok("cuCtxPushCurrent", (self.cuCtxPushCurrent_v2)(context));
            if done.is_ok() {
                done = ok("the copy", f(self));
                (self.cuCtxPopCurrent_v2)(&mut old);
            }
            (self.cuDevicePrimaryCtxRelease_v2)(device);
            done
        }
    }
}

fn on_device(what: &str, device: i64, f: impl FnOnce(&Driver) -> c_int) -> Result<(), Failure> {
    let failure = |why: &str| {
        Failure::internal(format!(
            "{what}: lies in the memory of GPU {device}, which cannot be reached: {why}"
        ))
    };
    with_driver(|driver| match driver {
        Ok(driver) => driver.run(device, f).map_err(|why| failure(&why)),
        Err(why) => Err(failure(why)),
    })
}

#[cfg(not(test))]
fn with_driver<T>(f: impl FnOnce(Result<&Driver, &str>) -> T) -> T {
    static DRIVER: std::sync::OnceLock<Result<Driver, String>> = std::sync::OnceLock::new();
    f(DRIVER
        .get_or_init(Driver::load)
        .as_ref()
        .map_err(String::as_str))
}

#[cfg(test)]
use fake::with_driver;

/// A driver whose device memory is the host's, and which writes down what it is asked. Per thread.
#[cfg(test)]
pub mod fake {
    use super::*;
    use std::cell::RefCell;

    thread_local! {
        static THERE: RefCell<bool> = const { RefCell::new(false) };
        static LOG: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
    }

    pub fn set_driver(there: bool) {
        THERE.set(there);
    }
    pub fn take_log() -> Vec<String> {
        LOG.take()
    }
    fn log(line: String) -> c_int {
        LOG.with_borrow_mut(|log| log.push(line));
        0
    }

    pub(super) fn with_driver<T>(f: impl FnOnce(Result<&Driver, &str>) -> T) -> T {
        if !THERE.with_borrow(|there| *there) {
            return f(Err("there is no driver"));
        }
        f(Ok(&Driver {
            cuInit: init,
            cuDeviceGet: device_get,
            cuDevicePrimaryCtxRetain: retain,
            cuDevicePrimaryCtxRelease_v2: release,
            cuCtxPushCurrent_v2: push,
            cuCtxPopCurrent_v2: pop,
            cuMemcpyDtoH_v2: to_host,
            cuMemcpyHtoD_v2: to_device,
            cuStreamSynchronize: synchronize,
            cuGetErrorName: name,
        }))
    }

    extern "C" fn init(_: c_uint) -> c_int {
        0
    }
    /// Devices 0 to 3.
    extern "C" fn device_get(device: *mut c_int, number: c_int) -> c_int {
        if number > 3 {
            return 101;
        }
        unsafe { *device = 100 + number };
        0
    }
    extern "C" fn retain(context: *mut *mut c_void, device: c_int) -> c_int {
        unsafe { *context = std::ptr::without_provenance_mut(device as usize) };
        log(format!("retain {device}"))
    }
    extern "C" fn release(device: c_int) -> c_int {
        log(format!("release {device}"))
    }
    extern "C" fn push(context: *mut c_void) -> c_int {
        log(format!("push {}", context as usize))
    }
    extern "C" fn pop(_: *mut *mut c_void) -> c_int {
        log("pop".into())
    }
    extern "C" fn to_host(to: *mut c_void, from: u64, count: usize) -> c_int {
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.cast(), count) };
        log(format!("to host {count}"))
    }
    extern "C" fn to_device(to: u64, from: *const c_void, count: usize) -> c_int {
        unsafe { std::ptr::copy_nonoverlapping(from.cast(), to as *mut u8, count) };
        log(format!("to device {count}"))
    }
    extern "C" fn synchronize(_: *mut c_void) -> c_int {
        log("synchronize".into())
    }
    extern "C" fn name(_: c_int, name: *mut *const c_char) -> c_int {
        unsafe { *name = c"CUDA_ERROR_INVALID_DEVICE".as_ptr() };
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpu_memory_is_copied_in_the_context_of_its_device() {
        fake::set_driver(true);
        let device = *b"on the GPU";
        let mut host = b"before ".to_vec();
        // SAFETY: the fake driver's device memory is the host's.
        unsafe {
            let from = device.as_ptr().cast();
            read("x", (abi::MEMORY_GPU, 2), from, device.len(), &mut host).unwrap();
        }
        assert_eq!(host, b"before on the GPU");
        assert_eq!(
            fake::take_log(),
            ["retain 102", "push 102", "to host 10", "pop", "release 102"]
        );
        let mut there = [0u8; 4];
        // SAFETY: as above.
        unsafe {
            let to = there.as_mut_ptr().cast();
            write("x", (abi::MEMORY_GPU, 0), to, b"back").unwrap();
        }
        assert_eq!(&there, b"back");
        assert_eq!(
            fake::take_log(),
            [
                "retain 100",
                "push 100",
                "to device 4",
                "synchronize",
                "pop",
                "release 100"
            ]
        );
        fake::set_driver(false);
    }

    #[test]
    fn host_memory_needs_no_driver_and_other_memory_is_refused_by_name() {
        for kind in [abi::MEMORY_CPU, abi::MEMORY_CPU_PINNED] {
            let (mut out, mut there) = (Vec::new(), [0u8; 2]);
            // SAFETY: two bytes each.
            unsafe {
                read("x", (kind, 0), b"ab".as_ptr().cast(), 2, &mut out).unwrap();
                write("x", (kind, 0), there.as_mut_ptr().cast(), b"ab").unwrap();
            }
            assert_eq!((&out[..], &there), (&b"ab"[..], b"ab"));
        }
        let refused = |kind, device| {
            // SAFETY: refused before anything is read.
            unsafe {
                read(
                    "name",
                    (kind, device),
                    b"ab".as_ptr().cast(),
                    2,
                    &mut Vec::new(),
                )
            }
            .unwrap_err()
            .text
        };
        let text = refused(7, 0);
        assert!(
            text.starts_with("name: ") && text.contains("type 7"),
            "{text}"
        );
        let text = refused(abi::MEMORY_GPU, 1);
        assert!(
            text.contains("GPU 1") && text.contains("no driver"),
            "{text}"
        );
        fake::set_driver(true);
        let text = refused(abi::MEMORY_GPU, 5);
        assert!(
            text.contains("GPU 5") && text.contains("INVALID_DEVICE (101)"),
            "{text}"
        );
        assert!(fake::take_log().is_empty());
        fake::set_driver(false);
    }
}
