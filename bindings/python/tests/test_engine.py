# SPDX-License-Identifier: Apache-2.0
"""The calls, with arrays of the standard library; numpy's are in test_numpy.py."""

import array
import gc
import inspect
import json
import math
import os
import re
import subprocess
import sys
import unittest
from pathlib import Path

import drex


def logits(*rows):
    """A writable buffer [n_rows, n_vocab] of floats."""
    flat = array.array("f", [x for row in rows for x in row])
    return memoryview(flat).cast("B").cast("f", [len(rows), len(rows[0])])


def engine(**fields):
    return drex.Engine(**{**dict(n_layers=8, ramp_layers=[4], n_slots=4, policy="hold", threshold=0.7, flush_rows=1), **fields})


SURE, UNSURE = [20.0, 0.0, 0.0, 0.0], [1.0, 1.1, 0.0, 0.0]


class Calls(unittest.TestCase):
    def test_versions(self):
        self.assertRegex(drex.version(), r"^\d+\.\d+\.\d+$")
        self.assertEqual(drex.abi_version(), 1)

    def test_an_exit_and_a_held_row(self):
        width, cells = 3, 5
        k = [memoryview(bytearray(cells * width)).cast("B", [cells, width]) for _ in range(8)]
        v = [memoryview(bytearray(cells * width)).cast("B", [cells, width]) for _ in range(8)]
        k[3][2, 1], v[3][2, 2] = 7, 9
        with engine() as e:
            e.bind_kv(k, v)
            for request in (10, 2**63 + 5):
                e.add(request)
                e.ready(request, 1000)
            step = e.plan(1000)
            self.assertEqual((step.layer_begin, step.layer_end, step.ramp, step.reason), (0, 4, 0, "none"))
            self.assertEqual([(r.request, r.back) for r in step.rows], [(10, 0), (2**63 + 5, 0)])
            first, second = e.ramp(logits(SURE, UNSURE), [2, 4])
            self.assertEqual((first.decision, first.token, first.forced), ("exit", 0, False))
            self.assertEqual((second.decision, second.token), ("hold", 1))
            self.assertGreater(first.confidence, 0.99)
            exps = sorted((math.exp(x) for x in UNSURE), reverse=True)
            self.assertAlmostEqual(second.confidence, (exps[0] - exps[1]) / sum(exps), places=5)
            e.fill()
            self.assertEqual([layer[2, 1] for layer in k], [0, 0, 0, 7, 7, 7, 7, 7])
            self.assertEqual([layer[2, 2] for layer in v], [0, 0, 0, 9, 9, 9, 9, 9])
            e.complete(2000, duration_ns=500, n_kv=7)
            info = e.info(2**63 + 5)
            self.assertEqual((info["state"], info["ramp"], info["tokens"]), ("held", 0, 0))
            self.assertEqual(e.info(10)["state"], "idle")
            self.assertIsNone(e.info(10)["slot"])
            step = e.plan(3000)
            self.assertEqual((step.layer_begin, step.layer_end, step.ramp, step.reason), (4, 8, None, "fill"))
            e.complete(4000)
            stats = e.stats()
            self.assertEqual((stats["tokens"], stats["exits"], stats["steps"], stats["step_rows"]), (2, [1], 2, 3))
            self.assertEqual((stats["flushes"]["none"], stats["flushes"]["fill"], stats["bytes_filled"]), (1, 1, 4 * 2 * width))
            self.assertIsNone(e.plan(5000))
            e.remove(10)
            self.assertEqual(e.stats()["requests"], 1)

    def test_verify_settle_and_abandon(self):
        with engine(fill="verify", n_slots=8, max_requests=2, max_batch=8) as e:
            e.add(0)
            e.ready(0, 0)
            e.plan(0)
            e.abandon()
            self.assertEqual(e.plan(0).rows[0].request, 0)
            self.assertEqual(e.ramp(logits(SURE))[0].decision, "exit")
            e.complete(1)
            self.assertEqual(e.info(0)["n_pending"], 1)
            self.assertEqual(e.settle(0, 2), 1)
            step = e.plan(3)
            self.assertEqual((step.layer_end, step.rows[0].back), (8, 1))
            self.assertEqual([j.decision for j in e.verify([False])], ["replace"])
            e.complete(4)
            self.assertEqual((e.stats()["drafts"], e.stats()["drafts_accepted"]), (1, 0))
            self.assertEqual(e.settle(0, 5), 0)

    def test_profiles(self):
        with engine(policy="auto") as e:
            with self.assertRaises(drex.Error) as caught:
                e.save_profile()
            self.assertEqual(caught.exception.name, "DREX_ERROR_CALL_ORDER")
            for rows in (1, 2, 4):
                e.observe(rows, 0, 8, 1000 + 100 * rows, n_kv=10)
            text = e.save_profile()
            json.loads(text)
            e.load_profile(text)
            self.assertIsInstance(e.replan(10), bool)

    def test_thresholds_by_ramp(self):
        with engine(ramp_layers=[2, 4], ramp_thresholds=[1.5, 0.5]) as e:
            e.add(0, threshold=0.9, metric="maxprob", fill="copy", priority=-3, max_tokens=2)
            e.ready(0, 0)
            e.plan(0)
        with self.assertRaisesRegex(ValueError, "1 ramp_thresholds for 2 ramps"):
            engine(ramp_layers=[2, 4], ramp_thresholds=[0.5])

    def test_speculate(self):
        p = array.array("f", [0.0, 1.0, 0.0])
        self.assertEqual(drex.speculate(p, None, 0, 0.5, 0.5), 1)
        self.assertEqual(drex.speculate(p, array.array("f", [0.5, 0.5, 0]), 1, 0.5, 0.5), 1)
        with self.assertRaises(drex.Error):
            drex.speculate(p, None, 7, 0.5, 0.5)

    def test_pages(self):
        table = memoryview(bytearray(4 * 2 * 3)).cast("I", [2, 3])
        for layer in range(2):
            for block in range(3):
                table[layer, block] = 0xFFFFFFFF
        with drex.Pages(n_layers=2, page_tokens=4, n_pages=8) as pages:
            self.assertEqual(pages.write(table, 0, 0, 1), [])
            self.assertEqual(pages.exit(table, 0, 1), [])
            self.assertEqual(table[0, 0], table[1, 0])
            stats = pages.stats()
            self.assertEqual((stats["pages_used"], stats["references"], stats["pages_saved"]), (1, 2, 1))
            self.assertEqual(pages.write(table, 1, 0, 1), [])
            copies = pages.write(table, 1, 1, 2)
            self.assertEqual([(p.first_cell, p.n_cells) for p in copies], [(0, 1)])
            self.assertNotEqual(table[0, 0], table[1, 0])
            pages.fork(table, 0, 1)
            pages.release(table, 0, 1)
            self.assertEqual(table[0, 0], 0xFFFFFFFF)


class Reference(unittest.TestCase):
    def test_the_readme_has_every_call_with_its_arguments(self):
        def signature(name, function):
            own = inspect.signature(function)
            return name + str(own.replace(parameters=[p for p in own.parameters.values() if p.name != "self"]))

        wanted = {signature(name, getattr(drex, name)) for name in ("Engine", "Pages", "version", "abi_version", "speculate")}
        for owner in (drex.Engine, drex.Pages):
            wanted |= {signature(name, f) for name, f in vars(owner).items() if not name.startswith("_")}
        text = (Path(__file__).resolve().parents[1] / "README.md").read_text().split("## Methods")[1].split("\n## ")[0]
        first = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
        listed = {call for cell in first for call in re.findall("`(.+?)`", cell)}
        self.assertEqual(listed, wanted)
        # What these give is named there too.
        for kind in (drex.Step, drex.Verdict, drex.Judgement):
            for field in kind._fields:
                self.assertIn(f"`{field}`", text)


class Errors(unittest.TestCase):
    def test_errors_have_a_status_and_a_text(self):
        with self.assertRaises(drex.Error) as caught:
            engine(threshold=math.nan)
        self.assertEqual((caught.exception.status, caught.exception.name), (2, "DREX_ERROR_INVALID_ARGUMENT"))
        self.assertIn("threshold is NaN", caught.exception.text)
        with engine() as e:
            for call in (lambda: e.ready(3, 0), lambda: e.remove(3), lambda: e.info(3)):
                with self.assertRaises(drex.Error) as caught:
                    call()
                self.assertEqual(caught.exception.name, "DREX_ERROR_UNKNOWN_REQUEST")
            with self.assertRaisesRegex(drex.Error, "CALL_ORDER"):
                e.fill()

    def test_what_cannot_be_passed_to_c(self):
        for fields, error in (
            (dict(policy="often"), "policy 'often' is unknown"),
            (dict(n_slots=2**32), "n_slots is 4294967296"),
            (dict(max_hold_ns=-1), "max_hold_ns is -1"),
        ):
            with self.assertRaisesRegex(ValueError, error):
                engine(**fields)
        with self.assertRaisesRegex(TypeError, "no field 'thresold'"):
            engine(thresold=0.5)
        with engine() as e:
            with self.assertRaisesRegex(ValueError, "request is -1"):
                e.add(-1)
            e.add(0)
            with self.assertRaises(TypeError):
                e.ready(0, 1, 0)  # as in C, where n_kv comes before the time
            e.ready(0, 0)
            e.plan(0)
            with self.assertRaisesRegex(ValueError, "expected \\[n_rows, n_vocab\\]"):
                e.ramp(array.array("f", [1, 2]))
            with self.assertRaisesRegex(ValueError, "logits of type i4"):
                e.ramp(memoryview(bytearray(16)).cast("i", [1, 4]))
            with self.assertRaisesRegex(ValueError, "2 cells for 1 rows"):
                e.ramp(logits(SURE), [1, 2])
            # After all of these, the call that is right works.
            self.assertEqual(e.ramp(logits(SURE))[0].decision, "exit")
        with self.assertRaisesRegex(ValueError, "the array is read-only|must be writable"):
            engine().bind_kv([bytes(8)] * 8, [bytes(8)] * 8)

    def test_a_closed_engine(self):
        e = engine()
        e.close()
        e.close()
        for call in (e.stats, e.fill, e.snapshot, lambda: e.ready(0, 0)):
            with self.assertRaisesRegex(drex.Error, "the engine is closed"):
                call()
        pages = drex.Pages(n_layers=2, page_tokens=4, n_pages=8)
        pages.close()
        with self.assertRaisesRegex(drex.Error, "the pool of pages is closed"):
            pages.stats()

    def test_lists_are_no_arrays(self):
        with engine() as e:
            e.add(0)
            e.ready(0, 0)
            e.plan(0)
            for call, what in (
                (lambda: e.ramp([[1.0, 2.0]]), "logits: a list is no array; expected one of numpy"),
                (lambda: e.bind_kv([[1.0]] * 8, [[1.0]] * 8), "K of layer 0: a list"),
                (lambda: e.gather([1.0], [1.0]), "arena: a list"),
                (lambda: drex.speculate([1.0], None, 0, 0.5, 0.5), "deep: a list"),
            ):
                with self.assertRaisesRegex(TypeError, what):
                    call()

    def test_engines_that_are_forgotten_end(self):
        for _ in range(300):  # more than may be alive
            engine()
        gc.collect()
        engine().close()

    def test_a_library_that_is_none(self):
        run = lambda path: subprocess.run(
            [sys.executable, "-c", "import drex"], env={**os.environ, "DREX_LIBRARY": path}, capture_output=True, text=True
        )
        self.assertIn("cannot load libdrex", run("/nowhere/libdrex.so.0").stderr)
        self.assertIn("has no drex_version", run("libm.so.6").stderr)


if __name__ == "__main__":
    unittest.main()
