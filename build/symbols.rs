// SPDX-License-Identifier: Apache-2.0

//! Symbol versions, for cargo-c.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::{env, fs};

/// rustc passes a version script of its own, which lists the no_mangle
/// functions without a version, and a linker takes only one. So, for cargo-c
/// alone, the compiler finds a linker that swaps it for ours. (`cargo xtask
/// install` needs no such thing: it links the shared library itself.)
pub fn versions() {
    let out = env::var("OUT_DIR").unwrap();
    let map = Path::new(&env::var("CARGO_MANIFEST_DIR").unwrap()).join("packaging/libdrex.map");
    let cc = env::var("RUSTC_LINKER").unwrap_or_else(|_| "cc".to_owned());
    let found = Command::new(cc).arg("-print-prog-name=ld.bfd").output();
    let real = match found {
        Ok(out) if out.status.success() => String::from_utf8(out.stdout).unwrap(),
        _ => {
            println!("cargo:warning=no GNU ld: libdrex.so will have no symbol versions");
            return;
        }
    };
    let script = format!(
        "#!/bin/sh\nfor arg do\n  shift\n  case $arg in\n    \
         --version-script=*) arg=--version-script='{}' ;;\n  esac\n  \
         set -- \"$@\" \"$arg\"\ndone\nexec '{}' \"$@\"\n",
        map.display(),
        real.trim()
    );
    let wrapper = Path::new(&out).join("ld.bfd");
    fs::write(&wrapper, script).unwrap();
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
    println!("cargo:rustc-cdylib-link-arg=-B{out}");
    println!("cargo:rustc-cdylib-link-arg=-fuse-ld=bfd");
}
