// SPDX-License-Identifier: Apache-2.0

//! Ranges in the timeline of NVIDIA's profilers, by NVTX 3's injection
//! protocol. A profiler names a library in the environment of the program that
//! it runs; that library gets our tables of functions and writes its own into
//! them. Without the variable nothing is loaded, and nothing here is called.
//!
//! Done by hand since the `nvtx` crate needs libclang where it is built.

use std::error::Error;
use std::ffi::{CStr, OsStr, c_char, c_int, c_uint, c_void};
use std::mem::transmute;
use std::ptr::{null, null_mut};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use libloading::Library;

pub const VARIABLE: &str = if cfg!(target_pointer_width = "64") {
    "NVTX_INJECTION64_PATH"
} else {
    "NVTX_INJECTION32_PATH"
};

const VERSION: u32 = 3;

/// Calls that are ranges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Name {
    Plan,
    Ramp,
    Fill,
    Complete,
    Gather,
    Scatter,
}

/// By `Name`.
const NAMES: [&CStr; 6] = [
    c"plan",
    c"ramp",
    c"fill",
    c"complete",
    c"gather",
    c"scatter",
];

/// A function of the profiler's, or null.
type Slot = AtomicPtr<c_void>;

const MODULES: usize = 6;
const MOST: usize = 16;
/// By module, from 1: its entries, with the one at 0, which is no function.
const SIZES: [usize; MODULES] = [16, 9, 15, 7, 16, 7];

const CORE2: usize = 5;
const RANGE_PUSH: usize = 4;
const RANGE_POP: usize = 5;
const REGISTER_STRING: usize = 10;
const DOMAIN_CREATE: usize = 12;

/// Of the process, as the protocol has it: a profiler keeps their addresses.
static SLOTS: [[Slot; MOST]; MODULES] =
    [const { [const { AtomicPtr::new(null_mut()) }; MOST] }; MODULES];

/// As a profiler reads it: null, a module's slots, null.
type Table = [Option<&'static Slot>; MOST + 1];

static TABLES: [Table; MODULES] = {
    let mut tables = [[None; MOST + 1]; MODULES];
    let mut module = 0;
    while module < MODULES {
        let mut i = 1;
        while i < SIZES[module] {
            tables[module][i] = Some(&SLOTS[module][i]);
            i += 1;
        }
        module += 1;
    }
    tables
};

#[repr(C)]
struct Callbacks {
    size: usize,
    table:
        unsafe extern "system" fn(c_int, *mut *const Option<&'static Slot>, *mut c_uint) -> c_int,
}

#[repr(C)]
struct VersionInfo {
    size: usize,
    version: u32,
    reserved: u32,
    set_injection_version: extern "system" fn(u32),
}

static CALLBACKS: Callbacks = Callbacks {
    size: size_of::<Callbacks>(),
    table: module_table,
};

static VERSION_INFO: VersionInfo = VersionInfo {
    size: size_of::<VersionInfo>(),
    version: VERSION,
    reserved: 0,
    set_injection_version: ignore,
};

extern "system" fn ignore(_: u32) {}

/// # Safety
/// What is not null can be written.
unsafe extern "system" fn module_table(
    module: c_int,
    table: *mut *const Option<&'static Slot>,
    size: *mut c_uint,
) -> c_int {
    let Some(i) = usize::try_from(module)
        .ok()
        .and_then(|m| m.checked_sub(1))
        .filter(|&i| i < MODULES)
    else {
        return 0;
    };
    // SAFETY: by this function's contract.
    unsafe {
        if !size.is_null() {
            size.write(SIZES[i] as c_uint);
        }
        if !table.is_null() {
            table.write(TABLES[i].as_ptr());
        }
    }
    1
}

extern "system" fn export_table(id: u32) -> *const c_void {
    match id {
        1 => (&raw const CALLBACKS).cast(),
        3 => (&raw const VERSION_INFO).cast(),
        _ => null(),
    }
}

type Initialize = unsafe extern "system" fn(extern "system" fn(u32) -> *const c_void) -> c_int;
type DomainCreate = unsafe extern "system" fn(*const c_char) -> *mut c_void;
type RegisterString = unsafe extern "system" fn(*mut c_void, *const c_char) -> *mut c_void;
type RangePush = unsafe extern "system" fn(*mut c_void, *const Attributes) -> c_int;
type RangePop = unsafe extern "system" fn(*mut c_void) -> c_int;

/// nvtxEventAttributes_t
#[repr(C)]
struct Attributes {
    version: u16,
    size: u16,
    category: u32,
    color_type: i32,
    color: u32,
    payload_type: i32,
    reserved: i32,
    payload: u64,
    message_type: i32,
    /// A registered string.
    message: *mut c_void,
}

const MESSAGE_REGISTERED: i32 = 3;

/// The profiler that watches this process.
pub struct Profiler {
    domain: *mut c_void,
    /// By `Name`; made once, so that a range is two calls and no more.
    events: [Attributes; NAMES.len()],
}

// SAFETY: the pointers are the profiler's own handles, which any thread may
// hand to its functions.
unsafe impl Send for Profiler {}
// SAFETY: as above.
unsafe impl Sync for Profiler {}

/// What the environment asks for, looked at once: `None` is nothing, an error
/// says why there are no ranges although it asks for them.
pub fn injected() -> &'static Option<Result<Profiler, String>> {
    static FOUND: OnceLock<Option<Result<Profiler, String>>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let path = std::env::var_os(VARIABLE).filter(|p| !p.is_empty())?;
        Some(load(&path))
    })
}

fn load(path: &OsStr) -> Result<Profiler, String> {
    // SAFETY: who set the variable wants the library in this process.
    let library = unsafe { Library::new(path) }.map_err(reason)?;
    // SAFETY: the type that the protocol gives the function.
    let initialize = unsafe { library.get::<Initialize>(c"InitializeInjectionNvtx2") };
    let initialize = initialize.map_err(reason)?;
    // SAFETY: the protocol's own call.
    if unsafe { initialize(export_table) } == 0 {
        return Err("InitializeInjectionNvtx2 returned 0".to_owned());
    }
    // Its functions are in our tables from now on.
    std::mem::forget(library);
    Profiler::new().ok_or_else(|| "it takes no ranges".to_owned())
}

/// The loader's own words, which the error keeps behind its own.
fn reason(e: libloading::Error) -> String {
    e.source().map_or_else(|| e.to_string(), |s| s.to_string())
}

fn function(i: usize) -> *mut c_void {
    SLOTS[CORE2 - 1][i].load(Ordering::Acquire)
}

impl Profiler {
    fn new() -> Option<Profiler> {
        let needed = [DOMAIN_CREATE, REGISTER_STRING, RANGE_PUSH, RANGE_POP];
        if needed.iter().any(|&i| function(i).is_null()) {
            return None;
        }
        // SAFETY: not null, and of these types by the protocol.
        let (create, register) = unsafe {
            (
                transmute::<*mut c_void, DomainCreate>(function(DOMAIN_CREATE)),
                transmute::<*mut c_void, RegisterString>(function(REGISTER_STRING)),
            )
        };
        // SAFETY: a C string.
        let domain = unsafe { create(c"drex".as_ptr()) };
        let events = NAMES.map(|name| Attributes {
            version: VERSION as u16,
            size: size_of::<Attributes>() as u16,
            category: 0,
            color_type: 0,
            color: 0,
            payload_type: 0,
            reserved: 0,
            payload: 0,
            message_type: MESSAGE_REGISTERED,
            // SAFETY: the domain just made, and a C string.
            message: unsafe { register(domain, name.as_ptr()) },
        });
        Some(Profiler { domain, events })
    }

    /// Opens a range on this thread, which ends when the value is dropped.
    pub fn range(&'static self, name: Name) -> Range {
        // A profiler that leaves takes its functions back.
        let push = function(RANGE_PUSH);
        if !push.is_null() {
            // SAFETY: of this type by the protocol; both arguments live on.
            unsafe {
                transmute::<*mut c_void, RangePush>(push)(self.domain, &self.events[name as usize]);
            }
        }
        Range(self)
    }
}

/// An open range. Also a call that fails or panics ends its own.
pub struct Range(&'static Profiler);

impl Drop for Range {
    #[cold]
    #[inline(never)]
    fn drop(&mut self) {
        let pop = function(RANGE_POP);
        if !pop.is_null() {
            // SAFETY: of this type by the protocol.
            unsafe { transmute::<*mut c_void, RangePop>(pop)(self.0.domain) };
        }
    }
}

/// As in NVIDIA's header, on 64 bits.
#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<Attributes>() == 48);
