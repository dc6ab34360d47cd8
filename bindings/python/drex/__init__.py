# SPDX-License-Identifier: Apache-2.0
"""Early exit with dynamic rebatching, for engines that are prototyped in Python.

A thin layer over libdrex's C ABI: `drex.h` says what each call means, here it is only said what differs. Arrays are
numpy arrays or anything else with `__array_interface__` or a writable buffer; nothing is copied that C does not copy.
Times are in nanoseconds. A call that fails raises `drex.Error` and has changed nothing.
"""

import ctypes as c
import json
import math
from typing import List, NamedTuple, Optional

from . import _abi
from ._abi import DECISIONS, FILLS, LOG_LEVELS, METRICS, POLICIES, lib

__all__ = ["Engine", "Error", "Judgement", "Pages", "PageCopy", "Row", "Step", "Verdict", "abi_version", "speculate", "version"]


class Error(Exception):
    """`status`: the number, `name`: the header's name for it, `text`: what was wrong, with the field and the value."""

    def __init__(self, status, text):
        name = lib.drex_status_name(status).decode()
        super().__init__(f"{text} ({name})")
        self.status, self.name, self.text = status, name, text


class Row(NamedTuple):
    request: int
    slot: int
    back: int


class Step(NamedTuple):
    layer_begin: int
    layer_end: int
    ramp: Optional[int]  # None: the window ends at the last layer
    reason: str
    rows: List[Row]
    n_prompt_rows: int = 0  # prompt rows that run along


class Verdict(NamedTuple):
    decision: str
    token: int
    confidence: float
    forced: bool


class Judgement(NamedTuple):
    decision: str


class PageCopy(NamedTuple):
    source: int
    target: int
    first_cell: int
    n_cells: int


def version():
    return lib.drex_version().decode()


def abi_version():
    return lib.drex_abi_version()


def _check(status):
    if status != 0:
        raise Error(status, lib.drex_last_error().decode())


class _Owner:
    """Owns a handle, until it is closed."""

    _raw = None
    _name = "object"

    @property
    def _handle(self):
        if self._raw is None:
            raise Error(_abi.CONSTANTS["DREX_ERROR_INVALID_HANDLE"], f"the {self._name} is closed")
        return self._raw

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _index(names, value, what):
    """A number as it is, a name as its number."""
    if isinstance(value, str):
        if value not in names:
            raise ValueError(f"{what} {value!r} is unknown; expected one of {', '.join(names)}")
        return names.index(value)
    return value


def _unsigned(value, what, bits=32):
    """ctypes would cut what does not fit."""
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{what} is {value}; expected 0 to 2^{bits} - 1")
    return value


class _View:
    """Address, shape, byte strides and element type (a letter and a size, such as "f4") of an array that stays the caller's.
    `what` it is, for errors."""

    def __init__(self, array, what, writable=False):
        self.owner, self.what = array, what
        interface = getattr(array, "__array_interface__", None)
        if interface is not None:
            self.address, read_only = interface["data"]
            self.shape, self.type = tuple(interface["shape"]), interface["typestr"][1:]
            if interface["typestr"][0] == ">":
                raise ValueError(f"{what}: the array is big-endian")
            strides = interface.get("strides")
        else:
            try:
                view = memoryview(array)
            except TypeError:
                raise TypeError(
                    f"{what}: a {type(array).__name__} is no array; expected one of numpy, or a writable buffer such as array.array"
                ) from None
            read_only = view.readonly
            if read_only and view.nbytes:
                raise ValueError(f"{what}: a buffer without __array_interface__ must be writable, for its address to be known")
            self.address = c.addressof(c.c_char.from_buffer(array)) if view.nbytes else 0
            self.shape, strides = view.shape, view.strides
            letter = {"f": "f", "d": "f", "e": "f"}.get(view.format, "i" if view.format in "bhilq" else "u")
            self.type = f"{letter}{view.itemsize}"
        if writable and read_only:
            raise ValueError(f"{what}: the array is read-only")
        self.item = int(self.type[1:])
        if strides is None:
            strides, step = [], self.item
            for n in reversed(self.shape):
                strides.insert(0, step)
                step *= n
        self.strides = tuple(strides)
        if any(s < 0 for s in self.strides):
            raise ValueError(f"{what}: the array has negative strides")

    def inner_bytes(self):
        """Bytes of one entry of the first dimension, which must lie together."""
        step = self.item
        for n, stride in zip(reversed(self.shape[1:]), reversed(self.strides[1:])):
            if stride != step and n > 1:
                raise ValueError(f"{self.what}: the array's rows must be contiguous")
            step *= n
        return step


def _uints(values, ctype, bits=32, what="a value"):
    """A C array of numbers from a sequence or a numpy array."""
    values = [_unsigned(int(v), what, bits) for v in values]
    return (ctype * len(values))(*values)


def _plain(struct):
    """A struct's fields as a dict, arrays as lists, without its size."""
    out = {}
    for name, kind in struct._fields_:
        if name not in ("size", "reserved"):
            value = getattr(struct, name)
            out[name] = list(value) if issubclass(kind, c.Array) else value
    return out


class Engine(_Owner):
    """The scheduler of one model. Closed by close(), by leaving a `with`, or when it is collected.

    Keywords are the fields of drex_config; `policy`, `metric` and `fill` may be names. `ramp_layers` and
    `ramp_thresholds` are sequences. `max_requests` and `max_batch` are `n_slots` where they are not given.
    """

    _name = "engine"

    def __init__(self, *, n_layers, ramp_layers, n_slots, max_requests=None, max_batch=None, policy="auto", metric="gap",
                 fill="copy", ramp_thresholds=None, **fields):  # fmt: skip
        ramps = _uints(ramp_layers, _abi.u32, what="ramp_layers")
        known = {name for name, _ in _abi.drex_config._fields_}
        unknown = [name for name in fields if name not in known]
        if unknown:
            raise TypeError(f"drex_config has no field {unknown[0]!r}")
        for name, kind in _abi.drex_config._fields_:
            if name in fields and kind in (_abi.u32, _abi.u64):
                _unsigned(fields[name], name, 8 * c.sizeof(kind))
        config = _abi.drex_config(**fields)
        config.n_layers, config.n_ramps = _unsigned(n_layers, "n_layers"), len(ramps)
        config.ramp_layers = ramps
        config.n_slots = _unsigned(n_slots, "n_slots")
        config.max_requests = _unsigned(n_slots if max_requests is None else max_requests, "max_requests")
        config.max_batch = _unsigned(n_slots if max_batch is None else max_batch, "max_batch")
        config.policy = _index(POLICIES, policy, "policy")
        config.metric = _index(METRICS, metric, "metric")
        config.fill = _index(FILLS, fill, "fill")
        if ramp_thresholds is not None:
            if len(ramp_thresholds) != len(ramps):
                raise ValueError(f"{len(ramp_thresholds)} ramp_thresholds for {len(ramps)} ramps")
            config.ramp_thresholds = (_abi.f32 * len(ramps))(*ramp_thresholds)
        handle = c.c_void_p()
        _check(lib.drex_create(config, handle))
        self._raw = handle
        self._capacity, self._n_slots = config.max_batch, config.n_slots
        self._rows = (_abi.drex_row * self._capacity)()
        self._verdicts = (_abi.drex_verdict * self._capacity)()
        self._decisions = (_abi.u32 * self._capacity)()
        self._n_rows = 0
        self._kv = self._log = None

    def close(self):
        """Ends the engine. The arrays that were bound are free again."""
        if self._raw is not None:
            _check(lib.drex_destroy(self._raw))
            self._raw = self._kv = None

    def __del__(self):
        if self._raw is not None:
            lib.drex_destroy(self._raw)

    def bind_kv(self, k, v, v_transposed=False):
        """k, v: an array per layer, writable, [n_cells, ...] with the bytes of a cell together; v_transposed: v is
        [elements, n_cells]. They are kept until others are bound or the engine is closed. None, None: unbinds."""
        if k is None and v is None:
            _check(lib.drex_bind_kv(self._handle, None, 0))
            self._kv = None
            return
        if len(k) != len(v):
            raise ValueError(f"K of {len(k)} layers, V of {len(v)}")
        layers, keep = (_abi.drex_kv_layer * len(k))(), []
        for i, (k_array, v_array) in enumerate(zip(k, v)):
            k_view, v_view = _View(k_array, f"K of layer {i}", writable=True), _View(v_array, f"V of layer {i}", writable=True)
            n_cells = k_view.shape[0]
            if v_view.shape[-1 if v_transposed else 0] != n_cells:
                raise ValueError(f"layer {i}: K has {n_cells} cells, V is {v_view.shape}")
            layer = _abi.drex_kv_layer(
                n_cells=n_cells, k=k_view.address, v=v_view.address, k_row_bytes=k_view.inner_bytes(), k_cell_stride=k_view.strides[0]
            )
            if v_transposed:
                if len(v_view.shape) != 2 or v_view.strides[1] != v_view.item:
                    raise ValueError(f"layer {i}: a transposed V is [elements, n_cells], with the cells together")
                layer.v_row_bytes, layer.v_elem_bytes = v_view.shape[0] * v_view.item, v_view.item
                layer.v_elem_stride = v_view.strides[0]
            else:
                layer.v_row_bytes, layer.v_cell_stride = v_view.inner_bytes(), v_view.strides[0]
            layers[i] = layer
            keep += [k_view, v_view]
        _check(lib.drex_bind_kv(self._handle, layers, len(layers)))
        self._kv = keep

    def add(self, request, *, metric=None, threshold=None, fill=None, priority=0, token_deadline_ns=0, request_deadline_ns=0,
            max_tokens=0, quality=0.0):  # fmt: skip
        config = _abi.drex_request_config(id=_unsigned(request, "request", 64), priority=priority)
        config.token_deadline_ns = _unsigned(token_deadline_ns, "token_deadline_ns", 64)
        config.request_deadline_ns = _unsigned(request_deadline_ns, "request_deadline_ns", 64)
        config.max_tokens = _unsigned(max_tokens, "max_tokens", 64)
        config.quality = quality
        if metric is not None:
            config.metric = _index(METRICS, metric, "metric")
        if threshold is not None:
            config.threshold = threshold
        if fill is not None:
            config.fill = _index(FILLS, fill, "fill")
        _check(lib.drex_request_add(self._handle, config))

    def ready(self, request, now_ns):
        _check(lib.drex_request_ready(self._handle, _unsigned(request, "request", 64), 0, _unsigned(now_ns, "now_ns", 64)))

    def remove(self, request):
        _check(lib.drex_request_remove(self._handle, _unsigned(request, "request", 64)))

    def info(self, request):
        """drex_request_info as a dict; `state` and `fill` are names, `audit_due` is a bool, `ramp` and `slot` are None where there is none."""
        info = _abi.drex_request_info()
        _check(lib.drex_request_get(self._handle, _unsigned(request, "request", 64), info))
        out = _plain(info)
        out["state"] = _abi.STATES[info.state]
        out["fill"] = FILLS[info.fill]
        out["audit_due"] = bool(info.audit_due)
        for name in ("ramp", "slot"):
            out[name] = None if out[name] == _abi.UINT32_MAX else out[name]
        return out

    def settle(self, request, now_ns):
        """Returns how many pending rows there are."""
        pending = _abi.u32()
        _check(lib.drex_request_settle(self._handle, _unsigned(request, "request", 64), _unsigned(now_ns, "now_ns", 64), pending))
        return pending.value

    def audit(self, request, n_tokens, n_differing):
        """How much of an answer the full model would have chosen otherwise, where info()["audit_due"]."""
        numbers = (_unsigned(n_tokens, "n_tokens", 64), _unsigned(n_differing, "n_differing", 64))
        _check(lib.drex_request_audit(self._handle, _unsigned(request, "request", 64), *numbers))

    def plan(self, now_ns, capacity=None, n_prompt_rows=0):
        """The next Step, or None when there is nothing to run. n_prompt_rows: prompt rows that wait at layer 0."""
        given = _abi.drex_plan_input(now_ns=_unsigned(now_ns, "now_ns", 64), n_prompt_rows=_unsigned(n_prompt_rows, "n_prompt_rows"))
        step = _abi.drex_step()
        capacity = self._capacity if capacity is None else min(_unsigned(capacity, "capacity"), self._capacity)
        _check(lib.drex_plan(self._handle, given, self._rows, capacity, step))
        self._n_rows = step.n_rows
        if step.n_rows == 0 and step.n_prompt_rows == 0:
            return None
        rows = [Row(r.request, r.slot, r.back) for r in self._rows[: step.n_rows]]
        ramp = None if step.ramp == _abi.DREX_NO_RAMP else step.ramp
        return Step(step.layer_begin, step.layer_end, ramp, _abi.REASONS[step.reason], rows, step.n_prompt_rows)

    def ramp(self, logits, cells=None, dtype=None, n_top=0):
        """logits: [n_rows, n_vocab] of f4 or f2, or of u2 with dtype="bf16". Returns a Verdict for each row. n_top: how many of
        each row's greatest logits top() will know, at most the engine's."""
        view = _View(logits, "logits")
        if len(view.shape) != 2:
            raise ValueError(f"logits have {len(view.shape)} dimensions; expected [n_rows, n_vocab]")
        kind = {"f4": "f32", "f2": "f16"}.get(view.type) if dtype is None else dtype
        if kind not in _abi.DTYPES or view.item != (4 if kind == "f32" else 2):
            raise ValueError(f"logits of type {view.type}; expected f4, f2, or u2 with dtype='bf16'")
        n_rows, n_vocab = view.shape
        if n_vocab and view.strides[1] != view.item and n_vocab > 1:
            raise ValueError("the logits of a row must be contiguous")
        given = _abi.drex_logits(dtype=_abi.DTYPES.index(kind), data=view.address, row_stride_bytes=view.strides[0], n_rows=n_rows, n_vocab=n_vocab)
        given.n_top = _unsigned(n_top, "n_top")
        if cells is not None:
            cells = _uints(cells, _abi.u32, what="a cell")
            if len(cells) != n_rows:
                raise ValueError(f"{len(cells)} cells for {n_rows} rows")
        _check(lib.drex_ramp(self._handle, given, cells, self._verdicts, self._capacity))
        return [Verdict(DECISIONS[v.decision], v.token, v.confidence, bool(v.forced)) for v in self._verdicts[:n_rows]]

    def top(self, row, capacity=_abi.DREX_MAX_TOP):
        """The greatest logits of a row of the last ramp(), as (token, logit), the greatest first."""
        top, count = (_abi.drex_top * _unsigned(capacity, "capacity"))(), _abi.u32()
        _check(lib.drex_top_get(self._handle, _unsigned(row, "row"), top, capacity, count))
        return [(t.token, t.logit) for t in top[: count.value]]

    def _moved(self, function, arena, dense, writes):
        views = [_View(a, what, writable=a is writes) for a, what in ((arena, "arena"), (dense, "dense"))]
        sizes = [view.inner_bytes() for view in views]
        if sizes[0] != sizes[1]:
            raise ValueError(f"a row of the arena has {sizes[0]} bytes, one of the batch {sizes[1]}")
        if views[0].shape[0] < self._n_slots or views[1].shape[0] < self._n_rows:
            raise ValueError(f"an arena of {views[0].shape[0]} rows and a batch of {views[1].shape[0]}; expected {self._n_slots} and {self._n_rows}")
        given = _abi.drex_arena(arena=views[0].address, dense=views[1].address, row_bytes=sizes[0])
        given.arena_stride_bytes, given.dense_stride_bytes = views[0].strides[0], views[1].strides[0]
        _check(function(self._handle, given))

    def gather(self, arena, dense):
        """arena [n_slots, ...] to dense [n_rows, ...], the planned step's rows in their order."""
        self._moved(lib.drex_gather, arena, dense, dense)

    def scatter(self, arena, dense):
        self._moved(lib.drex_scatter, arena, dense, arena)

    def fill(self):
        _check(lib.drex_fill(self._handle))

    def verify(self, agrees):
        """agrees: for each row 1, 2 or 0, see drex_verify(). Returns a Judgement for each row."""
        agrees = _uints(agrees, _abi.u8, 8, "agrees")
        _check(lib.drex_verify(self._handle, agrees, len(agrees), self._decisions, self._capacity))
        return [Judgement(DECISIONS[d]) for d in self._decisions[: len(agrees)]]

    def complete(self, now_ns, duration_ns=0, n_kv=0):
        given = _abi.drex_completion(now_ns=_unsigned(now_ns, "now_ns", 64), n_kv=_unsigned(n_kv, "n_kv", 64))
        given.duration_ns = _unsigned(duration_ns, "duration_ns", 64)
        _check(lib.drex_complete(self._handle, given))

    def abandon(self):
        _check(lib.drex_abandon(self._handle))

    def observe(self, n_rows, layer_begin, layer_end, duration_ns, n_kv=0, n_prompt_rows=0):
        given = _abi.drex_observation(n_rows=_unsigned(n_rows, "n_rows"), layer_begin=_unsigned(layer_begin, "layer_begin"))
        given.layer_end = _unsigned(layer_end, "layer_end")
        given.n_prompt_rows = _unsigned(n_prompt_rows, "n_prompt_rows")
        given.duration_ns, given.n_kv = _unsigned(duration_ns, "duration_ns", 64), _unsigned(n_kv, "n_kv", 64)
        _check(lib.drex_observe(self._handle, given))

    def replan(self, max_windows=0):
        """True: no search is under way any more."""
        done = _abi.u32()
        _check(lib.drex_replan(self._handle, _unsigned(max_windows, "max_windows"), done))
        return bool(done.value)

    def _text(self, function, *arguments):
        """What a function writes that is asked for the length first."""
        length = _abi.size_t()
        _check(function(self._handle, *arguments, None, 0, length))
        text = c.create_string_buffer(length.value + 1)
        _check(function(self._handle, *arguments, text, len(text), length))
        return text.value.decode()

    def save_profile(self):
        """What was learned of costs, as JSON text."""
        return self._text(lib.drex_profile_save)

    def load_profile(self, text):
        if "\0" in text:
            raise ValueError("a profile has no 0 bytes")
        _check(lib.drex_profile_load(self._handle, text.encode()))

    def stats(self):
        """drex_stats as a dict. Arrays by ramp have an entry for each ramp; `flushes` and `misses` go by name."""
        stats = _abi.drex_stats()
        _check(lib.drex_stats_get(self._handle, stats))
        out = _plain(stats)
        for name in ("exits", "held_rows_at", "exit_share"):
            out[name] = out[name][: stats.n_ramps]
        out["flushes"] = dict(zip(_abi.REASONS, out["flushes"]))
        out["misses"] = dict(zip(_abi.MISSES, out["misses"]))
        return out

    def snapshot(self):
        """Counters, queues, held rows and the scheduler's estimates as a dict; what is not known is None."""
        return json.loads(self._text(lib.drex_snapshot))

    def metrics_text(self, **labels):
        """Prometheus' text, with these labels on every sample."""
        escape = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})
        pairs = ",".join(f'{name}="{str(value).translate(escape)}"' for name, value in labels.items())
        if "\0" in pairs:
            raise ValueError("a label has no 0 bytes")
        return self._text(lib.drex_metrics_text, pairs.encode())

    def log(self, callback, level="info"):
        """Calls `callback(level, text)` for each event up to `level`; None ends it. Its exceptions are printed and dropped."""

        def note(_, level, text):
            callback(LOG_LEVELS[level], text.decode())

        # Ones before may be called during this call, and their memory is freed after it.
        new = _abi.drex_log_callback(note) if callback is not None else _abi.drex_log_callback()
        _check(lib.drex_log_set(self._handle, new, None, _index(LOG_LEVELS, level, "level")))
        self._log = new

    def trace_start(self, max_events=1 << 20):
        """Records what happens from now on; the oldest events go when there are more."""
        _check(lib.drex_trace_start(self._handle, _unsigned(max_events, "max_events")))

    def trace(self):
        """What was recorded, as Chrome's JSON text, for ui.perfetto.dev."""
        parts = []
        sink = _abi.drex_trace_sink(lambda _, address, n: parts.append(c.string_at(address, n)))
        _check(lib.drex_trace_write(self._handle, sink, None))
        return b"".join(parts).decode()

    def trace_stop(self):
        _check(lib.drex_trace_stop(self._handle))


class Pages(_Owner):
    """Accounts for a pool of K/V pages (chapter 6 of the header). Tables are writable arrays of u4, [n_layers, n_blocks]."""

    _name = "pool of pages"

    def __init__(self, *, n_layers, page_tokens, n_pages):
        config = _abi.drex_pages_config(n_layers=_unsigned(n_layers, "n_layers"), page_tokens=_unsigned(page_tokens, "page_tokens"))
        config.n_pages = _unsigned(n_pages, "n_pages")
        handle = c.c_void_p()
        _check(lib.drex_pages_create(config, handle))
        self._raw, self._n_layers = handle, n_layers
        self._copies = (_abi.drex_page_copy * (2 * n_layers))()

    def close(self):
        if self._raw is not None:
            _check(lib.drex_pages_destroy(self._raw))
            self._raw = None

    def __del__(self):
        if self._raw is not None:
            lib.drex_pages_destroy(self._raw)

    def _table(self, table):
        view = _View(table, "table", writable=True)
        if view.type not in ("u4", "i4") or len(view.shape) != 2 or view.shape[0] != self._n_layers:
            raise ValueError(f"a table of {view.type}, {view.shape}; expected u4, [{self._n_layers}, n_blocks]")
        if view.inner_bytes() != view.strides[0]:
            raise ValueError("the table must be contiguous")
        return c.cast(view.address, _abi._table), view.shape[1]

    def _copied(self, count):
        return [PageCopy(getattr(p, "from"), p.to, p.first_cell, p.n_cells) for p in self._copies[: count.value]]

    def write(self, table, pos, layer_begin, layer_end):
        """Returns what to copy before the window runs."""
        address, n_blocks = self._table(table)
        count = _abi.u32()
        _check(lib.drex_pages_write(self._handle, address, n_blocks, _unsigned(pos, "pos", 64), _unsigned(layer_begin, "layer_begin"),
                                    _unsigned(layer_end, "layer_end"), self._copies, len(self._copies), count))  # fmt: skip
        return self._copied(count)

    def exit(self, table, pos, exit_layer):
        """Returns what to copy now."""
        address, n_blocks = self._table(table)
        count = _abi.u32()
        _check(lib.drex_pages_exit(self._handle, address, n_blocks, _unsigned(pos, "pos", 64), _unsigned(exit_layer, "exit_layer"),
                                   self._copies, len(self._copies), count))  # fmt: skip
        return self._copied(count)

    def fork(self, table, first_block, count):
        address, n_blocks = self._table(table)
        _check(lib.drex_pages_fork(self._handle, address, n_blocks, _unsigned(first_block, "first_block"), _unsigned(count, "count")))

    def release(self, table, first_block, count):
        address, n_blocks = self._table(table)
        _check(lib.drex_pages_release(self._handle, address, n_blocks, _unsigned(first_block, "first_block"), _unsigned(count, "count")))

    def stats(self):
        stats = _abi.drex_pages_stats()
        _check(lib.drex_pages_stats_get(self._handle, stats))
        return _plain(stats)


def speculate(deep, draft, draft_token, u, v):
    """Keeps or replaces a token drawn from `draft` (None: certain) so that the result is distributed as `deep`."""
    views = [None if a is None else _View(a, what) for a, what in ((deep, "deep"), (draft, "draft"))]
    for view in views:
        if view is not None and (view.type != "f4" or len(view.shape) != 1 or view.inner_bytes() != view.strides[0]):
            raise ValueError("probabilities must be a contiguous vector of f4")
    if views[1] is not None and views[1].shape != views[0].shape:
        raise ValueError(f"deep has {views[0].shape[0]} entries, draft {views[1].shape[0]}")
    pointers = [None if view is None else c.cast(view.address, c.POINTER(_abi.f32)) for view in views]
    if not (math.isfinite(u) and math.isfinite(v)):
        raise ValueError("u and v must be numbers in [0, 1)")
    token = _abi.i32()
    _check(lib.drex_speculate(*pointers, views[0].shape[0], draft_token, u, v, token))
    return token.value
