// SPDX-License-Identifier: Apache-2.0

//! Edits GGUF files: the tests need models that differ from the bundled one in one thing.
//!
//! A model cut after its first layers, served by the unpatched engine, is an independent reference for the first exit
//! ramp: the layers below a ramp never see a skipped layer's K/V, so logits and decisions there must agree.

use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::Path;

/// What to change; everything else is copied byte for byte.
#[derive(Default)]
pub struct Edit<'a> {
    /// Keep only the tensors of the first `n` layers, and set `<arch>.block_count`.
    pub layers: Option<u32>,
    /// Metadata keys to leave out.
    pub without: &'a [&'a str],
}

struct Reader<'a> {
    data: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(n).context("GGUF: length overflows")?;
        let bytes = self
            .data
            .get(self.at..end)
            .context("GGUF: the file ends early")?;
        self.at = end;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into()?))
    }

    fn string(&mut self) -> Result<&'a str> {
        let n = self.u64()?.try_into()?;
        Ok(std::str::from_utf8(self.take(n)?)?)
    }

    fn skip_value(&mut self, kind: u32) -> Result<()> {
        match kind {
            0 | 1 | 7 => drop(self.take(1)?),
            2 | 3 => drop(self.take(2)?),
            4..=6 => drop(self.take(4)?),
            10..=12 => drop(self.take(8)?),
            8 => drop(self.string()?),
            9 => {
                let kind = self.u32()?;
                for _ in 0..self.u64()? {
                    self.skip_value(kind)?;
                }
            }
            _ => bail!("GGUF: unknown value type {kind}"),
        }
        Ok(())
    }
}

struct Tensor<'a> {
    name: &'a str,
    /// Dimensions and type, as they lie in the file.
    shape: &'a [u8],
    offset: u64,
}

/// The layer a tensor belongs to: `blk.N.…`.
fn layer_of(name: &str) -> Option<u32> {
    name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

/// What the metadata of a model says in a line, and whether it has exit layers.
pub struct About {
    pub text: String,
    pub exits: bool,
    pub layers: u32,
}

/// Reads the metadata alone.
pub fn about(path: &Path) -> Result<About> {
    let data = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    described(&data).with_context(|| path.display().to_string())
}

fn described(data: &[u8]) -> Result<About> {
    let mut r = Reader { data, at: 0 };
    ensure!(r.take(4)? == b"GGUF", "not a GGUF file");
    r.take(4 + 8)?;
    let (mut name, mut description, mut architecture) = ("a model without a name", "", "");
    let (mut layers, mut exits) = (0, Vec::new());
    for _ in 0..r.u64()? {
        let key = r.string()?;
        let kind = r.u32()?;
        match (key, kind) {
            ("general.name", 8) => name = r.string()?,
            ("general.description", 8) => description = r.string()?,
            ("general.architecture", 8) => architecture = r.string()?,
            (key, 4) if key.ends_with(".block_count") => layers = r.u32()?,
            (key, 9) if key.ends_with(".early_exit.layers") => {
                let kind = r.u32()?;
                ensure!(matches!(kind, 4 | 5), "{key} has items of type {kind}");
                for _ in 0..r.u64()? {
                    exits.push(r.u32()?);
                }
            }
            _ => r.skip_value(kind)?,
        }
    }
    let colon = if description.is_empty() { "" } else { ": " };
    let leaves = match exits[..] {
        [] => "no exit layers".to_owned(),
        _ => format!("exits after layers {exits:?}"),
    };
    Ok(About {
        text: format!("{name}{colon}{description} ({architecture}, {layers} layers, {leaves})"),
        exits: !exits.is_empty(),
        layers,
    })
}

/// Writes `input`, changed by `edit`, to `output`.
pub fn rewrite(input: &Path, output: &Path, edit: &Edit) -> Result<()> {
    let data = fs::read(input).with_context(|| format!("reading {}", input.display()))?;
    let out = edited(&data, edit).with_context(|| format!("editing {}", input.display()))?;
    fs::write(output, out).with_context(|| format!("writing {}", output.display()))
}

fn edited(data: &[u8], edit: &Edit) -> Result<Vec<u8>> {
    let mut r = Reader { data, at: 0 };
    ensure!(r.take(4)? == b"GGUF", "not a GGUF file");
    let version = r.u32()?;
    ensure!(version == 3, "GGUF version {version}, expected 3");
    let n_tensors = r.u64()?;
    let n_kv = r.u64()?;

    let mut alignment = 32usize;
    let mut kvs: Vec<Vec<u8>> = Vec::new();
    for _ in 0..n_kv {
        let start = r.at;
        let key = r.string()?;
        let kind = r.u32()?;
        let value = r.at;
        r.skip_value(kind)?;
        if edit.without.contains(&key) {
            continue;
        }
        let mut bytes = data[start..r.at].to_vec();
        if key == "general.alignment" {
            alignment = u32::from_le_bytes(data[value..value + 4].try_into()?) as usize;
        }
        if let Some(n) = edit.layers.filter(|_| key.ends_with(".block_count")) {
            ensure!(kind == 4, "{key} has type {kind}, expected u32");
            let at = bytes.len() - 4;
            bytes[at..].copy_from_slice(&n.to_le_bytes());
        }
        kvs.push(bytes);
    }

    let mut tensors = Vec::new();
    for _ in 0..n_tensors {
        let name = r.string()?;
        let start = r.at;
        let n_dims = r.u32()? as usize;
        r.take(8 * n_dims + 4)?;
        let shape = &data[start..r.at];
        let offset = r.u64()?;
        tensors.push(Tensor {
            name,
            shape,
            offset,
        });
    }
    let blob = &data[r.at.next_multiple_of(alignment).min(data.len())..];

    // A tensor's bytes end where the next one begins.
    let mut ends: Vec<u64> = tensors.iter().map(|t| t.offset).collect();
    ends.push(blob.len() as u64);
    ends.sort_unstable();
    let bytes_of = |t: &Tensor| -> Result<&[u8]> {
        // None past it where the file ends before the tensor begins.
        ends.get(ends.partition_point(|&e| e <= t.offset))
            .and_then(|end| blob.get(t.offset as usize..*end as usize))
            .context("GGUF: a tensor lies outside of the file")
    };

    let keep: Vec<&Tensor> = tensors
        .iter()
        .filter(|t| {
            edit.layers
                .is_none_or(|n| layer_of(t.name).is_none_or(|l| l < n))
        })
        .collect();

    let mut out = Vec::with_capacity(data.len());
    out.extend_from_slice(b"GGUF");
    out.extend_from_slice(&version.to_le_bytes());
    out.extend_from_slice(&(keep.len() as u64).to_le_bytes());
    out.extend_from_slice(&(kvs.len() as u64).to_le_bytes());
    out.extend(kvs.into_iter().flatten());

    let mut body: Vec<u8> = Vec::new();
    for t in keep {
        body.resize(body.len().next_multiple_of(alignment), 0);
        out.extend_from_slice(&(t.name.len() as u64).to_le_bytes());
        out.extend_from_slice(t.name.as_bytes());
        out.extend_from_slice(t.shape);
        out.extend_from_slice(&(body.len() as u64).to_le_bytes());
        body.extend_from_slice(bytes_of(t)?);
    }
    out.resize(out.len().next_multiple_of(alignment), 0);
    out.extend(body);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bundled_model_is_described() {
        let about = about(&drex_build::cache::bundled_model().unwrap()).unwrap();
        assert!(about.exits);
        assert_eq!(
            about.text,
            "drex-ee-rustdoc-7m: early-exit Llama trained on the Rust documentation (llama, 16 layers, exits after layers [4, 8, 12])"
        );
        assert!(described(b"GGUF and nothing more").is_err());
    }

    fn string(s: &str) -> Vec<u8> {
        [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
    }

    /// Two layers of one 4-byte tensor each and a head, with a key of every kind that is used.
    fn sample() -> Vec<u8> {
        let mut f = [
            &b"GGUF"[..],
            &3u32.to_le_bytes(),
            &3u64.to_le_bytes(),
            &2u64.to_le_bytes(),
        ]
        .concat();
        f.extend(string("llama.block_count"));
        f.extend([4u32.to_le_bytes(), 2u32.to_le_bytes()].concat());
        f.extend(string("llama.early_exit.layers"));
        f.extend([9u32.to_le_bytes(), 5u32.to_le_bytes()].concat());
        f.extend(1u64.to_le_bytes());
        f.extend(1i32.to_le_bytes());
        for (i, name) in ["blk.0.a", "blk.1.a", "head"].iter().enumerate() {
            f.extend(string(name));
            f.extend(1u32.to_le_bytes());
            f.extend(1u64.to_le_bytes());
            f.extend(0u32.to_le_bytes());
            f.extend((32 * i as u64).to_le_bytes());
        }
        f.resize(f.len().next_multiple_of(32), 0);
        for i in 1..=3u8 {
            f.extend([i; 4]);
            if i < 3 {
                f.extend([0; 28]);
            }
        }
        f
    }

    #[test]
    fn no_edit_is_the_identity() {
        assert_eq!(edited(&sample(), &Edit::default()).unwrap(), sample());
    }

    #[test]
    fn layers_and_keys_are_dropped() {
        let edit = Edit {
            layers: Some(1),
            without: &["llama.early_exit.layers"],
        };
        let out = edited(&sample(), &edit).unwrap();
        assert_eq!(&out[8..16], &2u64.to_le_bytes());
        assert_eq!(&out[16..24], &1u64.to_le_bytes());
        assert_eq!(
            &out[out.len() - 4..],
            &[3; 4],
            "the head's bytes stay the head's"
        );
        assert!(!out.windows(5).any(|w| w == b"blk.1"));
        assert_eq!(
            edited(&out, &Edit::default()).unwrap(),
            out,
            "the result is a GGUF file"
        );
    }

    #[test]
    fn a_truncated_file_is_an_error() {
        let full = sample();
        for n in 0..full.len() - 4 {
            assert!(
                edited(&full[..n], &Edit::default()).is_err() || n + 96 > full.len(),
                "{n} bytes"
            );
        }
    }
}
