// SPDX-License-Identifier: Apache-2.0

//! What drex itself takes from the device, all of it when an engine is made
//! or K/V is bound. Whoever drops one of these has made its context current.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys::{CUdeviceptr, CUevent, CUmodule, CUstream};

use super::driver::Driver;
use crate::core::error::Result;

/// Device memory.
pub struct Buffer {
    driver: &'static Driver,
    pub at: CUdeviceptr,
}

impl Buffer {
    pub fn new(driver: &'static Driver, bytes: usize) -> Result<Buffer> {
        let mut at = 0;
        // SAFETY: writes one pointer.
        unsafe { driver.cuMemAlloc_v2(&mut at, bytes.max(1))? };
        Ok(Buffer { driver, at })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: ours. There is nobody to tell of an error, here and below.
        let _ = unsafe { self.driver.cuMemFree_v2(self.at) };
    }
}

/// Memory of the host that copies need not stage and the device can read.
pub struct Pinned {
    driver: &'static Driver,
    pub host: *mut c_void,
}

impl Pinned {
    pub fn new(driver: &'static Driver, bytes: usize) -> Result<Pinned> {
        /// CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP
        const FLAGS: u32 = 1 | 2;
        let mut host = ptr::null_mut();
        // SAFETY: writes one pointer.
        unsafe { driver.cuMemHostAlloc(&mut host, bytes.max(1), FLAGS)? };
        let pinned = Pinned { driver, host };
        // SAFETY: as long as was asked for.
        unsafe { ptr::write_bytes(host.cast::<u8>(), 0, bytes) };
        Ok(pinned)
    }

    /// Its address for kernels.
    pub fn device(&self) -> Result<CUdeviceptr> {
        let mut at = 0;
        // SAFETY: ours, and mapped.
        unsafe {
            self.driver
                .cuMemHostGetDevicePointer_v2(&mut at, self.host, 0)?;
        }
        Ok(at)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: ours.
        let _ = unsafe { self.driver.cuMemFreeHost(self.host) };
    }
}

pub struct Module {
    driver: &'static Driver,
    pub handle: CUmodule,
}

impl Module {
    /// # Safety
    /// `image` is a fatbin, a cubin or PTX that ends in a 0 byte.
    pub unsafe fn new(driver: &'static Driver, image: &'static [u8]) -> Result<Module> {
        let mut handle = ptr::null_mut();
        // SAFETY: by this function's contract.
        unsafe { driver.cuModuleLoadData(&mut handle, image.as_ptr().cast())? };
        Ok(Module { driver, handle })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: ours.
        let _ = unsafe { self.driver.cuModuleUnload(self.handle) };
    }
}

/// Row numbers in memory that both sides see: a count, a source layer, then
/// the numbers. Launches read it when they run, not when they are enqueued.
pub struct List {
    driver: &'static Driver,
    memory: Pinned,
    pub device: CUdeviceptr,
    event: CUevent,
    /// A launch that reads the memory was enqueued, and not waited for.
    busy: bool,
    /// The stream of such a launch, where the event behind it could not be recorded.
    unmarked: Option<CUstream>,
    capacity: usize,
}

impl List {
    pub fn new(driver: &'static Driver, capacity: usize) -> Result<List> {
        /// CU_EVENT_DISABLE_TIMING
        const FLAGS: u32 = 2;
        let memory = Pinned::new(driver, (2 + capacity) * size_of::<u32>())?;
        let device = memory.device()?;
        let mut event = ptr::null_mut();
        // SAFETY: writes one handle.
        unsafe { driver.cuEventCreate(&mut event, FLAGS)? };
        Ok(List {
            driver,
            memory,
            device,
            event,
            busy: false,
            unmarked: None,
            capacity,
        })
    }

    /// A launch may still read it.
    pub fn busy(&self) -> bool {
        self.busy || self.unmarked.is_some()
    }

    /// Waits for what still reads it. That is over, where a ramp was waited for
    /// since, behind it on the same stream.
    pub fn wait(&mut self) -> Result<()> {
        // Tried once more: the host may have taken that stream down since.
        if let Some(stream) = self.unmarked.take() {
            // SAFETY: the host's stream.
            unsafe { self.driver.cuEventRecord(self.event, stream)? };
            self.busy = true;
        }
        if self.busy {
            // SAFETY: ours.
            unsafe { self.driver.cuEventSynchronize(self.event)? };
            self.busy = false;
        }
        Ok(())
    }

    pub fn write(
        &mut self,
        source: u32,
        numbers: impl ExactSizeIterator<Item = u32>,
    ) -> Result<()> {
        self.wait()?;
        assert!(numbers.len() <= self.capacity);
        let to = self.memory.host.cast::<u32>();
        // SAFETY: `2 + capacity` numbers; launches that read them have ended.
        // Volatile, since the other side is no part of this program.
        unsafe {
            to.write_volatile(numbers.len() as u32);
            to.add(1).write_volatile(source);
            for (i, number) in numbers.enumerate() {
                to.add(2 + i).write_volatile(number);
            }
        }
        Ok(())
    }

    /// A launch on this stream reads it.
    pub fn read_on(&mut self, stream: CUstream) -> Result<()> {
        self.unmarked = Some(stream);
        // SAFETY: the host's stream.
        unsafe { self.driver.cuEventRecord(self.event, stream)? };
        self.unmarked = None;
        self.busy = true;
        Ok(())
    }
}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: ours.
        let _ = unsafe { self.driver.cuEventDestroy_v2(self.event) };
    }
}
