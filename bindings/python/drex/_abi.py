# SPDX-License-Identifier: Apache-2.0
"""drex.h for ctypes: structs, constants, prototypes, and where the library is. Names are the header's."""

import ctypes as c
import os
from math import nan
from pathlib import Path

u8, u32, u64, i32, f32, f64 = c.c_uint8, c.c_uint32, c.c_uint64, c.c_int32, c.c_float, c.c_double
size_t, text, void = c.c_size_t, c.c_char_p, c.c_void_p
P = c.POINTER

UINT32_MAX = 0xFFFFFFFF
DREX_ABI_VERSION = 1
DREX_MAX_RAMPS = 16
DREX_NO_RAMP = UINT32_MAX
DREX_NO_SLOT = UINT32_MAX
DREX_NO_PAGE = UINT32_MAX
DREX_WAIT_BUCKETS = 32
DREX_MISS_REASONS = 4
DREX_MAX_MISS_REASONS = 8
DREX_FLUSH_REASONS = 7
DREX_MAX_FLUSH_REASONS = 16

STATUSES = (
    "OK NULL_ARGUMENT INVALID_ARGUMENT ABI_MISMATCH STRUCT_SIZE INVALID_HANDLE HANDLE_BUSY UNKNOWN_REQUEST "
    "DUPLICATE_REQUEST CALL_ORDER CAPACITY UNSUPPORTED DEVICE PANIC MEMORY"
).split()
POLICIES = "off eager lazy median mean latency hold art auto".split()
METRICS = "gap maxprob entropy".split()
FILLS = "copy postfill verify propagate".split()
STATES = "idle ready running held".split()
REASONS = "none fill age deadline idle stay prompt".split()
MISSES = "host queue held run".split()
DECISIONS = "exit hold stay gone pending accept replace drop".split()
DTYPES = "f32 f16 bf16".split()
DREX_METRIC_DEFAULT = UINT32_MAX
DREX_FILL_DEFAULT = UINT32_MAX
DREX_DEVICE_HOST = 0
DREX_DEVICE_CUDA = 1
DREX_MAX_TOP = 64
LOG_LEVELS = "off error warn info debug trace".split()


def _constants():
    """The lists above as the header's names."""
    out = {"DREX_OK": 0}
    for i, name in enumerate(STATUSES[1:], 1):
        out["DREX_ERROR_" + name] = i
    groups = dict(POLICY=POLICIES, METRIC=METRICS, FILL=FILLS, REQUEST=STATES, FLUSH=REASONS, MISS=MISSES, DECISION=DECISIONS, DTYPE=DTYPES, LOG=LOG_LEVELS)
    for group, names in groups.items():
        for i, name in enumerate(names):
            out[f"DREX_{group}_{name.upper()}"] = i
    out.update({name: value for name, value in globals().items() if name.startswith("DREX_")})
    return out


CONSTANTS = _constants()


class Struct(c.Structure):
    """Begins with its size and its defaults, as the header's INITIALIZER macros make it."""

    _defaults_ = {}

    def __init__(self, **fields):
        super().__init__()
        if self._fields_[0][0] == "size":
            self.size = c.sizeof(self)
        for name, value in {**self._defaults_, **fields}.items():
            setattr(self, name, value)


class drex_config(Struct):
    _fields_ = [
        ("size", u32), ("abi_version", u32), ("n_layers", u32), ("n_ramps", u32), ("ramp_layers", P(u32)),
        ("n_slots", u32), ("max_requests", u32), ("max_batch", u32), ("policy", u32), ("metric", u32), ("fill", u32),
        ("device", u32), ("threshold", f32), ("ramp_thresholds", P(f32)), ("flush_rows", u32), ("min_ready", u32),
        ("max_hold_ns", u64), ("token_deadline_ns", u64), ("art_ratio", f32), ("reserved", u32), ("seed", u64),
        ("max_pending", u32), ("n_vocab", u32), ("n_top", u32), ("max_pass_rows", u32), ("quality", f64),
    ]  # fmt: skip
    _defaults_ = {"abi_version": DREX_ABI_VERSION, "policy": POLICIES.index("auto"), "threshold": 0.7, "art_ratio": nan}


class drex_kv_layer(Struct):
    _fields_ = [
        ("size", u32), ("n_cells", u32), ("k", void), ("v", void), ("k_row_bytes", u64), ("k_cell_stride", u64),
        ("v_row_bytes", u64), ("v_cell_stride", u64), ("v_elem_bytes", u64), ("v_elem_stride", u64),
    ]  # fmt: skip


class drex_request_config(Struct):
    _fields_ = [
        ("size", u32), ("metric", u32), ("id", u64), ("threshold", f32), ("fill", u32), ("token_deadline_ns", u64),
        ("priority", i32), ("reserved", u32), ("request_deadline_ns", u64), ("max_tokens", u64),
        ("quality", f64),
    ]  # fmt: skip
    _defaults_ = {"metric": DREX_METRIC_DEFAULT, "threshold": nan, "fill": DREX_FILL_DEFAULT}


class drex_request_info(Struct):
    _fields_ = [
        ("size", u32), ("state", u32), ("ramp", u32), ("slot", u32), ("tokens", u64), ("exits", u64 * DREX_MAX_RAMPS),
        ("involuntary_exits", u64), ("involuntary_stays", u64), ("held_ns", u64), ("deadline_misses", u64),
        ("last_confidence", f32), ("n_pending", u32), ("fill", u32), ("audit_due", u32), ("quality", f64),
    ]  # fmt: skip


class drex_plan_input(Struct):
    _fields_ = [("size", u32), ("n_prompt_rows", u32), ("now_ns", u64)]


class drex_row(Struct):
    _fields_ = [("request", u64), ("slot", u32), ("back", u32)]


class drex_step(Struct):
    _fields_ = [
        ("size", u32), ("n_rows", u32), ("layer_begin", u32), ("layer_end", u32), ("ramp", u32), ("reason", u32),
        ("n_prompt_rows", u32),
    ]  # fmt: skip
    _defaults_ = {"ramp": DREX_NO_RAMP}


class drex_logits(Struct):
    _fields_ = [
        ("size", u32), ("dtype", u32), ("data", void), ("row_stride_bytes", u64), ("n_rows", u32), ("n_vocab", u32),
        ("stream", void), ("n_top", u32), ("enqueued", u32), ("confirm", void), ("confirm_data", void),
        ("token_ids", void), ("calibration", void),
    ]  # fmt: skip


class drex_calibration(Struct):
    _fields_ = [("scale", f32), ("shift", f32)]


class drex_verdict(Struct):
    _fields_ = [("decision", u32), ("token", i32), ("confidence", f32), ("forced", u32)]


class drex_top(Struct):
    _fields_ = [("logit", f32), ("token", i32)]


class drex_arena(Struct):
    _fields_ = [
        ("size", u32), ("reserved", u32), ("arena", void), ("dense", void), ("arena_stride_bytes", u64),
        ("dense_stride_bytes", u64), ("row_bytes", u64), ("stream", void),
    ]  # fmt: skip


class drex_completion(Struct):
    _fields_ = [("size", u32), ("reserved", u32), ("now_ns", u64), ("duration_ns", u64), ("n_kv", u64), ("tokens", void)]


class drex_observation(Struct):
    _fields_ = [
        ("size", u32), ("n_rows", u32), ("layer_begin", u32), ("layer_end", u32), ("duration_ns", u64), ("n_kv", u64),
        ("n_prompt_rows", u32), ("reserved", u32),
    ]  # fmt: skip


class drex_stats(Struct):
    _fields_ = [
        ("size", u32), ("n_ramps", u32), ("tokens", u64), ("exits", u64 * DREX_MAX_RAMPS), ("involuntary_exits", u64),
        ("involuntary_stays", u64), ("flushes", u64 * DREX_MAX_FLUSH_REASONS), ("held_rows", u64),
        ("held_rows_at", u64 * DREX_MAX_RAMPS), ("held_rows_max", u64), ("requests", u64), ("slots_free", u64),
        ("cells_filled", u64), ("bytes_filled", u64), ("deadline_misses", u64), ("nonfinite_rows", u64), ("steps", u64),
        ("step_rows", u64), ("wait_us_buckets", u64 * DREX_WAIT_BUCKETS), ("wait_us_sum", u64), ("art_ratio", f64),
        ("misses", u64 * DREX_MAX_MISS_REASONS), ("searches", u64), ("rule_ramps", u32), ("rule_hold_rows", u32),
        ("rule_ready_rows", u32), ("reserved", u32), ("predicted_tokens_per_s", f64),
        ("predicted_off_tokens_per_s", f64), ("exit_share", f64 * DREX_MAX_RAMPS), ("pending_rows", u64),
        ("rows_filled", u64), ("drafts", u64), ("drafts_accepted", u64), ("rows_dropped", u64), ("prompt_rows", u64), ("prompt_steps", u64),
        ("rule_survival", f32), ("rule_drafts", u32), ("agreement_target", f64), ("agreement", f64), ("agreement_low", f64),
        ("agreement_high", f64), ("agreement_threshold", f64), ("agreement_balance", f64), ("audits", u64),
        ("audited_tokens", u64), ("audited_differing", u64), ("audits_missed", u64),
    ]  # fmt: skip


class drex_pages_config(Struct):
    _fields_ = [("size", u32), ("n_layers", u32), ("page_tokens", u32), ("n_pages", u32)]


class drex_page_copy(Struct):
    _fields_ = [("from", u32), ("to", u32), ("first_cell", u32), ("n_cells", u32)]


class drex_pages_stats(Struct):
    _fields_ = [
        ("size", u32), ("reserved", u32), ("pages_used", u64), ("pages_free", u64), ("references", u64),
        ("pages_saved", u64), ("cells_copied", u64), ("cells_aliased", u64),
    ]  # fmt: skip


STRUCTS = [s for s in Struct.__subclasses__()]

# Each function's result, then its arguments. An engine and an account of pages are opaque pointers.
_engine = _pages = void
_table = P(u32)
drex_log_callback = c.CFUNCTYPE(None, void, u32, text)
drex_trace_sink = c.CFUNCTYPE(None, void, void, size_t)
FUNCTIONS = {
    "drex_version": (text,),
    "drex_abi_version": (u32,),
    "drex_status_name": (text, i32),
    "drex_status_text": (text, i32),
    "drex_last_error": (text,),
    "drex_policy_name": (text, u32),
    "drex_metric_name": (text, u32),
    "drex_policy_from_name": (i32, text, P(u32)),
    "drex_metric_from_name": (i32, text, P(u32)),
    "drex_fill_name": (text, u32),
    "drex_decision_name": (text, u32),
    "drex_flush_reason_name": (text, u32),
    "drex_miss_reason_name": (text, u32),
    "drex_fill_from_name": (i32, text, P(u32)),
    "drex_create": (i32, P(drex_config), P(void)),
    "drex_destroy": (i32, _engine),
    "drex_bind_kv": (i32, _engine, P(drex_kv_layer), u32),
    "drex_request_add": (i32, _engine, P(drex_request_config)),
    "drex_request_ready": (i32, _engine, u64, u32, u64),
    "drex_request_remove": (i32, _engine, u64),
    "drex_request_get": (i32, _engine, u64, P(drex_request_info)),
    "drex_request_settle": (i32, _engine, u64, u64, P(u32)),
    "drex_request_audit": (i32, _engine, u64, u64, u64),
    "drex_plan": (i32, _engine, P(drex_plan_input), P(drex_row), u32, P(drex_step)),
    "drex_ramp": (i32, _engine, P(drex_logits), P(u32), P(drex_verdict), u32),
    "drex_ramp_enqueue": (i32, _engine, P(drex_logits)),
    "drex_top_get": (i32, _engine, u32, P(drex_top), u32, P(u32)),
    "drex_gather": (i32, _engine, P(drex_arena)),
    "drex_scatter": (i32, _engine, P(drex_arena)),
    "drex_fill": (i32, _engine),
    "drex_fill_enqueue": (i32, _engine, void),
    "drex_fill_plan": (i32, _engine),
    "drex_verify": (i32, _engine, P(u8), u32, P(u32), u32),
    "drex_speculate": (i32, P(f32), P(f32), u32, i32, f64, f64, P(i32)),
    "drex_complete": (i32, _engine, P(drex_completion)),
    "drex_abandon": (i32, _engine),
    "drex_observe": (i32, _engine, P(drex_observation)),
    "drex_replan": (i32, _engine, u32, P(u32)),
    "drex_profile_save": (i32, _engine, void, size_t, P(size_t)),
    "drex_profile_load": (i32, _engine, text),
    "drex_stats_get": (i32, _engine, P(drex_stats)),
    "drex_log_set": (i32, _engine, drex_log_callback, void, u32),
    "drex_snapshot": (i32, _engine, void, size_t, P(size_t)),
    "drex_metrics_text": (i32, _engine, text, void, size_t, P(size_t)),
    "drex_trace_start": (i32, _engine, u32),
    "drex_trace_write": (i32, _engine, drex_trace_sink, void),
    "drex_trace_stop": (i32, _engine),
    "drex_pages_create": (i32, P(drex_pages_config), P(void)),
    "drex_pages_destroy": (i32, _pages),
    "drex_pages_write": (i32, _pages, _table, u32, u64, u32, u32, P(drex_page_copy), u32, P(u32)),
    "drex_pages_exit": (i32, _pages, _table, u32, u64, u32, P(drex_page_copy), u32, P(u32)),
    "drex_pages_fork": (i32, _pages, _table, u32, u32, u32),
    "drex_pages_release": (i32, _pages, _table, u32, u32, u32),
    "drex_pages_stats_get": (i32, _pages, P(drex_pages_stats)),
}


def _load():
    """DREX_LIBRARY, then beside this file, then what the loader finds."""
    soname = "libdrex.so.0"
    named, beside = os.environ.get("DREX_LIBRARY"), Path(__file__).with_name(soname)
    place = named or (str(beside) if beside.exists() else soname)
    try:
        library = c.CDLL(place)
    except OSError as error:
        raise ImportError(f"cannot load libdrex ({error}): install it, or set DREX_LIBRARY to the path of {soname}") from None
    for name, (result, *arguments) in FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise ImportError(f"{place} has no {name}: it is no libdrex, or one that is older than this package") from None
        function.restype, function.argtypes = result, arguments
    if library.drex_abi_version() != DREX_ABI_VERSION:
        raise ImportError(f"{place} has ABI version {library.drex_abi_version()}, this package speaks {DREX_ABI_VERSION}")
    return library


lib = _load()
