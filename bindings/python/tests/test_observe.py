# SPDX-License-Identifier: Apache-2.0
"""Log, snapshot, metrics and trace. The metrics are read by prometheus_client, Prometheus' own package."""

import array
import json
import unittest

import drex
from prometheus_client.parser import text_string_to_metric_families


def served():
    """Two tokens' rows at a ramp: one exits, one is held."""
    e = drex.Engine(n_layers=8, ramp_layers=[4], n_slots=4, policy="hold", threshold=0.7, flush_rows=4)
    heard = []
    e.log(lambda level, text: heard.append((level, text)), "trace")
    e.trace_start(100)
    for request in (1, 2):
        e.add(request)
        e.ready(request, 0)
    e.plan(1000)
    flat = array.array("f", [20.0, 0.0, 1.0, 1.1])
    e.ramp(memoryview(flat).cast("B").cast("f", [2, 2]))
    e.complete(900_000, duration_ns=800_000)
    return e, heard


class Observed(unittest.TestCase):
    def test_prometheus_reads_the_metrics(self):
        e, _ = served()
        odd = 'a "b"\\c\nd'
        families = {f.name: f for f in text_string_to_metric_families(e.metrics_text(model=odd))}
        stats = e.stats()
        self.assertTrue(all(s.labels["model"] == odd for f in families.values() for s in f.samples))
        self.assertTrue(all(f.documentation and f.type != "unknown" for f in families.values()))
        value = {name: sum(s.value for s in f.samples) for name, f in families.items() if f.type != "histogram"}
        self.assertEqual(value["drex_tokens"], stats["tokens"])
        self.assertEqual(value["drex_exits"], sum(stats["exits"]))
        self.assertEqual(value["drex_held_rows"], stats["held_rows"])
        self.assertEqual(value["drex_steps"], 1)
        self.assertEqual((stats["tokens"], stats["held_rows"]), (1, 1))
        self.assertEqual({s.labels["reason"] for s in families["drex_flushes"].samples}, set(stats["flushes"]) - {"none"})
        window = families["drex_window_seconds"]
        self.assertEqual(window.type, "histogram")
        buckets = [(float(s.labels["le"]), s.value) for s in window.samples if s.name.endswith("_bucket")]
        self.assertEqual([n for le, n in buckets], [0.0 if le < 0.0008 else 1.0 for le, _ in buckets])
        self.assertEqual(buckets[-1][0], float("inf"))
        self.assertEqual([s.value for s in window.samples if s.name.endswith("_sum")], [0.0008])
        self.assertEqual(families["drex_tokens"].samples[0].name, "drex_tokens_total")

    def test_texts_of_several_engines_merge(self):
        one, _ = served()
        other = drex.Engine(n_layers=12, ramp_layers=[4, 8], n_slots=4)
        # Family by family, the later ones without their two lines of comment.
        texts = [e.metrics_text(model=m).split("# HELP ")[1:] for e, m in ((one, "a"), (other, "b"))]
        self.assertEqual(len(texts[0]), len(texts[1]))
        merged = "".join("# HELP " + a + "".join(b.splitlines(True)[2:]) for a, b in zip(*texts))
        families = list(text_string_to_metric_families(merged))
        self.assertEqual(len(families), len({f.name for f in families}))
        tokens = [f for f in families if f.name == "drex_tokens"][0]
        self.assertEqual([(s.labels["model"], s.value) for s in tokens.samples], [("a", 1.0), ("b", 0.0)])
        exits = [f for f in families if f.name == "drex_exits"][0]
        self.assertEqual(len(exits.samples), 1 + 2)

    def test_the_snapshot(self):
        e, _ = served()
        s = e.snapshot()
        self.assertEqual(s["counters"]["tokens"], 1)
        self.assertEqual([h["request"] for h in s["held_rows"]], [2])

    def test_the_trace(self):
        e, _ = served()
        events = json.loads(e.trace())["traceEvents"]
        phases = "".join(sorted(x["ph"] for x in events if x["ph"] != "M"))
        self.assertEqual(phases, "CXbei")
        window = [x for x in events if x["ph"] == "X"][0]
        self.assertEqual((window["ts"], window["dur"], window["args"]["rows"]), (1, 899, 2))
        e.trace_stop()
        with self.assertRaises(drex.Error) as failed:
            e.trace()
        self.assertEqual(failed.exception.name, "DREX_ERROR_CALL_ORDER")

    def test_the_log(self):
        e, heard = served()
        self.assertEqual([level for level, _ in heard], ["info", "debug", "debug", "trace", "trace", "trace"])
        with self.assertRaises(drex.Error) as failed:
            e.metrics_text(ramp=1)
        self.assertEqual(heard[-1], ("warn", failed.exception.text))
        n = len(heard)
        e.log(None)
        e.add(9)
        self.assertEqual(len(heard), n)


if __name__ == "__main__":
    unittest.main()
