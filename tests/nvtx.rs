// SPDX-License-Identifier: Apache-2.0

//! Ranges for a profiler, as a library that attaches itself the way NVIDIA's do
//! sees them (`tests/c/nvtx_injection.c`).

#![cfg(target_os = "linux")]

mod common;

use std::ffi::{CStr, CString, c_char};
use std::panic;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};

use common::*;
use drex::observe::nvtx::VARIABLE;
use libloading::Library;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// A name of its own for each file.
fn scratch(name: &str) -> PathBuf {
    static N: AtomicU32 = AtomicU32::new(0);
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    let dir = DIR.get_or_init(|| {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("nvtx");
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        dir
    });
    dir.join(format!("{}-{name}", N.fetch_add(1, Ordering::Relaxed)))
}

fn compile(name: &str, source: &str, args: &[&str]) -> PathBuf {
    let out = scratch(name);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let status = Command::new("cc")
        .args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-I"])
        .arg(root.join("include"))
        .arg(root.join("tests/c").join(source))
        .args(args)
        .arg("-o")
        .arg(&out)
        .status()
        .expect("a C compiler");
    assert!(status.success(), "{status}");
    out
}

fn fake(name: &str, define: &[&str]) -> PathBuf {
    let shared = ["-fPIC", "-shared", "-pthread"];
    compile(name, "nvtx_injection.c", &[&shared, define].concat())
}

/// This process under a profiler, one test at a time.
struct Profiled {
    library: Library,
    _alone: MutexGuard<'static, ()>,
    from: usize,
}

static ALONE: Mutex<()> = Mutex::new(());

fn profiled() -> Profiled {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    let alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let path = PATH.get_or_init(|| {
        let path = fake("fake.so", &[]);
        // SAFETY: no engine was made yet, and Rust's other users of the
        // environment share a lock with this.
        unsafe { std::env::set_var(VARIABLE, &path) };
        path
    });
    // SAFETY: our own.
    let library = unsafe { Library::new(path) }.unwrap();
    let mut p = Profiled {
        library,
        _alone: alone,
        from: 0,
    };
    p.from = p.all().len();
    p
}

impl Profiled {
    fn all(&self) -> String {
        // SAFETY: as declared there.
        let notes = unsafe {
            let get = self
                .library
                .get::<unsafe extern "C" fn() -> *const c_char>("fake_nvtx_notes");
            CStr::from_ptr(get.unwrap()())
        };
        notes.to_str().unwrap().to_owned()
    }

    fn note(&self, text: &str) {
        let text = CString::new(text).unwrap();
        // SAFETY: as declared there.
        unsafe {
            let f = self
                .library
                .get::<unsafe extern "C" fn(*const c_char)>("fake_nvtx_note");
            f.unwrap()(text.as_ptr());
        }
    }

    /// Since the last time.
    fn news(&mut self) -> Vec<String> {
        let all = self.all();
        let news = all[self.from..].lines().map(|l| l.trim().to_owned());
        self.from += all[self.from..].len();
        news.collect()
    }

    /// A range of that name, begun and ended, is all that is new.
    fn one(&mut self, name: &str) {
        assert_eq!(self.news(), [format!("push {name}"), "pop drex".to_owned()]);
    }
}

fn engine() -> Engine {
    let ramps = [4];
    let mut c = config(&ramps, 4, 4, DREX_POLICY_HOLD);
    c.flush_rows = 4;
    Engine::new(&c)
}

#[test]
fn every_call_is_a_range_of_its_own() {
    let mut p = profiled();
    let (e, other) = (engine(), engine());
    let made = p.all();
    // Once, however many engines there are and whatever they do.
    let head = "initialize \nattached \ndomain drex\nstring plan\nstring ramp\nstring fill\n\
                string complete\nstring gather\nstring scatter\n";
    assert!(made.starts_with(head), "{made}");
    p.news();
    for e in [&e, &other] {
        for id in 0..3 {
            e.add(id).unwrap();
            e.ready(id, 0).unwrap();
        }
        p.note("no range so far");
        e.plan(1000, 2).unwrap();
        p.note("planned");
        e.ramp(&[0.9, 0.1]).unwrap();
        p.note("decided");
        e.complete(2000, 900).unwrap();
        e.ready(0, 2000).unwrap();
        let calls = ["plan", "ramp", "complete"];
        let hosts = ["no range so far", "planned", "decided"];
        let expect: Vec<String> = calls
            .iter()
            .zip(hosts)
            .flat_map(|(call, host)| {
                [
                    format!("host {host}"),
                    format!("push {call}"),
                    "pop drex".into(),
                ]
            })
            .collect();
        assert_eq!(p.news(), expect);
    }
    assert!(p.all().matches("initialize").count() == 1);
    assert!(p.all().matches("string").count() == 6);
    assert!(!p.all().contains("bad"));
}

#[test]
fn fills_and_copies_of_rows_are_ranges_too() {
    let mut p = profiled();
    let e = engine();
    let mut kv = vec![[0u8; 64]; 16];
    let layers: Vec<drex_kv_layer> = (0..8)
        .map(|i| {
            let mut l = sized!(drex_kv_layer);
            (l.n_cells, l.k_row_bytes, l.v_row_bytes) = (4, 16, 16);
            (l.k_cell_stride, l.v_cell_stride) = (16, 16);
            l.k = kv[i].as_mut_ptr().cast();
            l.v = kv[8 + i].as_mut_ptr().cast();
            l
        })
        .collect();
    // SAFETY: the tensors outlive the engine's use of them.
    ok(unsafe { drex_bind_kv(e.raw, layers.as_ptr(), 8) }).unwrap();
    e.add(0).unwrap();
    e.ready(0, 0).unwrap();
    e.plan(1, 4).unwrap();
    p.news();
    let (mut rows, mut dense) = ([1u8; 64], [2u8; 64]);
    let mut a = sized!(drex_arena);
    (a.arena, a.dense) = (rows.as_mut_ptr().cast(), dense.as_mut_ptr().cast());
    (a.arena_stride_bytes, a.dense_stride_bytes, a.row_bytes) = (16, 16, 16);
    // SAFETY: four rows of 16 bytes each.
    ok(unsafe { drex_gather(e.raw, &a) }).unwrap();
    p.one("gather");
    // SAFETY: as above.
    ok(unsafe { drex_scatter(e.raw, &a) }).unwrap();
    p.one("scatter");
    e.ramp_at(&[0.9], [2].as_ptr()).unwrap();
    p.one("ramp");
    e.fill().unwrap();
    p.one("fill");
}

#[test]
fn a_call_that_fails_ends_its_range() {
    let mut p = profiled();
    let e = engine();
    e.add(0).unwrap();
    e.ready(0, 0).unwrap();
    p.news();
    assert_eq!(e.plan(5, 0).unwrap_err().0, DREX_ERROR_CAPACITY);
    p.one("plan");
    assert_eq!(e.fill().unwrap_err().0, DREX_ERROR_CALL_ORDER);
    p.one("fill");
    assert_eq!(e.complete(5, 1).unwrap_err().0, DREX_ERROR_CALL_ORDER);
    p.one("complete");
    e.plan(6, 1).unwrap();
    p.one("plan");
    // What is refused at the door is no call of the engine's.
    // SAFETY: a handle.
    let status = unsafe { drex_complete(e.raw, ptr::null()) };
    assert_eq!(status, DREX_ERROR_NULL_ARGUMENT);
    assert_eq!(p.news(), [""; 0]);
}

/// A subscriber of a Rust host that panics at every event of a plan or so.
struct Panics;

impl Subscriber for Panics {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, e: &Event<'_>) {
        assert!(*e.metadata().level() != tracing::Level::TRACE, "no more");
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[test]
fn a_panic_ends_its_range() {
    let mut p = profiled();
    let e = engine();
    e.add(0).unwrap();
    e.ready(0, 0).unwrap();
    p.news();
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let planned = tracing::subscriber::with_default(Panics, || e.plan(1, 1));
    panic::set_hook(hook);
    assert_eq!(planned.unwrap_err().0, DREX_ERROR_PANIC);
    p.one("plan");
}

#[test]
fn ranges_belong_to_the_thread_that_calls() {
    let mut p = profiled();
    p.news();
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                let e = engine();
                for now in 0..200 {
                    e.plan(now, 1).unwrap();
                }
            });
        }
    });
    let news = p.news();
    // The fake counts the depth by thread: a pop too many would be a bad one.
    let count = |what: &str| news.iter().filter(|l| *l == what).count();
    assert_eq!((count("push plan"), count("pop drex")), (800, 800));
    assert_eq!(news.len(), 1600);
}

/// Runs a C program with the variable as given and the fake in the process in
/// any case: what the program printed, and what the fake noted.
fn host(source: &str, variable: Option<&Path>) -> (String, Vec<String>) {
    static BUILT: OnceLock<[PathBuf; 2]> = OnceLock::new();
    let [dir, preloaded] = BUILT.get_or_init(|| {
        let exe = std::env::current_exe().unwrap();
        let deps = exe.parent().unwrap();
        let lib = [deps, deps.parent().unwrap()].map(|d| d.join("libdrex.so"));
        let lib = lib.iter().find(|p| p.exists());
        let dir = scratch("lib");
        std::fs::create_dir_all(&dir).unwrap();
        for name in ["libdrex.so", "libdrex.so.0"] {
            let lib = lib.expect("libdrex.so beside this test");
            std::os::unix::fs::symlink(lib, dir.join(name)).unwrap();
        }
        [dir, fake("preloaded.so", &[])]
    });
    let program = compile("host", source, &["-L", dir.to_str().unwrap(), "-ldrex"]);
    let mut command = Command::new(program);
    command.env_remove(VARIABLE).env("FAKE_NVTX_PRINT", "1");
    command.env("LD_PRELOAD", preloaded);
    command.env("LD_LIBRARY_PATH", dir);
    if let Some(path) = variable {
        let same = path == Path::new("preloaded");
        command.env(VARIABLE, if same { preloaded } else { path });
    }
    let out = command.output().unwrap();
    assert!(out.status.success(), "{out:?}");
    let notes = String::from_utf8(out.stderr).unwrap();
    // Of every copy of the fake in the process.
    assert!(notes.contains("notes:"), "{notes}");
    let lines = notes.lines().filter(|l| *l != "notes:");
    let lines = lines.map(|l| l.trim().to_owned()).collect();
    (String::from_utf8(out.stdout).unwrap(), lines)
}

/// A program that serves 32 tokens.
fn smoke(variable: Option<&Path>) -> Vec<String> {
    let (out, lines) = host("smoke.c", variable);
    assert!(out.contains(": 32 tokens in "), "{out}");
    lines
}

#[test]
fn a_c_host_gets_them_by_the_variable_and_not_without() {
    let lines = smoke(Some(Path::new("preloaded")));
    let count = |what: &str| lines.iter().filter(|l| *l == what).count();
    for name in ["plan", "ramp", "fill", "complete"] {
        assert!(count(&format!("push {name}")) >= 8, "{lines:?}");
    }
    let pushes = lines.iter().filter(|l| l.starts_with("push")).count();
    assert_eq!(pushes, count("pop drex"));
    assert!(!lines.iter().any(|l| l.starts_with("bad")), "{lines:?}");

    assert_eq!(smoke(None), [""; 0]);
    assert_eq!(smoke(Some(Path::new(""))), [""; 0]);
}

#[test]
fn what_cannot_be_injected_does_no_harm_and_is_said() {
    let text = scratch("text.so");
    std::fs::write(&text, "no library").unwrap();
    let (other, refuses) = (
        fake("other.so", &["-DNO_ENTRY"]),
        fake("refuses.so", &["-DREFUSES"]),
    );
    let entry = "InitializeInjectionNvtx2";
    let cases = [
        (Path::new("./."), "./.", None),
        (Path::new("/nowhere.so"), "/nowhere.so", None),
        (&text, "text.so", None),
        (&other, entry, None),
        (
            &refuses,
            "InitializeInjectionNvtx2 returned 0",
            Some("initialize"),
        ),
    ];
    for (path, why, note) in cases {
        let notes: Vec<&str> = note.into_iter().collect();
        assert_eq!(smoke(Some(path)), notes, "{}", path.display());
        let (log, lines) = host("nvtx_log.c", Some(path));
        assert_eq!(lines, notes);
        assert!(
            log.starts_with("NVTX_INJECTION") && log.contains(why),
            "{log}"
        );
        assert_eq!(log.lines().count(), 1, "{log}");
    }
    for variable in [None, Some(Path::new("preloaded"))] {
        assert_eq!(host("nvtx_log.c", variable).0, "");
    }
}
