// SPDX-License-Identifier: Apache-2.0
//! The patched llama.cpp, through the C functions of `shim/drex_llama.h`, loaded from the folder of this library.

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use drex::ffi::{drex_kv_layer, drex_logits};

use crate::engine::decoder::{Decoder, Device, Row, SamplerParams, Windows};
use crate::families::Graphs;
use crate::loader;
use crate::settings::Settings;
use crate::triton::error::Failure;

/// `DREX_LLAMA_VERSION` of the header that is declared here.
const VERSION: u32 = 7;
const LIBRARY: &str = "libdrex_llama.so";

#[repr(C)]
pub struct Params {
    model: *const c_char,
    kv_type: *const c_char,
    n_ctx: u32,
    n_seq: u32,
    n_batch: u32,
    n_outputs: u32,
    n_threads: i32,
    n_gpu_layers: i32,
    main_gpu: i32,
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
    has_gpu: fn() -> i32;
    open: fn(*const Params, *mut c_char, usize) -> Handle;
    close: fn(Handle);
    n_layer: fn(Handle) -> i32;
    n_vocab: fn(Handle) -> i32;
    n_context: fn(Handle) -> u32;
    bos: fn(Handle) -> i32;
    exit_layers: fn(Handle, *mut u32, usize) -> usize;
    exit_head: fn(Handle) -> *const c_char;
    windows: fn(Handle, u32, u32, u32) -> *const c_char;
    no_copy: fn(Handle) -> *const c_char;
    slides: fn(Handle) -> i32;
    exits: fn(Handle, *const c_char, *const u32, usize) -> *const c_char;
    device: fn(Handle, *mut i32, *mut *mut c_void) -> *const c_char;
    layer: fn(Handle, i32, *mut drex_kv_layer) -> i32;
    tokenize: fn(Handle, *const c_char, i32, i32, *mut i32, i32) -> i32;
    piece: fn(Handle, i32, i32, *mut c_char, i32) -> i32;
    longest: fn(Handle) -> usize;
    is_end: fn(Handle, i32) -> i32;
    window: fn(Handle, *const i32, *const i32, *const i32, *const i32, *const u8, i32, i32, i32) -> i32;
    project: fn(Handle, *const i32, *const i32, *const i32, i32, i32) -> i32;
    cells: fn(Handle) -> *const u32;
    logits: fn(Handle, i32) -> *const f32;
    ramp_logits: fn(Handle, u32, *mut drex_logits) -> i32;
    ban: fn(Handle, i32, *const i32, i32) -> i32;
    forget: fn(Handle, i32);
    rollback: fn(Handle, i32, i32);
    sampler_new: fn(Handle, *const SamplerParams, *const i32, i32) -> Handle;
    sampler_free: fn(Handle);
    sample: fn(Handle, Handle, i32, *const i32, i32) -> i32;
    perf: fn(Handle, *mut Graphs);
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
        let library = libloading::Library::new(&path).map_err(|e| failure(loader::reason(&e)))?;
        let library = std::mem::ManuallyDrop::new(library);
        Functions::load(&library).map_err(|e| failure(loader::reason(&e)))?
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

/// Whether layers can be put on a GPU.
pub fn has_gpu() -> Result<bool, Failure> {
    let f = functions()?;
    // SAFETY: takes nothing.
    Ok(unsafe { (f.has_gpu)() } != 0)
}

fn functions() -> Result<&'static Functions, Failure> {
    FUNCTIONS
        .get()
        .ok_or_else(|| Failure::internal("llama.cpp is not loaded"))
}

/// The model in the library, closed when the last one lets go of it.
struct Model {
    f: &'static Functions,
    handle: Handle,
}
// SAFETY: what is used by several threads at a time is its vocabulary, which never changes; see `Vocab`.
unsafe impl Send for Model {}
// SAFETY: as above.
unsafe impl Sync for Model {}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: made by open, closed once.
        unsafe { (self.f.close)(self.handle) }
        // glibc keeps what was freed below its largest blocks for this process: some MB of each model that was unloaded.
        #[cfg(target_env = "gnu")]
        // SAFETY: takes a number.
        unsafe {
            libc::malloc_trim(0)
        };
    }
}

/// From text to tokens and back, on any thread.
#[derive(Clone)]
pub struct Vocab {
    model: Arc<Model>,
    longest: usize,
}

/// A model with its context. One thread at a time.
pub struct Llama {
    f: &'static Functions,
    handle: Handle,
    model: Arc<Model>,
    /// A file of exits beside the model, and which of its layers are exits.
    exits: Option<(CString, Vec<u32>)>,
    pub n_layer: u32,
    pub n_vocab: u32,
    /// Tokens of a sequence: what was asked for, or what the model was trained with if that is less.
    pub n_context: u32,
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

impl Vocab {
    /// No token stands for more bytes of text.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// `what` is named in the error. `special`: special tokens are read, and those added that a text begins with.
    pub fn tokenize(&self, what: &str, text: &str, special: bool) -> Result<Vec<i32>, Failure> {
        let length = i32::try_from(text.len()).map_err(|_| {
            let (is, most) = (text.len(), i32::MAX);
            Failure::invalid(format!("{what} has {is} bytes, the most is {most}"))
        })?;
        let mut tokens = vec![0; text.len() + 16];
        loop {
            // SAFETY: reads the text's bytes, writes at most the vector's length.
            let n = unsafe {
                (self.model.f.tokenize)(
                    self.model.handle,
                    text.as_ptr().cast(),
                    length,
                    i32::from(special),
                    tokens.as_mut_ptr(),
                    tokens.len() as i32,
                )
            };
            if n == i32::MIN {
                return Err(Failure::invalid(format!("{what} cannot be tokenized")));
            }
            if n >= 0 {
                tokens.truncate(n as usize);
                return Ok(tokens);
            }
            tokens.resize(n.unsigned_abs() as usize, 0);
        }
    }
}

impl Llama {
    /// On the GPU `main_gpu` if the settings want layers there. `exits`: the file of exits beside the model.
    pub fn open(model: &Path, exits: Option<&Path>, settings: &Settings) -> Result<Self, Failure> {
        let f = functions()?;
        let text = |s: &str| CString::new(s).map_err(|_| Failure::invalid("a name with a 0 byte"));
        let (path, kv) = (
            text(&model.to_string_lossy())?,
            text(settings.kv_type.as_str())?,
        );
        let exits = exits
            .map(|file| text(&file.to_string_lossy()))
            .transpose()?;
        let params = Params {
            model: path.as_ptr(),
            kv_type: kv.as_ptr(),
            n_ctx: settings.context,
            n_seq: settings.slots,
            n_batch: settings.batch,
            n_outputs: settings.outputs(),
            n_threads: settings.threads as i32,
            n_gpu_layers: settings.gpu_layers as i32,
            main_gpu: settings.main_gpu as i32,
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
        let model = Arc::new(Model { f, handle });
        // SAFETY: the handle is good.
        unsafe {
            Ok(Self {
                f,
                handle,
                model,
                exits: exits.map(|file| (file, settings.exit_layers.clone())),
                n_layer: (f.n_layer)(handle) as u32,
                n_vocab: (f.n_vocab)(handle) as u32,
                n_context: (f.n_context)(handle),
            })
        }
    }

    pub fn vocab(&self) -> Vocab {
        Vocab {
            model: self.model.clone(),
            // SAFETY: only asks.
            longest: unsafe { (self.f.longest)(self.handle) },
        }
    }
}

impl Decoder for Llama {
    type Sampler = Sampler;

    fn n_layer(&self) -> u32 {
        self.n_layer
    }

    fn n_vocab(&self) -> u32 {
        self.n_vocab
    }

    fn n_context(&self) -> u32 {
        self.n_context
    }

    fn bos(&self) -> i32 {
        // SAFETY: only asks.
        unsafe { (self.f.bos)(self.handle) }
    }

    fn device(&mut self) -> Result<Device, Failure> {
        let (mut cuda, mut stream) = (0, std::ptr::null_mut());
        // SAFETY: two places to write to.
        let why = unsafe { (self.f.device)(self.handle, &mut cuda, &mut stream) };
        supported(why)?;
        Ok(Device {
            cuda: cuda != 0,
            stream,
        })
    }

    fn exit_layers(&self) -> Vec<u32> {
        let mut layers = vec![0; 64];
        // SAFETY: writes at most so many.
        let n = unsafe { (self.f.exit_layers)(self.handle, layers.as_mut_ptr(), layers.len()) };
        layers.truncate(n);
        layers
    }

    fn exit_head(&self) -> String {
        // SAFETY: a text that lives as long as the handle.
        unsafe { CStr::from_ptr((self.f.exit_head)(self.handle)) }
            .to_string_lossy()
            .into_owned()
    }

    fn windows(&mut self, windows: Windows) -> Result<(), Failure> {
        let n_rows = windows.n_slots + windows.n_prompts;
        // SAFETY: plain numbers.
        let why = unsafe {
            (self.f.windows)(self.handle, n_rows, windows.n_graphs, windows.n_rows_graph)
        };
        supported(why)?;
        let Some((file, layers)) = &self.exits else {
            return Ok(());
        };
        // SAFETY: a text and so many numbers.
        let why =
            unsafe { (self.f.exits)(self.handle, file.as_ptr(), layers.as_ptr(), layers.len()) };
        reason(why).map_or(Ok(()), |why| Err(Failure::invalid(why)))
    }

    fn slides(&self) -> bool {
        // SAFETY: a handle.
        unsafe { (self.f.slides)(self.handle) != 0 }
    }

    fn no_copy(&self) -> Option<String> {
        // SAFETY: a handle.
        reason(unsafe { (self.f.no_copy)(self.handle) })
    }

    fn layer(&self, layer: u32) -> Option<drex_kv_layer> {
        // SAFETY: plain data, written when the answer is not 0.
        unsafe {
            let mut kv: drex_kv_layer = std::mem::zeroed();
            ((self.f.layer)(self.handle, layer as i32, &mut kv) != 0).then_some(kv)
        }
    }

    fn piece(&self, token: i32, special: bool) -> Vec<u8> {
        let mut bytes = vec![0u8; 64];
        loop {
            // SAFETY: writes at most the vector's length.
            let n = unsafe {
                (self.f.piece)(
                    self.handle,
                    token,
                    i32::from(special),
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

    fn is_end(&self, token: i32) -> bool {
        // SAFETY: any number is fine.
        unsafe { (self.f.is_end)(self.handle, token) != 0 }
    }

    fn window(
        &mut self,
        rows: &[Row],
        arena: &[i32],
        outputs: &[bool],
        begin: u32,
        end: u32,
    ) -> i32 {
        let (tokens, positions, sequences) = columns(rows);
        let outputs: Vec<u8> = outputs.iter().map(|&o| u8::from(o)).collect();
        // SAFETY: five arrays of the same length.
        unsafe {
            (self.f.window)(
                self.handle,
                tokens.as_ptr(),
                positions.as_ptr(),
                sequences.as_ptr(),
                arena.as_ptr(),
                outputs.as_ptr(),
                rows.len() as i32,
                begin as i32,
                end as i32,
            )
        }
    }

    fn project(&mut self, rows: &[Row], arena: &[i32], begin: u32) -> i32 {
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

    fn cells(&self) -> *const u32 {
        // SAFETY: only asks.
        unsafe { (self.f.cells)(self.handle) }
    }

    fn ramp_logits(&self, ramp: u32, logits: &mut drex_logits) -> bool {
        // SAFETY: a struct to write to; what it points to stays until the next pass, which needs `&mut self`.
        unsafe { (self.f.ramp_logits)(self.handle, ramp, logits) != 0 }
    }

    fn ban(&mut self, i: usize, tokens: &[i32]) -> bool {
        // SAFETY: so many tokens.
        unsafe { (self.f.ban)(self.handle, i as i32, tokens.as_ptr(), tokens.len() as i32) == 0 }
    }

    fn logits(&mut self, i: usize) -> Option<&[f32]> {
        let n = self.n_vocab as usize;
        // SAFETY: n numbers that stay until the next pass, which needs `&mut self`; i is one of the window's rows.
        unsafe {
            let data = (self.f.logits)(self.handle, i as i32);
            (!data.is_null()).then(|| std::slice::from_raw_parts(data, n))
        }
    }

    fn forget(&mut self, sequence: Option<i32>) {
        // SAFETY: any number below n_seq is fine, and -1.
        unsafe { (self.f.forget)(self.handle, sequence.unwrap_or(-1)) }
    }

    fn rollback(&mut self, sequence: i32, position: u32) {
        // SAFETY: any numbers are fine.
        unsafe { (self.f.rollback)(self.handle, sequence, position as i32) }
    }

    fn sampler(&self, params: &SamplerParams, prompt: &[i32]) -> Result<Sampler, Failure> {
        // SAFETY: the struct and the tokens live during the call.
        let handle = unsafe {
            (self.f.sampler_new)(self.handle, params, prompt.as_ptr(), prompt.len() as i32)
        };
        if handle.is_null() {
            return Err(Failure::internal("no memory for a sampler"));
        }
        Ok(Sampler { f: self.f, handle })
    }

    fn sample(&mut self, sampler: &mut Sampler, i: usize, banned: &[i32]) -> Result<i32, Failure> {
        // SAFETY: both handles are good, and as many tokens are banned as it says.
        let token = unsafe {
            (self.f.sample)(
                self.handle,
                sampler.handle,
                i as i32,
                banned.as_ptr(),
                banned.len() as i32,
            )
        };
        match token {
            0.. => Ok(token),
            -2 => Err(Failure::internal("a logit is NaN")),
            _ => Err(Failure::internal(format!(
                "llama.cpp chose no token ({token})"
            ))),
        }
    }

    fn perf(&self) -> Graphs {
        let mut graphs = Graphs::default();
        // SAFETY: a struct that is as the header has it.
        unsafe { (self.f.perf)(self.handle, &mut graphs) };
        graphs
    }
}

/// From the library's reason why it cannot run a model; NULL where it can.
fn supported(why: *const c_char) -> Result<(), Failure> {
    reason(why).map_or(Ok(()), |why| Err(Failure::unsupported(why)))
}

/// The library's text, none for NULL.
fn reason(why: *const c_char) -> Option<String> {
    if why.is_null() {
        return None;
    }
    // SAFETY: the text lives until the thread's next call.
    let why = unsafe { CStr::from_ptr(why) };
    Some(why.to_string_lossy().into_owned())
}

fn columns(rows: &[Row]) -> (Vec<i32>, Vec<i32>, Vec<i32>) {
    (
        rows.iter().map(|r| r.token).collect(),
        rows.iter().map(|r| r.position).collect(),
        rows.iter().map(|r| r.sequence).collect(),
    )
}
