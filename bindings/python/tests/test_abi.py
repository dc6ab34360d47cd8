# SPDX-License-Identifier: Apache-2.0
"""The package's structs, constants and prototypes against the header, as a C compiler sees it."""

import ctypes as c
import os
import re
import subprocess
import tempfile
import unittest
from pathlib import Path

from drex import _abi

INCLUDE = Path(__file__).resolve().parents[3] / "include"
HEADER = (INCLUDE / "drex.h").read_text()
# Functions and structs of the header that are of no use here.
UNBOUND = set(os.environ.get("DREX_UNBOUND", "").split())


def compiled(body):
    """What a C program with this body of main() prints."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "a.c"), Path(folder, "a")
        source.write_text(f"#include <drex.h>\n#include <stdio.h>\nint main(void) {{\n{body}  return 0;\n}}\n")
        subprocess.run(["cc", "-std=c99", "-Wall", "-Werror", "-I", str(INCLUDE), str(source), "-o", str(program)], check=True)
        return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout


class Layout(unittest.TestCase):
    def test_sizes_and_offsets(self):
        body, expected = "", ""
        for struct in _abi.STRUCTS:
            name = struct.__name__
            body += f'  printf("{name} %zu\\n", sizeof({name}));\n'
            expected += f"{name} {c.sizeof(struct)}\n"
            for field, _ in struct._fields_:
                of = f"(({name} *)0)->{field}"
                body += f'  printf("{name}.{field} %zu %zu\\n", offsetof({name}, {field}), sizeof({of}));\n'
                descriptor = getattr(struct, field)
                expected += f"{name}.{field} {descriptor.offset} {descriptor.size}\n"
        self.assertEqual(compiled(body).splitlines(), expected.splitlines())

    def test_initializers(self):
        body, expected = "", []
        for struct in _abi.STRUCTS:
            macro = struct.__name__.upper() + "_INITIALIZER"
            if struct._fields_[0][0] != "size":
                self.assertNotIn(macro, HEADER)
                continue
            body += f"  {{ {struct.__name__} x = {macro}; const unsigned char *p = (const unsigned char *)&x; size_t i;\n"
            body += '    for (i = 0; i < sizeof x; i++) printf("%02x", p[i]);\n    printf("\\n"); }\n'
            expected.append(bytes(struct()).hex())
        # NaN is one bit pattern in C and may be another in Python.
        nan = {"0000c0ff": "0000c07f"}
        got = compiled(body).splitlines()
        for struct, a, b in zip((s for s in _abi.STRUCTS if s._fields_[0][0] == "size"), got, expected):
            for odd, usual in nan.items():
                a, b = a.replace(odd, usual), b.replace(odd, usual)
            self.assertEqual(a, b, struct.__name__)
        self.assertEqual(len(got), len(expected))

    def test_every_struct_of_the_header_is_here(self):
        theirs = set(re.findall(r"^} (drex_\w+);", HEADER, re.M)) - UNBOUND
        self.assertEqual(theirs, {s.__name__ for s in _abi.STRUCTS})

    def test_constants(self):
        body = "".join(f'  printf("{name} %lld\\n", (long long)({name}));\n' for name in _abi.CONSTANTS)
        got = dict(line.split() for line in compiled(body).splitlines())
        self.assertEqual({name: int(value) for name, value in got.items()}, _abi.CONSTANTS)
        theirs = set(re.findall(r"^#define (DREX_\w+) (?:\d+|UINT32_MAX)$", HEADER, re.M)) - UNBOUND
        theirs -= {f"DREX_VERSION_{part}" for part in ("MAJOR", "MINOR", "PATCH")}  # of the header alone
        self.assertEqual(theirs - set(_abi.CONSTANTS), set())

    def test_functions(self):
        code = re.sub(r"/\*.*?\*/|//[^\n]*", "", HEADER, flags=re.S)
        theirs = dict(re.findall(r"\b(drex_\w+)\(([^()]*)\);", code))
        count = {name: 0 if args.strip() == "void" else args.count(",") + 1 for name, args in theirs.items() if name not in UNBOUND}
        self.assertEqual(count, {name: len(f) - 1 for name, f in _abi.FUNCTIONS.items()})
        # A pointer where the header has one, and a number of the right size where it has none.
        sizes = {"uint8_t": 1, "uint32_t": 4, "int32_t": 4, "uint64_t": 8, "size_t": 8, "double": 8, "float": 4}
        sizes.update({f"drex_{n}": 4 for n in ("policy", "metric", "status", "fill_mode", "decision", "flush_reason", "miss_reason", "device", "log_level")})
        for name, args in theirs.items():
            for text, ours in zip(args.split(","), _abi.FUNCTIONS.get(name, [None])[1:]):
                pointer = "*" in text or re.search(r"\bdrex_(log_callback|trace_sink)\b", text) is not None
                is_function = isinstance(ours, type) and issubclass(ours, c._CFuncPtr)
                is_pointer = ours in (c.c_void_p, c.c_char_p) or hasattr(ours, "contents") or is_function
                self.assertEqual(pointer, is_pointer, f"{name}: {text.strip()}")
                if not pointer:
                    kind = [w for w in text.split() if w != "const"][0]
                    self.assertEqual(sizes[kind], c.sizeof(ours), f"{name}: {text.strip()}")


if __name__ == "__main__":
    unittest.main()
