#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Puts what the steps of tools/gpu/run.sh left into one file, and prints a short table with the aims and what became of them.

    summary.py PARTS RESULTS.json [--dry-run] [--quiet]
"""

import datetime
import glob
import json
import os
import platform
import sys

SMALL, LARGE = 256e3, 8e6  # bytes that a fill moves


def number(value, digits=3):
    return "-" if value is None else f"{value:.{digits}f}"


def read_steps(parts):
    """The last note of each step, in the order in which they first came."""
    steps = {}
    try:
        with open(os.path.join(parts, "steps.txt")) as lines:
            for line in lines:
                name, seconds, status = line.rstrip("\n").split("\t", 2)
                steps[name] = {"name": name, "seconds": int(seconds), "status": status}
    except OSError:
        pass
    return steps


def read_machine(parts):
    try:
        with open(os.path.join(parts, "machine.txt")) as lines:
            pairs = [line.rstrip("\n").split(None, 1) for line in lines]
        return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
    except OSError:
        return {}


def aim(name, value, at_most=None, at_least=None):
    """One aim, and whether it was reached: None where nothing was measured."""
    bound = at_least if at_most is None else at_most
    met = None
    if value is not None:
        met = value <= at_most if at_most is not None else value >= at_least
    return {"name": name, "value": value, "at_most" if at_most is not None else "at_least": bound, "met": met}


def kernel_aims(part):
    rows = part["results"]
    fills = [r for r in rows if r["what"] == "fill" and r["cold"]]
    ramps = [r for r in rows if r["what"] == "ramp" and r["cold"] and r["shape"] == "32 x 128256 f32" and r["image"] == "drex"]
    pick = lambda values, how: how(values) if values else None
    return [
        aim("state-copy over 8 MB, share of a copy", pick([r["share_of_copy"] for r in fills if r["bytes"] > LARGE], min), at_least=0.85),
        aim("state-copy under 256 kB, us", pick([r["us"] for r in fills if r["bytes"] < SMALL], max), at_most=6.0),
        aim("ramp 32 x 128256 f32, share of a read", pick([r["share_of_read"] for r in ramps if r["share_of_read"]], min), at_least=0.80),
    ]


def cell_aims(name, cells):
    worst = lambda key, how: how([c[key] for c in cells if c.get(key) is not None], default=None)
    return [
        aim(f"{name}: c/t_d with head", worst("c_over_t_d_with_head", max), at_most=0.10),
        aim(f"{name}: c/t_d without head", worst("c_over_t_d_without_head", max), at_most=0.05),
        aim(f"{name}: of the limit, N = 2B", min([c["of_limit"] for c in cells if c["requests"] == 2 * c["batch"] and c["policy"] == "hold"],
                                              default=None), at_least=0.95),
        # What users get is `auto`; a cell that it was not measured in counts as `hold` has it.
        aim(f"{name}: over off", worst("over_off", min), at_least=0.99),
    ]


def print_kernels(part):
    print(f"\nkernels on {part.get('device')}: copy {part.get('copy_gb_per_s')} GB/s, read {number(part.get('read_gb_per_s'), 0)} GB/s")
    print("what     shape                                      us  graph us    GB/s  /copy  /read")
    for r in part["results"]:
        if r.get("brief"):
            print(f"{r['what']:8} {r['shape'] + (' ' + r['image'] if r['image'] != 'drex' else ''):38} {r['us']:7.2f} {number(r['graph_us'], 2):>9}"
                  f" {r['gb_per_s']:7.0f}  {r['share_of_copy']:5.3f}  {number(r['share_of_read'])}{'' if r['cold'] else '  (in cache)'}")


def print_cells(name, part):
    print(f"\n{name} on {part.get('device')}: split bit-identical {part.get('split_identical')}, CUDA graphs "
          f"{ {True: 'kept', False: 'LOST'}.get(part.get('cuda_graphs_ok'), 'not used') }, an arena takes {number(part.get('arena_mib'), 1)} MiB, "
          f"a row alone differs by {part.get('alone_max_difference')}")
    print("   B    N exit   t_f    t_s    t_d   head | c/t_d head  without |   p policy   tok/s    off   /off  /limit")
    for c in part["cells"]:
        flags = [text for text, on in (("loses", c["over_off"] < 0.99), ("COUNTS DIFFER", not c["counts_agree"]),
                                       (f"graphs reset {c['cuda_graphs_reset']:.0f}", c["cuda_graphs_reset"])) if on]
        print(f"{c['batch']:4} {c['requests']:4} {c['exit_layer']:4} {c['t_f_ms']:6.2f} {c['t_s_scored_ms']:6.2f} {c['t_d_ms']:6.2f} {c['t_head_ms']:6.3f} |"
              f" {number(c['c_over_t_d_with_head']):>10} {number(c['c_over_t_d_without_head']):>8} |"
              f" {c['p']:.1f} {c['policy']:5} {c['tokens_per_s']:7.0f} {c['off_tokens_per_s']:6.0f} {c['over_off']:6.3f} {c['of_limit']:7.3f}"
              f"  {', '.join(flags)}")


def main():
    parts_dir, path = sys.argv[1:3]
    dry, quiet = "--dry-run" in sys.argv[3:], "--quiet" in sys.argv[3:]
    steps = read_steps(parts_dir)
    parts = {}
    for name in sorted(glob.glob(os.path.join(parts_dir, "*.json"))):
        try:
            with open(name) as f:
                parts[os.path.basename(name)[:-5]] = json.load(f)
        except ValueError as error:
            steps[name] = {"name": f"read {os.path.basename(name)}", "seconds": 0, "status": f"failed: {error}"}
    machine = read_machine(parts_dir)
    aims = []
    for name, part in parts.items():
        if name == "kernels":
            aims += kernel_aims(part)
        elif part.get("cells"):
            aims += cell_aims(name, part["cells"])
    steps = list(steps.values())
    ok = bool(steps) and all(step["status"] == "ok" for step in steps)
    result = {
        "what": "dry run on a CPU: the figures mean nothing" if dry else "measured on a GPU",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine,
        "cpu": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
        "ok": ok,
        "aims": aims,
        "steps": steps,
        "results": parts,
    }
    temp = f"{path}.{os.getpid()}"
    with open(temp, "w") as f:
        json.dump(result, f, indent=1)
    os.replace(temp, path)
    if quiet:
        return 0

    print(f"\n{result['what']}: {machine.get('gpu', 'no GPU')}, {result['date']}")
    for name, part in parts.items():
        if name == "kernels":
            print_kernels(part)
        elif part.get("cells"):
            print_cells(name, part)
        elif name == "server":
            print(f"\nserver: {'ok' if part.get('ok') else 'FAILED'}: {json.dumps({k: v for k, v in part.items() if k != 'ok'})}")
    print()
    for a in aims:
        bound = f"at most {a['at_most']}" if "at_most" in a else f"at least {a['at_least']}"
        state = "not measured" if a["met"] is None else "(dry run)" if dry else "PASS" if a["met"] else "MISS"
        print(f"{state:12} {a['name']:44} {number(a['value'])} ({bound})")
    print()
    for step in steps:
        print(f"{step['seconds']:4} s  {step['name']:20} {step['status']}")
    print(f"{'ok' if ok else 'FAILED'}: {path}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
