# SPDX-License-Identifier: Apache-2.0
"""Builds the wheel for `pip install bindings/python`, with Python's standard library alone (PEP 517).

The wheel has libdrex.so.0 in the package's folder: the file that DREX_LIBRARY names, or what cargo builds of this
checkout. With `-C library=none` it has none, and the package looks where the system's loader does.
"""

import base64
import hashlib
import os
import re
import subprocess
import sysconfig
import zipfile
from pathlib import Path

PYTHON = Path(__file__).resolve().parents[1]
CHECKOUT = PYTHON.parents[1]
SONAME = "libdrex.so.0"


class UnsupportedOperation(Exception):
    pass


def get_requires_for_build_wheel(config_settings=None):
    return []


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = Path(metadata_directory, _info())
    folder.mkdir()
    for name, data in _about(_tag(config_settings)).items():
        (folder / name).write_bytes(data)
    return folder.name


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    tag = _tag(config_settings)
    files = {f"drex/{path.name}": path.read_bytes() for path in sorted((PYTHON / "drex").glob("*.py"))}
    if _has_library(config_settings):
        files[f"drex/{SONAME}"] = _library().read_bytes()
    files.update({f"{_info()}/{name}": data for name, data in _about(tag).items()})
    name = f"drex-{_version()}-{tag}.whl"
    record = f"{_info()}/RECORD"
    lines = [f"{path},sha256={_digest(data)},{len(data)}" for path, data in files.items()] + [f"{record},,"]
    files[record] = ("\n".join(lines) + "\n").encode()
    with zipfile.ZipFile(Path(wheel_directory, name), "w", zipfile.ZIP_DEFLATED) as wheel:
        for path, data in files.items():
            entry = zipfile.ZipInfo(path)  # of 1980: the same files give the same wheel
            entry.external_attr = (0o755 if path.endswith(SONAME) else 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            wheel.writestr(entry, data)
    return name


def build_sdist(sdist_directory, config_settings=None):
    raise UnsupportedOperation("the library is built from the checkout: install from there")


def _has_library(config_settings):
    library = (config_settings or {}).get("library", "own")
    if library not in ("own", "none"):
        raise ValueError(f"library={library} is unknown; expected own or none")
    return library == "own"


def _tag(config_settings):
    platform = re.sub("[-.]", "_", sysconfig.get_platform()) if _has_library(config_settings) else "any"
    return f"py3-none-{platform}"


def _library():
    named = os.environ.get("DREX_LIBRARY")
    if named:
        return Path(named)
    subprocess.run(["cargo", "build", "--release", "--package", "drex", "--lib"], cwd=CHECKOUT, check=True)
    return Path(CHECKOUT, os.environ.get("CARGO_TARGET_DIR", "target"), "release", "libdrex.so")


def _version():
    text = (CHECKOUT / "Cargo.toml").read_text()
    return re.search(r'^name = "drex"\nversion = "(.+)"$', text, re.M).group(1)


def _info():
    return f"drex-{_version()}.dist-info"


def _about(tag):
    metadata = f"""Metadata-Version: 2.1
Name: drex
Version: {_version()}
Summary: Early exit with dynamic rebatching, for engines that are prototyped in Python
License: Apache-2.0
Classifier: License :: OSI Approved :: Apache Software License
Classifier: Operating System :: POSIX :: Linux
Classifier: Programming Language :: Python :: 3
Requires-Python: >=3.8
Description-Content-Type: text/markdown

{(PYTHON / "README.md").read_text()}"""
    wheel = f"""Wheel-Version: 1.0
Generator: drex
Root-Is-Purelib: {str(tag.endswith("any")).lower()}
Tag: {tag}
"""
    return {"METADATA": metadata.encode(), "WHEEL": wheel.encode(), "LICENSE": (CHECKOUT / "LICENSE").read_bytes()}


def _digest(data):
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
