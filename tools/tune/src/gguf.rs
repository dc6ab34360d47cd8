// SPDX-License-Identifier: Apache-2.0

//! Writes the file of exits; its format is described in `llama-layer-exits.h`.

use half::f16;
use ndarray::{Array1, Array2};

pub enum Value {
    U32(u32),
    Text(String),
    U32s(Vec<u32>),
    F32s(Vec<f32>),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    F32 = 0,
    Q8_0 = 8,
    I32 = 26,
}

struct Tensor {
    name: String,
    /// The fastest dimension first.
    shape: Vec<u64>,
    kind: Kind,
    data: Vec<u8>,
}

#[derive(Default)]
pub struct Writer {
    values: Vec<(String, Value)>,
    tensors: Vec<Tensor>,
}

const ALIGNMENT: usize = 32;
/// Numbers of one scale in Q8_0.
const BLOCK: usize = 32;

impl Writer {
    pub fn set(&mut self, key: &str, value: Value) {
        self.values.push((key.into(), value));
    }

    pub fn vector(&mut self, name: String, v: &Array1<f32>) {
        let data = v.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.tensor(name, vec![v.len() as u64], Kind::F32, data);
    }

    pub fn integers(&mut self, name: &str, v: &[i32]) {
        let data = v.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.tensor(name.into(), vec![v.len() as u64], Kind::I32, data);
    }

    /// In Q8_0 where its rows have whole blocks, else in F32.
    pub fn matrix(&mut self, name: String, m: &Array2<f32>) {
        let shape = vec![m.ncols() as u64, m.nrows() as u64];
        let numbers: Vec<f32> = m.iter().copied().collect();
        if m.ncols().is_multiple_of(BLOCK) {
            let data = numbers.chunks(BLOCK).flat_map(q8_0).collect();
            self.tensor(name, shape, Kind::Q8_0, data);
        } else {
            let data = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
            self.tensor(name, shape, Kind::F32, data);
        }
    }

    fn tensor(&mut self, name: String, shape: Vec<u64>, kind: Kind, data: Vec<u8>) {
        self.tensors.push(Tensor {
            name,
            shape,
            kind,
            data,
        });
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.values.len() as u64).to_le_bytes());
        for (key, value) in &self.values {
            put_text(&mut out, key);
            put_value(&mut out, value);
        }
        let mut offset = 0u64;
        for t in &self.tensors {
            put_text(&mut out, &t.name);
            out.extend((t.shape.len() as u32).to_le_bytes());
            out.extend(t.shape.iter().flat_map(|n| n.to_le_bytes()));
            out.extend((t.kind as u32).to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += t.data.len().next_multiple_of(ALIGNMENT) as u64;
        }
        for t in &self.tensors {
            out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
            out.extend(&t.data);
        }
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        out
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    const U32: u32 = 4;
    const F32: u32 = 6;
    const TEXT: u32 = 8;
    const ARRAY: u32 = 9;
    let mut word = |n: u32| out.extend(n.to_le_bytes());
    match value {
        Value::U32(n) => {
            word(U32);
            word(*n);
        }
        Value::Text(text) => {
            word(TEXT);
            put_text(out, text);
        }
        Value::U32s(all) => {
            word(ARRAY);
            word(U32);
            out.extend((all.len() as u64).to_le_bytes());
            out.extend(all.iter().flat_map(|n| n.to_le_bytes()));
        }
        Value::F32s(all) => {
            word(ARRAY);
            word(F32);
            out.extend((all.len() as u64).to_le_bytes());
            out.extend(all.iter().flat_map(|n| n.to_le_bytes()));
        }
    }
}

/// A scale and 32 signed bytes.
fn q8_0(block: &[f32]) -> [u8; 2 + BLOCK] {
    let most = block.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let scale = most / 127.0;
    let mut out = [0; 2 + BLOCK];
    out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for (to, x) in out[2..].iter_mut().zip(block) {
        *to = (x * inverse).round() as i8 as u8;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_holds_its_numbers() {
        let x: Vec<f32> = (0..32).map(|i| (i as f32 - 11.0) * 0.3).collect();
        let q = q8_0(&x);
        let scale = f16::from_le_bytes([q[0], q[1]]).to_f32();
        for (x, &q) in x.iter().zip(&q[2..]) {
            assert!((x - scale * f32::from(q as i8)).abs() <= 0.6 * scale);
        }
        assert_eq!(q8_0(&[0.0; 32]), [0; 34]);
    }

    #[test]
    fn a_file_byte_by_byte() {
        let mut w = Writer::default();
        w.set("k", Value::U32(7));
        w.integers("t", &[5]);
        let mut want = b"GGUF".to_vec();
        want.extend([3, 0, 0, 0]);
        want.extend([1, 0, 0, 0, 0, 0, 0, 0]);
        want.extend([1, 0, 0, 0, 0, 0, 0, 0]);
        want.extend([1, 0, 0, 0, 0, 0, 0, 0, b'k', 4, 0, 0, 0, 7, 0, 0, 0]);
        want.extend([1, 0, 0, 0, 0, 0, 0, 0, b't', 1, 0, 0, 0]);
        want.extend([1, 0, 0, 0, 0, 0, 0, 0, 26, 0, 0, 0]);
        want.extend([0; 8]);
        want.resize(want.len().next_multiple_of(32), 0);
        want.extend([5, 0, 0, 0]);
        want.resize(want.len().next_multiple_of(32), 0);
        assert_eq!(w.bytes(), want);
    }
}
