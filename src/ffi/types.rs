// SPDX-License-Identifier: Apache-2.0

//! The types of the C ABI. Their documentation is the header's.

#![allow(non_camel_case_types)]

use std::ffi::c_void;

use crate::core::config::Fill;
use crate::core::counters::{MISSES, Miss, REASONS, Reason, WAIT_BUCKETS};
use crate::core::metric::Metric;
use crate::core::policy::{Decision, Policy};

/// The version of this interface. It changes only when something that worked
/// stops working; new functions, constants and fields at the end of structs
/// do not change it.
pub const DREX_ABI_VERSION: u32 = 1;

/// Most exit ramps that a model may have.
pub const DREX_MAX_RAMPS: usize = 16;

/// In place of a ramp's index: none.
pub const DREX_NO_RAMP: u32 = u32::MAX;

/// Most of the greatest logits of a row that a ramp lists.
pub const DREX_MAX_TOP: usize = 64;

/// In place of an arena row: none.
pub const DREX_NO_SLOT: u32 = u32::MAX;

/// Length of drex_stats.flushes, more than there are DREX_FLUSH_*.
pub const DREX_MAX_FLUSH_REASONS: usize = 16;

/// Length of drex_stats.misses, more than there are DREX_MISS_*.
pub const DREX_MAX_MISS_REASONS: usize = 8;

/// Length of drex_stats.wait_us_buckets.
pub const DREX_WAIT_BUCKETS: usize = 32;

/// How a call went: DREX_OK (0) or one of DREX_ERROR_*. The numbers never
/// change their meaning; a later version may add more, so treat any number
/// but 0 as a failure. A call that fails changes nothing and writes none of
/// its outputs (chapter 5 has the one exception), and leaves a text that names
/// the function, the field and the value: see drex_last_error().
pub type drex_status = i32;

/// Done.
pub const DREX_OK: drex_status = 0;
/// A pointer that may not be NULL is.
pub const DREX_ERROR_NULL_ARGUMENT: drex_status = 1;
/// A value is out of range, or clashes with another one.
pub const DREX_ERROR_INVALID_ARGUMENT: drex_status = 2;
/// drex_config.abi_version is not the library's.
pub const DREX_ERROR_ABI_MISMATCH: drex_status = 3;
/// A struct's size field is too small, or the struct comes from a later
/// version and uses fields that this library does not know.
pub const DREX_ERROR_STRUCT_SIZE: drex_status = 4;
/// The handle was never given out, or what it stood for has been destroyed, or
/// is of the other kind (drex_engine, drex_pages).
pub const DREX_ERROR_INVALID_HANDLE: drex_status = 5;
/// Another thread is inside a call on this handle, or this one is, in a
/// callback.
pub const DREX_ERROR_HANDLE_BUSY: drex_status = 6;
/// No request alive has this id.
pub const DREX_ERROR_UNKNOWN_REQUEST: drex_status = 7;
/// A request with this id is alive already.
pub const DREX_ERROR_DUPLICATE_REQUEST: drex_status = 8;
/// The call does not fit the calls before it, such as ramp without plan.
pub const DREX_ERROR_CALL_ORDER: drex_status = 9;
/// Something of fixed size is full, or an array is too short.
pub const DREX_ERROR_CAPACITY: drex_status = 10;
/// The value is known, and this version cannot serve it.
pub const DREX_ERROR_UNSUPPORTED: drex_status = 11;
/// The device failed.
pub const DREX_ERROR_DEVICE: drex_status = 12;
/// A bug in drex was caught, or one in a Rust host's tracing subscriber. The
/// handle that the call was on is poisoned: every call on it but the one that
/// destroys it returns this again.
pub const DREX_ERROR_PANIC: drex_status = 13;
/// There is not as much memory as the call asked for. Only calls that name it
/// return this: see chapter 5.
pub const DREX_ERROR_MEMORY: drex_status = 14;

/// The rule by which rows leave at a ramp: DREX_POLICY_*. A row is *confident* when its
/// confidence is at least its threshold. Under every policy, a row whose
/// confidence is NaN and a row whose threshold is above 1 go on.
///
/// An *involuntary exit* is a row made to exit below its threshold; only
/// EAGER, MEDIAN and MEAN do that. An *involuntary stay* is a confident row
/// that goes on with its batch. Both are counted, and marked in the verdict.
pub type drex_policy = u32;

/// Full passes only; no ramp is ever reached.
pub const DREX_POLICY_OFF: drex_policy = 0;
/// One confident row makes the whole batch exit. Forces rows out.
pub const DREX_POLICY_EAGER: drex_policy = 1;
/// The batch exits when all of its rows are confident, else all go on at
/// once. Rows with a threshold above 1 have no say.
pub const DREX_POLICY_LAZY: drex_policy = 2;
/// The batch exits when the median of (confidence - threshold) is at least 0;
/// of an even number of rows, the mean of the middle two. Rows without a
/// number, or with a threshold above 1, have no say. Forces rows out.
pub const DREX_POLICY_MEDIAN: drex_policy = 3;
/// As MEDIAN, with the mean. Forces rows out.
pub const DREX_POLICY_MEAN: drex_policy = 4;
/// Confident rows exit, the rest go on at once.
pub const DREX_POLICY_LATENCY: drex_policy = 5;
/// Confident rows exit, the rest are held in the rebatching buffer until
/// drex_config.flush_rows are held, or fewer than drex_config.min_ready rows
/// are ready, or one has waited too long, or a deadline is near.
pub const DREX_POLICY_HOLD: drex_policy = 6;
/// DREX's adaptive rebatching threshold: a batch of b rows of which b' are
/// confident is split (confident rows exit, the rest are held) when b' = b or
/// b' > (c/t_d) b, where c = t_s + t_d - t_f is what splitting costs; else
/// all go on at once. The times of the shallow (t_s), deep (t_d) and full
/// (t_f) pass at b rows are learned from drex_complete() and drex_observe();
/// while one is unknown, c/t_d is taken as 0. Full passes are not run by
/// themselves while rows may exit: time a few and report them with
/// drex_observe(). c/t_d is kept within [0, 1].
pub const DREX_POLICY_ART: drex_policy = 7;

/// As HOLD, with the rule that is predicted to make the most tokens per
/// second, "no early exit" among the rules: which ramps are looked at, how
/// many held rows flush, below how many ready rows. Learned from what
/// drex_complete() and the ramps report: times by rows and KV cells, how
/// often rows exit. A small share of the tokens is made under other rules,
/// to keep knowing what they would bring. See drex_replan().
pub const DREX_POLICY_AUTO: drex_policy = 8;

/// How sure a row is, from its raw logits (before temperature, penalties and
/// grammar), in [0, 1]: DREX_METRIC_*.
pub type drex_metric = u32;

/// p(top 1) - p(top 2)
pub const DREX_METRIC_GAP: drex_metric = 0;
/// p(top 1)
pub const DREX_METRIC_MAXPROB: drex_metric = 1;
/// 1 - H / ln(n_vocab), where H is the entropy in nats; 1 for n_vocab = 1
pub const DREX_METRIC_ENTROPY: drex_metric = 2;
/// In a request: the engine's metric.
pub const DREX_METRIC_DEFAULT: drex_metric = u32::MAX;

/// How the K/V entries of the layers that an exited token skipped (its
/// *hole*) are filled: DREX_FILL_*. Requests of one batch may differ.
pub type drex_fill_mode = u32;

/// State-copy: K and V of the last computed layer at the token's cell are
/// copied to all skipped layers.
pub const DREX_FILL_COPY: drex_fill_mode = 0;
/// K and V of the skipped layers are computed. The token's hidden row stays in the arena, *pending*,
/// and goes along when its request next goes through the skipped layers:
/// exactly what the full model would have put there for this text.
pub const DREX_FILL_POSTFILL: drex_fill_mode = 1;
/// As POSTFILL, and the token is a draft: emitted, that is given to the
/// client, when the full model's logits for the pending row agree; else
/// replaced, and what was made after it is void. See drex_verify(). The output
/// is that of the full model. Deadlines do not hurry drafts on: the tokens of
/// up to max_pending rows come together, when the rows have gone deep.
pub const DREX_FILL_VERIFY: drex_fill_mode = 2;
/// The host fills them: after drex_ramp(), before the arena row is used again,
/// it runs the skipped layers' own K and V projections over the rows that left,
/// from their hidden states as they are (state propagation, Schuster et al.,
/// arXiv 2207.07061). Closer to the full model than COPY, at the price of these
/// projections; drex_fill() leaves such rows alone.
pub const DREX_FILL_PROPAGATE: drex_fill_mode = 3;
/// In a request: the engine's mode.
pub const DREX_FILL_DEFAULT: drex_fill_mode = u32::MAX;

/// The element type of logits: DREX_DTYPE_*, in the machine's byte order.
pub type drex_dtype = u32;

/// IEEE binary32
pub const DREX_DTYPE_F32: drex_dtype = 0;
/// IEEE binary16
pub const DREX_DTYPE_F16: drex_dtype = 1;
/// The upper half of binary32
pub const DREX_DTYPE_BF16: drex_dtype = 2;

/// Where logits, arena rows and K/V lie: DREX_DEVICE_*.
pub type drex_device = u32;

/// Memory that the calling thread can read and write.
pub const DREX_DEVICE_HOST: drex_device = 0;
/// Memory of a CUDA device. drex_create() needs a current CUDA context on its
/// thread, and the engine works in that one: see chapter 7.
pub const DREX_DEVICE_CUDA: drex_device = 1;

/// The state of a request: DREX_REQUEST_*.
pub type drex_request_state = u32;

/// The request has no token to run: its prompt is being processed, or the host
/// is sampling.
pub const DREX_REQUEST_IDLE: drex_request_state = 0;
/// A token waits for the first window.
pub const DREX_REQUEST_READY: drex_request_state = 1;
/// Its row is in the planned step, or was told to stay and is in the next.
pub const DREX_REQUEST_RUNNING: drex_request_state = 2;
/// Its row waits in the rebatching buffer.
pub const DREX_REQUEST_HELD: drex_request_state = 3;

/// Why a step runs: DREX_FLUSH_*.
pub type drex_flush_reason = u32;

/// Ready rows and prompt rows run through the first window.
pub const DREX_FLUSH_NONE: drex_flush_reason = 0;
/// Enough rows were held.
pub const DREX_FLUSH_FILL: drex_flush_reason = 1;
/// A row was held for as long as drex_config.max_hold_ns says.
pub const DREX_FLUSH_AGE: drex_flush_reason = 2;
/// A held row's token would have missed its deadline.
pub const DREX_FLUSH_DEADLINE: drex_flush_reason = 3;
/// Nothing else is left to run; under HOLD, fewer than min_ready rows.
pub const DREX_FLUSH_IDLE: drex_flush_reason = 4;
/// Rows that a ramp told to go on at once.
pub const DREX_FLUSH_STAY: drex_flush_reason = 5;
/// Prompt rows go on from a ramp, and take along what waits there.
/// Since 0.2.
pub const DREX_FLUSH_PROMPT: drex_flush_reason = 6;
/// How many reasons there are; a later version may have more, up to
/// DREX_MAX_FLUSH_REASONS.
pub const DREX_FLUSH_REASONS: usize = 7;

/// Where most of the time went of a token that missed its deadline:
/// DREX_MISS_*.
pub type drex_miss_reason = u32;

/// Between its last token and drex_request_ready(): in the host.
pub const DREX_MISS_HOST: drex_miss_reason = 0;
/// Ready, while other rows ran: overload.
pub const DREX_MISS_QUEUE: drex_miss_reason = 1;
/// Held in the rebatching buffer.
pub const DREX_MISS_HELD: drex_miss_reason = 2;
/// In layer windows, its own or others' while it was to go on at once.
pub const DREX_MISS_RUN: drex_miss_reason = 3;
/// How many reasons there are; a later version may have more, up to
/// DREX_MAX_MISS_REASONS.
pub const DREX_MISS_REASONS: usize = 4;

/// The decision on a row at a ramp, or by drex_verify(): DREX_DECISION_*.
pub type drex_decision = u32;

/// Emit the token from the ramp's logits; the row is done.
pub const DREX_DECISION_EXIT: drex_decision = 0;
/// The row waits in the rebatching buffer for a deeper batch.
pub const DREX_DECISION_HOLD: drex_decision = 1;
/// The row goes on in the next step.
pub const DREX_DECISION_STAY: drex_decision = 2;
/// The request was removed while the step ran.
pub const DREX_DECISION_GONE: drex_decision = 3;
/// A pending row: it left before, and goes along.
pub const DREX_DECISION_PENDING: drex_decision = 4;
/// drex_verify(): the draft stands; it is a token now.
pub const DREX_DECISION_ACCEPT: drex_decision = 5;
/// drex_verify(): the full model's token is emitted in place of the draft.
pub const DREX_DECISION_REPLACE: drex_decision = 6;
/// drex_verify(): the row follows a draft that was replaced, and is void.
pub const DREX_DECISION_DROP: drex_decision = 7;

/// One engine: the scheduler of one model instance. Opaque, and not an
/// address: never read through it. Made by drex_create(), ended by
/// drex_destroy(). A destroyed handle gives DREX_ERROR_INVALID_HANDLE.
pub struct drex_engine {
    _opaque: [u8; 0],
}

/// The description of an engine. Everything is copied; no pointer is kept.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_config {
    /// sizeof(drex_config)
    pub size: u32,
    /// DREX_ABI_VERSION
    pub abi_version: u32,
    /// Layers of the model, 2..65536.
    pub n_layers: u32,
    /// Exit ramps, 1..DREX_MAX_RAMPS.
    pub n_ramps: u32,
    /// [n_ramps] strictly increasing, each in 1..n_layers-1; a ramp at L
    /// follows layers [0, L). Not NULL.
    pub ramp_layers: *const u32,
    /// Rows of the host's hidden-state arena, 1..1048576; at least
    /// max_requests, since every request may hold one. What is beyond is room
    /// for pending rows, see DREX_FILL_POSTFILL; when it is full, rows go deep
    /// rather than exit.
    pub n_slots: u32,
    /// Most requests alive at once, 1..1048576.
    pub max_requests: u32,
    /// B: most decode rows in one pass, pending ones included, 1..1048576.
    pub max_batch: u32,
    /// The rule by which rows leave at a ramp.
    pub policy: drex_policy,
    /// How sure a row is, for requests that do not name a metric; not
    /// DREX_METRIC_DEFAULT.
    pub metric: drex_metric,
    /// How holes are filled, for requests that do not name a mode; not
    /// DREX_FILL_DEFAULT.
    pub fill: drex_fill_mode,
    /// Where logits, arena rows and K/V lie, all of them.
    pub device: drex_device,
    /// Finite, >= 0. A row exits when its confidence >= threshold; above 1:
    /// never.
    pub threshold: f32,
    /// [n_ramps] one threshold per ramp, or NULL: `threshold` for every ramp.
    pub ramp_thresholds: *const f32,
    /// Rows held at a ramp that force a flush. 0: the policy's own rule (ART:
    /// max_batch; HOLD: 0.6 of the requests that have had a token to run, or
    /// of max_batch if that is less, rounded up).
    pub flush_rows: u32,
    /// HOLD: flush when fewer rows than this are ready. 0 means 1.
    pub min_ready: u32,
    /// Flush a row that was held this long, in ns. 0: 8 times the predicted time
    /// of its remaining layers, for as many rows as are held there; while no time
    /// is known, once 256 other steps have passed it by.
    pub max_hold_ns: u64,
    /// Time between two tokens that a request may take, in ns; 0: none. A
    /// request may name its own.
    pub token_deadline_ns: u64,
    /// Pins c/t_d of ART, finite, >= 0; NaN: as measured.
    pub art_ratio: f32,
    /// 0
    pub reserved: u32,
    /// AUTO: of the random numbers that its predictions draw. Any number.
    pub seed: u64,
    /// POSTFILL, VERIFY: pending rows of a request at most; 0: 8. When it has
    /// so many, its next row goes deep even if it is confident (an involuntary
    /// stay). They and that row must fit into max_batch, which cuts it.
    pub max_pending: u32,
    /// CUDA: most logits of a row, which scratch memory is made for; 0:
    /// 524288. On the host, rows may have any length.
    pub n_vocab: u32,
    /// Most of the greatest logits that a ramp is asked to list, see
    /// drex_top_get(); 0..DREX_MAX_TOP.
    pub n_top: u32,
    /// Most rows of one window, decode rows and prompt rows together; 0:
    /// max_batch. At least max_batch, at most 1048576. For hosts that name
    /// drex_plan_input.n_prompt_rows.
    pub max_pass_rows: u32,
}

/// The K/V cache of one layer. The tensors stay the host's, and must stay
/// valid until other ones are bound or the engine is destroyed.
///
/// K of cell c is k_row_bytes bytes at k + c * k_cell_stride, whatever they
/// mean: quantised rows are copied as they are. V lies the same way (*row
/// layout*) or *transposed*: element j of cell c is v_elem_bytes bytes at
/// v + j * v_elem_stride + c * v_elem_bytes. A side with 0 row bytes does not
/// exist, and its pointer may be NULL.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_kv_layer {
    /// sizeof(drex_kv_layer)
    pub size: u32,
    /// Cells in the cache, at least 1.
    pub n_cells: u32,
    /// K of cell 0.
    pub k: *mut c_void,
    /// V of cell 0; in the transposed layout, its element 0.
    pub v: *mut c_void,
    /// Bytes of one cell's K; 0: the layer has none.
    pub k_row_bytes: u64,
    /// Bytes from one cell's K to the next one's; at least k_row_bytes.
    pub k_cell_stride: u64,
    /// Bytes of one cell's V; 0: the layer has none. In the transposed layout,
    /// a multiple of v_elem_bytes.
    pub v_row_bytes: u64,
    /// Row layout: bytes from one cell's V to the next one's, at least
    /// v_row_bytes. Unused in the transposed layout.
    pub v_cell_stride: u64,
    /// 0: row layout. Else transposed: bytes of one element.
    pub v_elem_bytes: u64,
    /// Transposed layout: bytes from element j to element j + 1 of one cell,
    /// at least n_cells * v_elem_bytes. Unused in the row layout.
    pub v_elem_stride: u64,
}

/// The description of a request.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_request_config {
    /// sizeof(drex_request_config)
    pub size: u32,
    /// Or DREX_METRIC_DEFAULT.
    pub metric: drex_metric,
    /// Chosen by the host; unique among the requests alive. Any number.
    pub id: u64,
    /// For every ramp, as drex_config.threshold; NaN: the engine's.
    pub threshold: f32,
    /// Or DREX_FILL_DEFAULT.
    pub fill: drex_fill_mode,
    /// Time between two tokens, in ns; 0: the engine's.
    pub token_deadline_ns: u64,
    /// Higher is taken first when more rows wait than fit. Of priorities
    /// that wait at one time, 64 are told apart.
    pub priority: i32,
    /// 0
    pub reserved: u32,
    /// Time from the first drex_request_ready() to the last token, in ns; 0:
    /// none. What is left of it is spread evenly over the tokens left, so
    /// each has a deadline; the nearer one counts.
    pub request_deadline_ns: u64,
    /// Tokens that it will have at most; 0: unknown, and then only the
    /// request's deadline itself counts.
    pub max_tokens: u64,
}

/// A request's state and counters.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_request_info {
    /// sizeof(drex_request_info), set by the caller
    pub size: u32,
    /// The state that it is in.
    pub state: drex_request_state,
    /// Where its row is held, else DREX_NO_RAMP.
    pub ramp: u32,
    /// The arena row that its row occupies, else DREX_NO_SLOT.
    pub slot: u32,
    /// Tokens decoded through drex so far.
    pub tokens: u64,
    /// Rows that left at each ramp. With DREX_FILL_VERIFY they are drafts, and
    /// count here also where they were replaced or dropped later, so there may
    /// be more of them than tokens.
    pub exits: [u64; DREX_MAX_RAMPS],
    /// Of the exits, those below the row's threshold; see drex_policy.
    pub involuntary_exits: u64,
    /// Times that its row was confident at a ramp and went on.
    pub involuntary_stays: u64,
    /// Total time spent held, in ns; what is held now is not in it.
    pub held_ns: u64,
    /// Tokens that came later than their deadline.
    pub deadline_misses: u64,
    /// At the last ramp that its row passed; NaN before the first.
    pub last_confidence: f32,
    /// Pending rows, see DREX_FILL_POSTFILL: of the tokens right before its
    /// next one, or before its own row if it has one.
    pub n_pending: u32,
}

/// The input of drex_plan().
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_plan_input {
    /// sizeof(drex_plan_input)
    pub size: u32,
    /// Prompt rows that wait at layer 0 and could run now, without those that a
    /// window left at a ramp. 0, always: the host runs prompts between steps, and
    /// what they cost is learned from the time between steps. Taken for 0 where
    /// drex_plan()'s out is too small for drex_step.n_prompt_rows.
    pub n_prompt_rows: u32,
    /// Now, in ns of any monotonic clock; the same clock in all calls.
    pub now_ns: u64,
}

/// A row of the planned step.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct drex_row {
    /// The request's id.
    pub request: u64,
    /// The row of the hidden-state arena, below n_slots. A window that begins
    /// above layer 0 reads its input there; a window that ends at a ramp
    /// leaves its last hidden state there.
    pub slot: u32,
    /// 0: the request's own row, of its newest token. n: a pending row, n
    /// tokens before that one, or before the next one when the request has no
    /// row of its own here. A request's rows stand together, the oldest first.
    pub back: u32,
}

/// The window that drex_plan() chose: run layers [layer_begin, layer_end) over the
/// rows.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_step {
    /// sizeof(drex_step), set by the caller
    pub size: u32,
    /// Decode rows. 0, and n_prompt_rows 0 too: there is nothing to run, and the
    /// other fields mean nothing.
    pub n_rows: u32,
    /// 0, or a ramp's layer.
    pub layer_begin: u32,
    /// A ramp's layer, or n_layers. A window may pass ramps where none of its
    /// rows may exit, and with prompt rows any ramp.
    pub layer_end: u32,
    /// The ramp at the window's end: call drex_ramp() if n_rows is not 0.
    /// DREX_NO_RAMP: the
    /// window ends at n_layers; the host samples every row whose request it has
    /// not removed.
    pub ramp: u32,
    /// Why it runs.
    pub reason: drex_flush_reason,
    /// Prompt rows that run along. From layer 0: so many of those that wait, which
    /// the host chooses, in its own order. From another layer: exactly those that
    /// the last window with prompt rows left there. They are the host's: not
    /// among `rows`, without verdicts, in arena rows of the host's own beyond
    /// n_slots. It may run fewer, where a request has ended.
    /// Since 0.2.
    pub n_prompt_rows: u32,
}

/// Is asked at a ramp whether a row whose confidence is sufficient may exit
/// with its token: 1, or 0 where the host would not emit that token. It runs on
/// the thread and inside the call of drex_ramp(), once for each such row, so a
/// call on the same engine gets DREX_ERROR_HANDLE_BUSY. It must return: no
/// exception, no longjmp. Rows that EAGER, MEDIAN or MEAN force out are not asked
/// about.
/// Since 0.2.
pub type drex_confirm_callback =
    Option<unsafe extern "C" fn(user_data: *mut c_void, row: u32, token: i32) -> u32>;

/// The logits at a ramp.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_logits {
    /// sizeof(drex_logits)
    pub size: u32,
    /// The type of their elements.
    pub dtype: drex_dtype,
    /// [n_rows, n_vocab]; row i, in the order of drex_plan()'s rows, begins
    /// at data + i * row_stride_bytes. Not NULL. On the host it needs no
    /// alignment, on a CUDA device that of its elements.
    pub data: *const c_void,
    /// Bytes from row to row, at least n_vocab elements.
    pub row_stride_bytes: u64,
    /// drex_step.n_rows
    pub n_rows: u32,
    /// Logits per row, at least 1, below 2^31.
    pub n_vocab: u32,
    /// CUDA: the CUstream (or cudaStream_t) on which the logits are made, and
    /// on which drex works until the next ramp; NULL is the default stream.
    /// NULL on the host.
    pub stream: *mut c_void,
    /// Greatest logits of each row to list, at most drex_config.n_top.
    pub n_top: u32,
    /// 1: the logits were given to drex_ramp_enqueue() before, or a graph that
    /// captured it has been launched. Else 0.
    pub enqueued: u32,
    /// NULL, or decides about rows that would exit, for example under a
    /// grammar. A row whose token it refuses has the greatest confidence that
    /// is not sufficient.
    /// Since 0.2.
    pub confirm: drex_confirm_callback,
    /// Handed to it; may be NULL.
    /// Since 0.2.
    pub confirm_data: *mut c_void,
}

/// One of the greatest logits of a row.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_top {
    /// As it is, before any softmax.
    pub logit: f32,
    /// Its index; -1 where the row has no more logits that are numbers.
    pub token: i32,
}

/// Rows of an arena, and rows of a dense batch: row i of the batch belongs to
/// row i of the planned step.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_arena {
    /// sizeof(drex_arena)
    pub size: u32,
    /// 0
    pub reserved: u32,
    /// Row s at arena + s * arena_stride_bytes. Not NULL.
    pub arena: *mut c_void,
    /// Row i at dense + i * dense_stride_bytes. Not NULL.
    pub dense: *mut c_void,
    /// At least row_bytes.
    pub arena_stride_bytes: u64,
    /// At least row_bytes.
    pub dense_stride_bytes: u64,
    /// At least 1, below 2^32.
    pub row_bytes: u64,
    /// As drex_logits.stream.
    pub stream: *mut c_void,
}

/// A ramp's verdict on a row.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_verdict {
    /// EXIT, HOLD, STAY, GONE or PENDING.
    pub decision: drex_decision,
    /// The greatest logit's index, the lowest on a tie; -1 where confidence
    /// is NaN. For greedy hosts; others sample the row themselves.
    pub token: i32,
    /// In [0, 1]. NaN when a logit is NaN or +Inf, or all are -Inf, and for GONE
    /// and PENDING. -Inf beside other logits is a mask, and fine.
    pub confidence: f32,
    /// 1: an involuntary exit or an involuntary stay. A row is not asked, and
    /// does not count, at a ramp that the rule of DREX_POLICY_AUTO passes by and
    /// where its window ends only because pending rows wait there.
    pub forced: u32,
}

/// The input of drex_complete().
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_completion {
    /// sizeof(drex_completion)
    pub size: u32,
    /// 0
    pub reserved: u32,
    /// Now, in ns; when the step's tokens were emitted.
    pub now_ns: u64,
    /// Time that the window took on the device, in ns; 0: unknown, and
    /// nothing is learned from it, nor from more than 1e15 (eleven days).
    pub duration_ns: u64,
    /// KV cells that the decode rows attended over, summed, without those of
    /// prompt rows; what a cell costs is learned from it. 0: unknown, and then the
    /// cells' share is taken for the rows'. Give it always or never.
    pub n_kv: u64,
}

/// A timing of a pass that drex did not plan: calibration, full passes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_observation {
    /// sizeof(drex_observation)
    pub size: u32,
    /// Decode rows; at least 1 where n_prompt_rows is 0.
    pub n_rows: u32,
    /// The pass's first layer.
    pub layer_begin: u32,
    /// Above layer_begin, at most n_layers.
    pub layer_end: u32,
    /// At least 1; nothing is learned from more than 1e15 (eleven days).
    pub duration_ns: u64,
    /// As drex_completion.n_kv.
    pub n_kv: u64,
    /// Prompt rows beside them.
    /// Since 0.2.
    pub n_prompt_rows: u32,
    /// 0
    /// Since 0.2.
    pub reserved: u32,
}

/// Totals since drex_create(), and some current values.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_stats {
    /// sizeof(drex_stats), set by the caller
    pub size: u32,
    /// The engine's; the entries of the arrays beyond it are 0.
    pub n_ramps: u32,
    /// Rows that emitted a token, at a ramp or at the end. With
    /// DREX_FILL_VERIFY a draft counts when it is accepted or replaced.
    pub tokens: u64,
    /// Rows that left at each ramp. With DREX_FILL_VERIFY they are drafts, and
    /// count here also where they were replaced or dropped later, so there may
    /// be more of them than tokens.
    pub exits: [u64; DREX_MAX_RAMPS],
    /// Of the exits, those below the row's threshold; see drex_policy.
    pub involuntary_exits: u64,
    /// Rows that were confident at a ramp and went on.
    pub involuntary_stays: u64,
    /// Completed steps by reason; DREX_FLUSH_NONE counts those that were no
    /// flush, so that all sum to `steps`. From DREX_FLUSH_REASONS on 0, as
    /// far as this version goes; so are `misses` from DREX_MISS_REASONS on.
    pub flushes: [u64; DREX_MAX_FLUSH_REASONS],
    /// Rows in the rebatching buffer now, without those of the planned step.
    pub held_rows: u64,
    /// Of these, at each ramp.
    pub held_rows_at: [u64; DREX_MAX_RAMPS],
    /// The most rows that were held at one time.
    pub held_rows_max: u64,
    /// Requests alive now.
    pub requests: u64,
    /// Arena rows free now.
    pub slots_free: u64,
    /// Cells whose skipped layers drex_fill() filled.
    pub cells_filled: u64,
    /// Bytes that it wrote for them.
    pub bytes_filled: u64,
    /// Tokens that came later than their deadline.
    pub deadline_misses: u64,
    /// Rows at a ramp whose confidence was NaN.
    pub nonfinite_rows: u64,
    /// Completed steps.
    pub steps: u64,
    /// Their rows, those of requests that went away included.
    pub step_rows: u64,
    /// Held times: bucket 0 counts those under 1 us, bucket i those in
    /// [2^(i-1), 2^i) us, the last one all that are longer.
    pub wait_us_buckets: [u64; DREX_WAIT_BUCKETS],
    /// Held times, each in whole us, summed.
    pub wait_us_sum: u64,
    /// c/t_d at the first ramp for the last batch's rows, as pinned or as
    /// measured; NaN when unknown.
    pub art_ratio: f64,
    /// Deadline misses by where most of the token's time went: DREX_MISS_*.
    pub misses: [u64; DREX_MAX_MISS_REASONS],
    /// AUTO: searches for a better rule so far.
    pub searches: u64,
    /// AUTO: the ramps that the present rule looks at, bit r for ramp r; 0:
    /// no early exit.
    pub rule_ramps: u32,
    /// AUTO: held rows at a ramp that flush.
    pub rule_hold_rows: u32,
    /// AUTO: ready rows below which held ones are flushed.
    pub rule_ready_rows: u32,
    /// 0
    pub reserved: u32,
    /// AUTO: tokens per second that the last search predicted for its rule.
    pub predicted_tokens_per_s: f64,
    /// AUTO: tokens per second that it predicted for full passes.
    pub predicted_off_tokens_per_s: f64,
    /// Measured share of rows that are confident at each ramp, of those
    /// scored there that were scored nowhere before; NaN before the first.
    pub exit_share: [f64; DREX_MAX_RAMPS],
    /// Pending rows now.
    pub pending_rows: u64,
    /// Pending rows whose skipped layers were computed.
    pub rows_filled: u64,
    /// VERIFY: drafts that were accepted or replaced.
    pub drafts: u64,
    /// Of these, accepted.
    pub drafts_accepted: u64,
    /// VERIFY: rows that followed a draft that was replaced or was the last.
    pub rows_dropped: u64,
    /// Prompt rows of completed steps. One that a window leaves at a ramp counts
    /// in each of its windows.
    /// Since 0.2.
    pub prompt_rows: u64,
    /// Completed steps with prompt rows.
    /// Since 0.2.
    pub prompt_steps: u64,
}

/// A block table entry without a page.
pub const DREX_NO_PAGE: u32 = u32::MAX;

/// An account of a pool of K/V pages. Opaque, and not an address. Made by
/// drex_pages_create(), ended by drex_pages_destroy(). A destroyed handle gives
/// DREX_ERROR_INVALID_HANDLE.
pub struct drex_pages {
    _opaque: [u8; 0],
}

/// For drex_pages_create().
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_pages_config {
    /// sizeof(drex_pages_config)
    pub size: u32,
    /// Layers of the model, 1 to 65536.
    pub n_layers: u32,
    /// Cells of a page, 1 to 65536. A page holds K and V of one layer.
    pub page_tokens: u32,
    /// Pages of the pool, numbered from 0; at most 67108864. Any layer can use
    /// any of them.
    pub n_pages: u32,
}

/// Cells [first_cell, first_cell + n_cells) of a page, K and V, to the same
/// cells of another.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct drex_page_copy {
    /// The page that is read.
    pub from: u32,
    /// The page that is written, another one.
    pub to: u32,
    /// Below page_tokens.
    pub first_cell: u32,
    /// At least 1.
    pub n_cells: u32,
}

/// For drex_pages_stats_get().
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct drex_pages_stats {
    /// sizeof(drex_pages_stats), set by the caller
    pub size: u32,
    /// 0
    pub reserved: u32,
    /// Pages that some entry points to.
    pub pages_used: u64,
    /// All others.
    pub pages_free: u64,
    /// Block table entries that point to a page.
    pub references: u64,
    /// Pages that sharing saves: references - pages_used.
    pub pages_saved: u64,
    /// Cells of one layer that were copied so far.
    pub cells_copied: u64,
    /// Cells of skipped layers that needed no copy.
    pub cells_aliased: u64,
}

const _: () = {
    assert!(DREX_POLICY_AUTO == Policy::Auto as u32 && Policy::ALL.len() == 9);
    assert!(DREX_METRIC_ENTROPY == Metric::Entropy as u32 && Metric::ALL.len() == 3);
    assert!(DREX_FILL_PROPAGATE == Fill::Propagate as u32 && Fill::ALL.len() == 4);
    assert!(DREX_DECISION_DROP == Decision::Drop as u32 && Decision::ALL.len() == 8);
    assert!(DREX_FLUSH_PROMPT == Reason::Prompt as u32);
    assert!(DREX_MISS_RUN == Miss::Run as u32);
    assert!(DREX_NO_PAGE == crate::core::pages::NO_PAGE);
    assert!(DREX_MAX_RAMPS == crate::core::MAX_RAMPS);
    assert!(DREX_WAIT_BUCKETS == WAIT_BUCKETS);
    assert!(DREX_FLUSH_REASONS == REASONS && REASONS <= DREX_MAX_FLUSH_REASONS);
    assert!(DREX_MISS_REASONS == MISSES && MISSES <= DREX_MAX_MISS_REASONS);
    assert!(DREX_NO_RAMP == crate::core::NONE && DREX_NO_SLOT == crate::core::NONE);
};
