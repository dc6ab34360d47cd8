// SPDX-License-Identifier: Apache-2.0

//! The way in and out of every function: the panic boundary, and
//! reading and writing of structs that begin with their size.

use std::any::Any;
use std::ffi::c_char;
use std::mem::{MaybeUninit, size_of};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use super::engine::drex_engine;
use super::fault::Fault;
use super::handle;
use super::last_error;
use super::status::*;
use crate::core::error::Error;
use crate::engine::Engine;

/// A size beyond this is garbage, and reading so far would be worse.
const SIZE_MAX: usize = 4096;

/// Runs a call's body; its fault or panic becomes a status and a text.
pub fn call(function: &str, body: impl FnOnce() -> Result<(), Fault>) -> drex_status {
    call_or(function, body, |_| {})
}

fn call_or(
    function: &str,
    body: impl FnOnce() -> Result<(), Fault>,
    failed: impl FnOnce(&Fault),
) -> drex_status {
    // A body leaves nothing half done that anyone sees again: an engine in
    // which it panicked is poisoned by its guard.
    let outcome = catch_unwind(AssertUnwindSafe(body)).and_then(|result| match result {
        Ok(()) => Ok(DREX_OK),
        // Outside of the body, so that the engine can be entered again; who
        // watches it is not ours, and may panic.
        Err(fault) => catch_unwind(AssertUnwindSafe(|| {
            failed(&fault);
            // A callback's own calls may fail too: this one's text comes last.
            last_error::set(function, format_args!("{fault}"));
            fault.status()
        })),
    });
    outcome.unwrap_or_else(|payload| {
        let text = message(&*payload);
        last_error::set(function, format_args!("internal error: {text}"));
        // A payload's own drop may panic; leaking it cannot.
        std::mem::forget(payload);
        DREX_ERROR_PANIC
    })
}

/// `call` on the engine behind a handle.
pub fn with(
    function: &str,
    engine: *const drex_engine,
    body: impl FnOnce(&mut Engine) -> Result<(), Fault>,
) -> drex_status {
    let inside = || handle::ENGINES.visit(engine, body)?;
    call_or(function, inside, |fault| failed(function, engine, fault))
}

/// Tells who watches the engine, in a visit of its own: so calls that succeed
/// pay nothing for it. Nobody else is in between but by breaking the rule on
/// threads.
#[cold]
#[inline(never)]
fn failed(function: &str, engine: *const drex_engine, fault: &Fault) {
    if matches!(fault, Fault::Handle(_) | Fault::Busy(_)) {
        return;
    }
    let _ = handle::ENGINES.visit(engine, |engine| {
        if engine.watch.on() {
            let device = fault.status() == DREX_ERROR_DEVICE;
            engine.watch.failed(function, fault, device);
        }
    });
}

fn message(payload: &(dyn Any + Send)) -> &str {
    match (
        payload.downcast_ref::<&'static str>(),
        payload.downcast_ref::<String>(),
    ) {
        (Some(s), _) => s,
        (_, Some(s)) => s,
        _ => "panic",
    }
}

/// Structs of plain numbers and pointers whose first field is their size.
///
/// # Safety
/// `repr(C)`, first field `size: u32`, and every bit pattern is a value.
pub unsafe trait Sized32: Copy {
    /// Its size in the release that it came with: no program passes less. What
    /// it does not pass of later fields is 0, which is what the initializers
    /// give.
    const FIRST: usize;
}

fn check_size<T: Sized32>(what: &'static str, size: u32) -> Result<(), Fault> {
    let (index, least) = (None, T::FIRST);
    match size as usize {
        len if len < least => Err(Fault::Small {
            what,
            index,
            size,
            least,
        }),
        len if len > SIZE_MAX => Err(Fault::Large { what, index, size }),
        _ => Ok(()),
    }
}

/// Reads a struct of any version that we can understand.
///
/// # Safety
/// `p` is NULL or points to as many bytes as its `size` says.
pub unsafe fn read<T: Sized32>(what: &'static str, p: *const T) -> Result<T, Fault> {
    let known = size_of::<T>();
    if p.is_null() {
        return Err(Fault::Null(what));
    }
    // SAFETY: every struct begins with its size.
    let size = unsafe { p.cast::<u32>().read_unaligned() };
    let len = size as usize;
    check_size::<T>(what, size)?;
    // SAFETY: the caller says that there are `size` bytes.
    if (known..len).any(|i| unsafe { p.cast::<u8>().add(i).read() } != 0) {
        return Err(Fault::Newer {
            what,
            index: None,
            size,
            known,
        });
    }
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: `len` bytes can be read, `known` written.
    unsafe {
        ptr::copy_nonoverlapping(p.cast::<u8>(), value.as_mut_ptr().cast(), len.min(known));
    }
    // SAFETY: every bit pattern is a value.
    Ok(unsafe { value.assume_init() })
}

/// Checks that an output struct can be written later.
///
/// # Safety
/// `p` is NULL or points to a struct that begins with its size.
pub unsafe fn writable<T: Sized32>(what: &'static str, p: *mut T) -> Result<u32, Fault> {
    if p.is_null() {
        return Err(Fault::Null(what));
    }
    // SAFETY: every struct begins with its size.
    let size = unsafe { p.cast::<u32>().read_unaligned() };
    check_size::<T>(what, size)?;
    Ok(size)
}

/// Writes all but the size, which stays the caller's.
///
/// # Safety
/// [`writable`] has accepted `p`.
pub unsafe fn write<T: Sized32>(p: *mut T, value: &T) {
    let skip = size_of::<u32>();
    // SAFETY: `p` has as many bytes as its size says.
    unsafe {
        let size = p.cast::<u32>().read_unaligned() as usize;
        ptr::copy_nonoverlapping(
            ptr::from_ref(value).cast::<u8>().add(skip),
            p.cast::<u8>().add(skip),
            size.min(size_of::<T>()) - skip,
        );
    }
}

/// Hands a text to a caller that may have asked for its length alone, or that
/// has too little room: the length is written in any case.
///
/// # Safety
/// `text` has `capacity` bytes; `length` is NULL or can be written.
pub unsafe fn give_text(
    from: &str,
    text: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> Result<(), Fault> {
    if length.is_null() {
        return Err(Fault::Null("length"));
    }
    if text.is_null() && capacity > 0 {
        return Err(Fault::Null("text"));
    }
    // SAFETY: not NULL.
    unsafe { length.write_unaligned(from.len()) };
    if capacity == 0 {
        return Ok(());
    }
    if capacity <= from.len() {
        return Err(Error::Capacity {
            field: "capacity",
            value: capacity as u64,
            need: from.len() as u64 + 1,
            why: "the text and its 0 byte must fit",
        }
        .into());
    }
    // SAFETY: they fit.
    unsafe {
        ptr::copy_nonoverlapping(from.as_ptr(), text.cast::<u8>(), from.len());
        text.add(from.len()).write(0);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::config::{Config, Fill, Policy, Quality};
    use crate::core::metric::Metric;
    use crate::ffi::plan::drex_plan_input;

    fn an_engine() -> Engine {
        Engine::new(Config {
            n_layers: 4,
            ramp_layers: vec![2],
            thresholds: vec![0.5],
            n_slots: 1,
            max_requests: 1,
            max_batch: 1,
            max_pass_rows: 0,
            policy: Policy::Hold,
            metric: Metric::Gap,
            fill: Fill::Copy,
            quality: Quality::Given,
            max_pending: 0,
            flush_rows: 0,
            min_ready: 0,
            max_hold_ns: 0,
            token_deadline_ns: 0,
            seed: 0,
            art_ratio: None,
        })
        .unwrap()
    }

    fn text() -> String {
        // SAFETY: the thread's own text.
        let text = unsafe { std::ffi::CStr::from_ptr(last_error::get()) };
        text.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_poisons_the_engine_and_nothing_else() {
        let bad = handle::ENGINES.insert::<drex_engine>(an_engine()).unwrap();
        let good = handle::ENGINES.insert::<drex_engine>(an_engine()).unwrap();
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        let status = with("drex_test", bad, |_| panic!("number {}", 7));
        std::panic::set_hook(hook);
        assert_eq!(status, DREX_ERROR_PANIC);
        assert_eq!(text(), "drex_test: internal error: number 7");
        assert_eq!(with("drex_test", bad, |_| Ok(())), DREX_ERROR_PANIC);
        assert!(text().contains("destruction"));
        assert_eq!(with("drex_test", good, |_| Ok(())), DREX_OK);
        assert!(handle::ENGINES.remove(bad).is_ok());
        assert!(matches!(handle::ENGINES.remove(bad), Err(Fault::Handle(_))));
        assert_eq!(
            with("drex_test", bad, |_| Ok(())),
            DREX_ERROR_INVALID_HANDLE
        );
        handle::ENGINES.remove(good).unwrap();
    }

    /// A host may call from a destructor, while its own panic unwinds the thread.
    #[test]
    fn what_a_call_did_counts_and_not_what_its_thread_does() {
        struct Calls(*mut drex_engine, bool);
        impl Drop for Calls {
            fn drop(&mut self) {
                assert!(std::thread::panicking());
                let status = with("drex_test", self.0, |_| {
                    assert!(!self.1, "the call's own");
                    Ok(())
                });
                let expect = if self.1 { DREX_ERROR_PANIC } else { DREX_OK };
                assert_eq!(status, expect);
            }
        }
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        for fails in [false, true] {
            let h = handle::ENGINES.insert::<drex_engine>(an_engine()).unwrap();
            let unwound = catch_unwind(AssertUnwindSafe(|| {
                let _calls = Calls(h, fails);
                panic!("the host's");
            }));
            assert!(unwound.is_err());
            let expect = if fails { DREX_ERROR_PANIC } else { DREX_OK };
            assert_eq!(with("drex_test", h, |_| Ok(())), expect);
            handle::ENGINES.remove(h).unwrap();
        }
        std::panic::set_hook(hook);
    }

    /// A struct as it may become: 8 bytes more than programs have that know
    /// drex_plan_input.
    #[repr(C)]
    #[derive(Debug, Clone, Copy, PartialEq)]
    struct Grown {
        size: u32,
        n_prompt_rows: u32,
        now_ns: u64,
        later: u64,
    }

    // SAFETY: numbers, the size first.
    unsafe impl Sized32 for Grown {
        const FIRST: usize = size_of::<drex_plan_input>();
    }

    #[test]
    fn a_program_from_before_a_struct_grew_is_understood() {
        let old = drex_plan_input {
            size: 16,
            n_prompt_rows: 2,
            now_ns: 3,
        };
        // The memory behind the program's struct is not ours.
        let mut memory = [old, old];
        let p = memory.as_mut_ptr().cast::<Grown>();
        // SAFETY: as many bytes as `size` says.
        let read = unsafe { read("input", p) }.unwrap();
        let expect = Grown {
            size: 16,
            n_prompt_rows: 2,
            now_ns: 3,
            later: 0,
        };
        assert_eq!(read, expect);
        let new = Grown {
            size: 24,
            n_prompt_rows: 5,
            now_ns: 6,
            later: 7,
        };
        // SAFETY: as above.
        unsafe {
            assert_eq!(writable("out", p).unwrap(), 16);
            write(p, &new);
        }
        let got = memory.map(|m| (m.size, m.n_prompt_rows, m.now_ns));
        assert_eq!(got, [(16, 5, 6), (16, 2, 3)]);
        memory[0].size = 15;
        let p = memory.as_mut_ptr().cast::<Grown>();
        // SAFETY: only the size is looked at.
        unsafe {
            assert!(matches!(writable("out", p), Err(Fault::Small { .. })));
            assert!(matches!(super::read("input", p), Err(Fault::Small { .. })));
        }
    }

    #[test]
    fn a_handle_admits_one_thread_at_a_time() {
        let h = handle::ENGINES.insert::<drex_engine>(an_engine()).unwrap();
        let status = with("drex_outer", h, |_| {
            let addr = h.addr();
            std::thread::spawn(move || {
                let h = std::ptr::without_provenance_mut(addr);
                assert_eq!(with("drex_inner", h, |_| Ok(())), DREX_ERROR_HANDLE_BUSY);
                assert!(matches!(handle::ENGINES.remove(h), Err(Fault::Busy(_))));
            })
            .join()
            .unwrap();
            Ok(())
        });
        assert_eq!(status, DREX_OK);
        assert_eq!(with("drex_test", h, |_| Ok(())), DREX_OK);
        handle::ENGINES.remove(h).unwrap();
    }

    #[test]
    fn garbage_is_no_handle() {
        for key in [1usize, 5, 8, 0xdead_beef, usize::MAX, 0xd, TAG_OF_NOBODY] {
            let h = std::ptr::without_provenance_mut(key);
            assert_eq!(
                with("drex_test", h, |_| Ok(())),
                DREX_ERROR_INVALID_HANDLE,
                "{key:x}"
            );
        }
        let null = std::ptr::null_mut();
        assert_eq!(
            with("drex_test", null, |_| Ok(())),
            DREX_ERROR_NULL_ARGUMENT
        );
    }

    const TAG_OF_NOBODY: usize = 77 << 11 | 200 << 3 | 5;
}
