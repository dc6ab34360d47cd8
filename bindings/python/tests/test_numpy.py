# SPDX-License-Identifier: Apache-2.0
"""numpy's arrays: types, strides, layouts; and the README's example."""

import contextlib
import io
import re
import unittest
from pathlib import Path

import numpy as np

import drex

README = Path(__file__).resolve().parents[1] / "README.md"


def engine(**fields):
    return drex.Engine(**{**dict(n_layers=6, ramp_layers=[2], n_slots=8, policy="latency", threshold=0.5), **fields})


def one_step(e, logits, cells=None, dtype=None):
    for r in range(len(logits)):
        e.add(r)
        e.ready(r, 0)
    assert len(e.plan(0).rows) == len(logits)
    verdicts = e.ramp(logits, cells, dtype)
    return [(v.decision, v.token) for v in verdicts], [v.confidence for v in verdicts]


class Logits(unittest.TestCase):
    def setUp(self):
        self.logits = np.random.default_rng(7).normal(0, 4, (8, 40)).astype(np.float32)
        with engine() as e:
            self.decisions, self.confidences = one_step(e, self.logits)

    def test_confidence_is_the_gap(self):
        p = np.exp(self.logits.astype(np.float64) - self.logits.max(1, keepdims=True))
        p = np.sort(p / p.sum(1, keepdims=True), axis=1)
        np.testing.assert_allclose(self.confidences, p[:, -1] - p[:, -2], atol=1e-5)
        expected = ["exit" if c >= 0.5 else "stay" for c in self.confidences]
        self.assertEqual([d for d, _ in self.decisions], expected)
        self.assertEqual([t for _, t in self.decisions], self.logits.argmax(1).tolist())
        self.assertEqual(set(expected), {"exit", "stay"})

    def test_strided_and_read_only(self):
        wide = np.zeros((8, 64), np.float32)
        wide[:, 3:43] = self.logits
        view = wide[:, 3:43]
        view.flags.writeable = False
        with engine() as e:
            self.assertEqual(one_step(e, view), (self.decisions, self.confidences))

    def test_half_precision(self):
        half = self.logits.astype(np.float16)
        with engine() as a, engine() as b:
            self.assertEqual(one_step(a, half), one_step(b, half.astype(np.float32)))
        brain = (self.logits.view(np.uint32) >> 16).astype(np.uint16)
        with engine() as a, engine() as b:
            self.assertEqual(one_step(a, brain, dtype="bf16"), one_step(b, (brain.astype(np.uint32) << 16).view(np.float32)))

    def test_what_is_refused(self):
        for bad in (self.logits.astype(np.float64), self.logits[:, ::2], self.logits[::-1], self.logits.astype(">f4"), self.logits[0][:8]):
            with engine() as e, self.assertRaises(ValueError):
                one_step(e, bad)


class Rows(unittest.TestCase):
    def test_gather_scatter_and_top(self):
        arena = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)[:, :3]
        with engine(n_top=4) as e:
            for r in range(3):
                e.add(r)
                e.ready(r, 0)
            slots = [row.slot for row in e.plan(0).rows]
            dense = np.zeros((3, 3), np.float32)
            e.gather(arena, dense)
            np.testing.assert_array_equal(dense, arena[slots])
            old = arena.copy()
            e.scatter(arena, dense + 100)
            old[slots] += 100
            np.testing.assert_array_equal(arena, old)
            with self.assertRaisesRegex(ValueError, "an arena of 4 rows"):
                e.gather(arena[:4], dense)
            logits = np.array([[1, 5, 3, 4, 2]] * 3, np.float32)
            e.ramp(logits, n_top=3)
            self.assertEqual(e.top(1), [(1, 5.0), (3, 4.0), (2, 3.0)])
            self.assertEqual(e.top(1, 1), [(1, 5.0)])


class Fill(unittest.TestCase):
    def fill(self, k, v, **args):
        sure = np.zeros((1, 4), np.float32)
        sure[0, 1] = 30
        with engine() as e:
            e.bind_kv(k, v, **args)
            self.assertEqual(one_step(e, sure, np.array([3]))[0], [("exit", 1)])
            e.fill()

    def test_one_array_with_a_layer_each(self):
        rng = np.random.default_rng(1)
        k, v = rng.normal(size=(6, 5, 2, 4)).astype(np.float16), rng.normal(size=(6, 5, 3)).astype(np.float32)
        old = k.copy(), v.copy()
        self.fill(k, v)
        for a, b in zip((k, v), old):
            b[2:, 3] = b[1, 3]
            np.testing.assert_array_equal(a, b)

    def test_transposed_v(self):
        rng = np.random.default_rng(2)
        k, v = rng.normal(size=(6, 5, 4)).astype(np.float32), rng.normal(size=(6, 3, 5)).astype(np.float32)
        old = v.copy()
        self.fill(k, v, v_transposed=True)
        old[2:, :, 3] = old[1, :, 3]
        np.testing.assert_array_equal(v, old)

    def test_what_is_refused(self):
        k = np.zeros((6, 5, 4), np.float32)
        frozen = k.copy()
        frozen.flags.writeable = False
        for v in (frozen, k[:, :4], k[:, :, ::2], k[:5]):
            with engine() as e, self.assertRaises(ValueError):
                e.bind_kv(k, v)


class Readme(unittest.TestCase):
    def test_the_example_prints_what_it_says(self):
        text = README.read_text()
        (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
        (expected,) = re.findall(r"```text\n(.*?)```", text, re.S)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, str(README), "exec"), {})
        self.assertEqual(out.getvalue(), expected)


if __name__ == "__main__":
    unittest.main()
