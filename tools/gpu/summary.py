#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Puts the results of tools/gpu/run.sh into one file, results.json, and prints a short table."""

import datetime
import glob
import json
import os
import platform
import subprocess
import sys


def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def number(value, digits=3):
    return "-" if value is None else f"{value:.{digits}f}"


def main():
    out, dry = sys.argv[1], "--dry-run" in sys.argv[2:]
    steps = []
    with open(os.path.join(out, "steps.txt")) as lines:
        for line in lines:
            name, seconds, status = line.rstrip("\n").split("\t", 2)
            steps.append({"name": name, "seconds": int(seconds), "status": status})
    parts = {}
    for path in sorted(glob.glob(os.path.join(out, "*.json"))):
        try:
            with open(path) as f:
                parts[os.path.basename(path)[:-5]] = json.load(f)
        except ValueError as error:
            steps.append({"name": f"read {os.path.basename(path)}", "seconds": 0, "status": f"failed: {error}"})
    gpu = said("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader")
    nvcc = [line for line in said("nvcc", "--version").splitlines() if "release" in line]
    ok = bool(steps) and all(step["status"] == "ok" for step in steps)
    result = {
        "what": "dry run on a CPU: the figures mean nothing" if dry else "measured on a GPU",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "gpu": gpu,
        "nvcc": nvcc[0].strip() if nvcc else "",
        "cpu": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
        "ok": ok,
        "steps": steps,
        "results": parts,
    }
    temp = os.path.join(out, "results.json.tmp")
    with open(temp, "w") as f:
        json.dump(result, f, indent=1)
    os.replace(temp, os.path.join(out, "results.json"))

    print(f"\n{result['what']}: {gpu or 'no GPU'}, {result['date']}")
    for name, part in parts.items():
        cells = part.get("cells") if isinstance(part, dict) else None
        if cells is None:
            continue
        print(f"\n{name} on {part.get('device')}: split bit-identical {part.get('split_identical')}, CUDA graphs "
              f"{ {True: 'kept', False: 'LOST'}.get(part.get('cuda_graphs_ok'), 'not used') }, an arena takes {number(part.get('arena_mib'), 1)} MiB, "
              f"a row alone differs by {part.get('alone_max_difference')}")
        print("   B exit   t_f    t_s    t_d   head | c/t_d head  without |   p   tok/s    off   /off  /limit")
        for c in cells:
            print(f"{c['batch']:4} {c['exit_layer']:4} {c['t_f_ms']:6.2f} {c['t_s_scored_ms']:6.2f} {c['t_d_ms']:6.2f} {c['t_head_ms']:6.3f} |"
                  f" {number(c['c_over_t_d_with_head']):>10} {number(c['c_over_t_d_without_head']):>8} |"
                  f" {c['p']:.1f} {c['tokens_per_s']:7.0f} {c['off_tokens_per_s']:6.0f} {c['over_off']:6.3f} {c['of_limit']:7.3f}"
                  f"{'  loses' if c['over_off'] < 0.99 else ''}{'' if c['counts_agree'] else '  COUNTS DIFFER'}")
        if cells:
            worst = lambda key, pick: pick(c[key] for c in cells if c[key] is not None)
            print(f"   worst: c/t_d {number(worst('c_over_t_d_with_head', max))} with head (at most 0.10), "
                  f"{number(worst('c_over_t_d_without_head', max))} without (0.05); of the limit {number(worst('of_limit', min))} "
                  f"(at least 0.95); over off {number(worst('over_off', min))} (0.99)")
    print()
    for step in steps:
        print(f"{step['seconds']:4} s  {step['name']:20} {step['status']}")
    print(f"{'ok' if ok else 'FAILED'}: {os.path.join(out, 'results.json')}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
