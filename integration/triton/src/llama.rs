// SPDX-License-Identifier: Apache-2.0
//! The patched llama.cpp, through the C functions of `shim/drex_llama.h`, loaded from the folder of this library.

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;
use std::sync::OnceLock;

use crate::triton::error::Failure;

/// `DREX_LLAMA_VERSION` of the header that is declared here.
const VERSION: u32 = 1;
const LIBRARY: &str = "libdrex_llama.so";

#[repr(C)]
pub struct Params {
    model: *const c_char,
    kv_type: *const c_char,
    n_ctx: u32,
    n_seq: u32,
    n_batch: u32,
    n_threads: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct LayerKv {
    pub k: *mut c_void,
    pub v: *mut c_void,
    pub k_row_bytes: u64,
    pub k_cell_stride: u64,
    pub v_row_bytes: u64,
    pub v_cell_stride: u64,
    pub v_elem_bytes: u64,
    pub v_elem_stride: u64,
    pub n_cells: u32,
    reserved: u32,
}

#[repr(C)]
pub struct SamplerParams {
    pub temperature: f32,
    pub top_k: i32,
    pub top_p: f32,
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub frequency_penalty: f32,
    pub presence_penalty: f32,
    pub seed: u32,
    pub ignore_eos: i32,
}

type Handle = *mut c_void;

macro_rules! functions {
    ($($name:ident: fn($($arg:ty),*) $(-> $out:ty)?;)*) => {
        struct Functions { $($name: unsafe extern "C" fn($($arg),*) $(-> $out)?,)* }

        impl Functions {
            /// # Safety
            /// The library's functions have these signatures.
            unsafe fn load(library: &libloading::Library) -> Result<Self, libloading::Error> {
                // SAFETY: by the caller.
                unsafe { Ok(Self {
                    $($name: *library.get(concat!("drex_llama_", stringify!($name), "\0").as_bytes())?,)*
                }) }
            }
        }
    };
}

functions! {
    version: fn() -> u32;
    open: fn(*const Params, *mut c_char, usize) -> Handle;
    close: fn(Handle);
    n_layer: fn(Handle) -> i32;
    n_vocab: fn(Handle) -> i32;
    n_ctx_train: fn(Handle) -> u32;
    exit_layers: fn(Handle, *mut u32, usize) -> usize;
    exit_head: fn(Handle) -> *const c_char;
    windows: fn(Handle, u32, u32) -> *const c_char;
    layer: fn(Handle, i32, *mut LayerKv) -> i32;
    tokenize: fn(Handle, *const c_char, i32, *mut i32, i32) -> i32;
    piece: fn(Handle, i32, *mut c_char, i32) -> i32;
    is_end: fn(Handle, i32) -> i32;
    decode: fn(Handle, *const i32, *const i32, *const i32, *const u8, i32) -> i32;
    window: fn(Handle, *const i32, *const i32, *const i32, *const i32, i32, i32, i32) -> i32;
    project: fn(Handle, *const i32, *const i32, *const i32, i32, i32) -> i32;
    cells: fn(Handle) -> *const u32;
    logits: fn(Handle, i32) -> *const f32;
    window_logits: fn(Handle) -> *const f32;
    forget: fn(Handle, i32);
    sampler_new: fn(Handle, *const SamplerParams) -> Handle;
    sampler_free: fn(Handle);
    sample: fn(Handle, Handle, i32, i32) -> i32;
    perf: fn(Handle, *mut u64, *mut u64);
}

static FUNCTIONS: OnceLock<Functions> = OnceLock::new();

/// Loads the libraries, once for the process: they have threads and stay until it ends.
pub fn load(folder: &Path) -> Result<(), Failure> {
    if FUNCTIONS.get().is_some() {
        return Ok(());
    }
    let path = folder.join(LIBRARY);
    let failure = |error: String| Failure::internal(format!("{}: {error}", path.display()));
    // SAFETY: the library is ours and its version is compared before anything else is called.
    let functions = unsafe {
        let library = libloading::Library::new(&path).map_err(|e| failure(e.to_string()))?;
        let library = std::mem::ManuallyDrop::new(library);
        Functions::load(&library).map_err(|e| failure(e.to_string()))?
    };
    // SAFETY: takes nothing.
    let version = unsafe { (functions.version)() };
    if version != VERSION {
        return Err(failure(format!(
            "has version {version}, this backend needs {VERSION}"
        )));
    }
    let _ = FUNCTIONS.set(functions);
    Ok(())
}

/// One row of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub token: i32,
    pub position: i32,
    pub sequence: i32,
}

/// A model with its context. One thread at a time.
pub struct Llama {
    f: &'static Functions,
    handle: Handle,
    pub n_layer: u32,
    pub n_vocab: u32,
    pub n_ctx_train: u32,
}

// SAFETY: llama.cpp does not care which thread calls, as long as it is one at a time.
unsafe impl Send for Llama {}

pub struct Sampler {
    f: &'static Functions,
    handle: Handle,
}
// SAFETY: as above.
unsafe impl Send for Sampler {}

impl Drop for Sampler {
    fn drop(&mut self) {
        // SAFETY: made by sampler_new.
        unsafe { (self.f.sampler_free)(self.handle) }
    }
}

impl Llama {
    pub fn open(
        model: &Path,
        kv_type: &str,
        n_ctx: u32,
        n_seq: u32,
        n_batch: u32,
        n_threads: i32,
    ) -> Result<Self, Failure> {
        let f = FUNCTIONS
            .get()
            .ok_or_else(|| Failure::internal("llama.cpp is not loaded"))?;
        let text = |s: &str| CString::new(s).map_err(|_| Failure::invalid("a name with a 0 byte"));
        let (path, kv) = (text(&model.to_string_lossy())?, text(kv_type)?);
        let params = Params {
            model: path.as_ptr(),
            kv_type: kv.as_ptr(),
            n_ctx,
            n_seq,
            n_batch,
            n_threads,
        };
        let mut error = vec![0 as c_char; 1024];
        // SAFETY: the structs live during the call.
        let handle = unsafe { (f.open)(&params, error.as_mut_ptr(), error.len()) };
        if handle.is_null() {
            // SAFETY: ended with a 0 byte by snprintf.
            let why = unsafe { CStr::from_ptr(error.as_ptr()) }.to_string_lossy();
            return Err(Failure::invalid(format!(
                "{}: {}",
                model.display(),
                why.trim()
            )));
        }
        // SAFETY: the handle is good.
        unsafe {
            Ok(Self {
                f,
                handle,
                n_layer: (f.n_layer)(handle) as u32,
                n_vocab: (f.n_vocab)(handle) as u32,
                n_ctx_train: (f.n_ctx_train)(handle),
            })
        }
    }

    pub fn exit_layers(&self) -> Vec<u32> {
        let mut layers = vec![0; 64];
        // SAFETY: writes at most so many.
        let n = unsafe { (self.f.exit_layers)(self.handle, layers.as_mut_ptr(), layers.len()) };
        layers.truncate(n);
        layers
    }

    pub fn exit_head(&self) -> String {
        // SAFETY: a text that lives as long as the handle.
        unsafe { CStr::from_ptr((self.f.exit_head)(self.handle)) }
            .to_string_lossy()
            .into_owned()
    }

    pub fn windows(&mut self, n_slots: u32, n_graphs: u32) -> Result<(), Failure> {
        // SAFETY: NULL or a static text.
        unsafe {
            let why = (self.f.windows)(self.handle, n_slots, n_graphs);
            if why.is_null() {
                return Ok(());
            }
            Err(Failure::unsupported(
                CStr::from_ptr(why).to_string_lossy().into_owned(),
            ))
        }
    }

    pub fn layer(&self, layer: u32) -> Option<LayerKv> {
        // SAFETY: plain data, written when the answer is not 0.
        unsafe {
            let mut kv: LayerKv = std::mem::zeroed();
            ((self.f.layer)(self.handle, layer as i32, &mut kv) != 0).then_some(kv)
        }
    }

    pub fn tokenize(&self, text: &str) -> Result<Vec<i32>, Failure> {
        let length = i32::try_from(text.len())
            .map_err(|_| Failure::invalid(format!("text_input has {} bytes", text.len())))?;
        let mut tokens = vec![0; text.len() + 16];
        loop {
            // SAFETY: reads the text's bytes, writes at most the vector's length.
            let n = unsafe {
                (self.f.tokenize)(
                    self.handle,
                    text.as_ptr().cast(),
                    length,
                    tokens.as_mut_ptr(),
                    tokens.len() as i32,
                )
            };
            if n == i32::MIN {
                return Err(Failure::invalid("text_input cannot be tokenized"));
            }
            if n >= 0 {
                tokens.truncate(n as usize);
                return Ok(tokens);
            }
            tokens.resize(n.unsigned_abs() as usize, 0);
        }
    }

    /// The bytes of a token; none for special ones.
    pub fn piece(&self, token: i32) -> Vec<u8> {
        let mut bytes = vec![0u8; 64];
        loop {
            // SAFETY: writes at most the vector's length.
            let n = unsafe {
                (self.f.piece)(
                    self.handle,
                    token,
                    bytes.as_mut_ptr().cast(),
                    bytes.len() as i32,
                )
            };
            if n >= 0 {
                bytes.truncate(n as usize);
                return bytes;
            }
            bytes.resize(n.unsigned_abs() as usize, 0);
        }
    }

    pub fn is_end(&self, token: i32) -> bool {
        // SAFETY: any number is fine.
        unsafe { (self.f.is_end)(self.handle, token) != 0 }
    }

    /// All layers; the logits of the rows with `outputs` are wanted.
    pub fn decode(&mut self, rows: &[Row], outputs: &[bool]) -> i32 {
        let (tokens, positions, sequences) = columns(rows);
        let outputs: Vec<u8> = outputs.iter().map(|&o| u8::from(o)).collect();
        // SAFETY: four arrays of the same length.
        unsafe {
            (self.f.decode)(
                self.handle,
                tokens.as_ptr(),
                positions.as_ptr(),
                sequences.as_ptr(),
                outputs.as_ptr(),
                rows.len() as i32,
            )
        }
    }

    /// Layers [begin, end); `arena[i]` is the arena row of row i.
    pub fn window(&mut self, rows: &[Row], arena: &[i32], begin: u32, end: u32) -> i32 {
        let (tokens, positions, sequences) = columns(rows);
        // SAFETY: four arrays of the same length.
        unsafe {
            (self.f.window)(
                self.handle,
                tokens.as_ptr(),
                positions.as_ptr(),
                sequences.as_ptr(),
                arena.as_ptr(),
                rows.len() as i32,
                begin as i32,
                end as i32,
            )
        }
    }

    pub fn project(&mut self, rows: &[Row], arena: &[i32], begin: u32) -> i32 {
        let (_, positions, sequences) = columns(rows);
        // SAFETY: three arrays of the same length.
        unsafe {
            (self.f.project)(
                self.handle,
                positions.as_ptr(),
                sequences.as_ptr(),
                arena.as_ptr(),
                rows.len() as i32,
                begin as i32,
            )
        }
    }

    /// The KV cells of the last window's rows.
    pub fn cells(&self) -> *const u32 {
        // SAFETY: only asks.
        unsafe { (self.f.cells)(self.handle) }
    }

    /// The logits of all rows of the last window.
    pub fn window_logits(&self) -> Option<*const f32> {
        // SAFETY: only asks.
        let data = unsafe { (self.f.window_logits)(self.handle) };
        (!data.is_null()).then_some(data)
    }

    /// The logits of row i, of the last window or of the last pass through all layers.
    pub fn logits(&mut self, i: usize, window: bool) -> Option<&[f32]> {
        let n = self.n_vocab as usize;
        // SAFETY: n numbers that stay until the next pass, which needs `&mut self`; i is one of the window's rows.
        unsafe {
            let data = if window {
                self.window_logits()?.add(i * n)
            } else {
                (self.f.logits)(self.handle, i as i32)
            };
            (!data.is_null()).then(|| std::slice::from_raw_parts(data, n))
        }
    }

    pub fn forget(&mut self, sequence: i32) {
        // SAFETY: any number below n_seq is fine.
        unsafe { (self.f.forget)(self.handle, sequence) }
    }

    pub fn sampler(&self, params: &SamplerParams) -> Result<Sampler, Failure> {
        // SAFETY: the struct lives during the call.
        let handle = unsafe { (self.f.sampler_new)(self.handle, params) };
        if handle.is_null() {
            return Err(Failure::internal("no memory for a sampler"));
        }
        Ok(Sampler { f: self.f, handle })
    }

    /// A token from row i's logits; None when there are none.
    pub fn sample(&mut self, sampler: &mut Sampler, i: usize, window: bool) -> Option<i32> {
        let (row, window) = (i as i32, i32::from(window));
        // SAFETY: both handles are good.
        let token = unsafe { (self.f.sample)(self.handle, sampler.handle, row, window) };
        (token >= 0).then_some(token)
    }

    /// Graphs built, graphs used again.
    pub fn perf(&self) -> (u64, u64) {
        let (mut built, mut reused) = (0, 0);
        // SAFETY: two places to write to.
        unsafe { (self.f.perf)(self.handle, &mut built, &mut reused) };
        (built, reused)
    }
}

impl Drop for Llama {
    fn drop(&mut self) {
        // SAFETY: made by open.
        unsafe { (self.f.close)(self.handle) }
    }
}

fn columns(rows: &[Row]) -> (Vec<i32>, Vec<i32>, Vec<i32>) {
    (
        rows.iter().map(|r| r.token).collect(),
        rows.iter().map(|r| r.position).collect(),
        rows.iter().map(|r| r.sequence).collect(),
    )
}
