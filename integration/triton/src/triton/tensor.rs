// SPDX-License-Identifier: Apache-2.0
//! String tensors, as Triton lays them out: for each element four bytes of length, little-endian, then the bytes.

use serde_json::{Number, Value, json};

use super::abi;
use super::error::Failure;

/// The elements of a BYTES tensor. The server does not check the lengths inside, so a client can send any.
///
/// `name` is the input's, for the error; `count` the number of elements that its shape says.
pub fn strings<'a>(name: &str, bytes: &'a [u8], count: usize) -> Result<Vec<&'a str>, Failure> {
    let mut rest = bytes;
    let mut found = Vec::new();
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        if length > after.len() {
            return Err(Failure::invalid(format!(
                "{name}: element {} says it has {length} bytes, the tensor has {} left",
                found.len(),
                after.len()
            )));
        }
        let (text, after) = after.split_at(length);
        let text = std::str::from_utf8(text).map_err(|error| {
            Failure::invalid(format!(
                "{name}: element {} is not UTF-8: {error}",
                found.len()
            ))
        })?;
        found.push(text);
        rest = after;
    }
    if !rest.is_empty() || found.len() != count {
        return Err(Failure::invalid(format!(
            "{name}: the shape says {count} elements, the data has {} and {} bytes more",
            found.len(),
            rest.len()
        )));
    }
    Ok(found)
}

/// One string as a BYTES element. Fails for a text whose length does not fit into four bytes.
pub fn element(text: &str) -> Result<Vec<u8>, Failure> {
    let length = u32::try_from(text.len()).map_err(|_| {
        Failure::internal(format!(
            "a text of {} bytes is too long for a tensor",
            text.len()
        ))
    })?;
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    Ok(bytes)
}

/// A tensor as JSON would have it: strings as a list, of the others the element, or a list where there is not one.
pub fn value(name: &str, datatype: u32, shape: &[i64], bytes: &[u8]) -> Result<Value, Failure> {
    let count = usize::try_from(shape.iter().product::<i64>()).unwrap_or(0);
    let scalars = |size: usize, read: fn(&[u8]) -> Value| {
        if Some(bytes.len()) != count.checked_mul(size) {
            return Err(Failure::invalid(format!(
                "{name}: has {} bytes, must have {size} for each of {count} elements",
                bytes.len()
            )));
        }
        let mut all: Vec<Value> = bytes.chunks_exact(size).map(read).collect();
        Ok(match all.len() {
            1 => all.remove(0),
            _ => Value::Array(all),
        })
    };
    match datatype {
        abi::TYPE_BYTES => {
            let all = strings(name, bytes, count)?;
            Ok(all.into_iter().map(Value::from).collect())
        }
        abi::TYPE_BOOL => scalars(1, |b| Value::Bool(b[0] != 0)),
        abi::TYPE_INT32 => scalars(4, |b| json!(i32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        abi::TYPE_UINT64 => scalars(8, |b| {
            json!(u64::from_le_bytes(std::array::from_fn(|i| b[i])))
        }),
        abi::TYPE_FP32 => scalars(4, |b| {
            let number = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            // JSON has no NaN: as a text it is refused by name.
            Number::from_f64(number.into()).map_or_else(|| json!(number.to_string()), Value::Number)
        }),
        other => Err(Failure::invalid(format!(
            "{name}: has data type {other}, which is not read"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_read_as_written() {
        let mut bytes = element("héllo").unwrap();
        bytes.extend(element("").unwrap());
        assert_eq!(strings("text_input", &bytes, 2).unwrap(), ["héllo", ""]);
        assert_eq!(&bytes[..4], [6, 0, 0, 0]);
    }

    #[test]
    fn wrong_lengths_are_refused_by_name() {
        let good = element("hello").unwrap();
        let mut long = good.clone();
        long[3] = 0xff;
        for (bytes, count) in [
            (&long[..], 1),
            (&good[..8], 1),
            (&good[..3], 1),
            (&good[..], 2),
            (&good[..], 0),
            (&[][..], 1),
            (&[1, 0, 0, 0, 0xff][..], 1),
        ] {
            let failure = strings("text_input", bytes, count).unwrap_err();
            assert!(failure.text.starts_with("text_input: "), "{}", failure.text);
        }
    }
    #[test]
    fn tensors_become_json() {
        let of = |kind, shape: &[i64], bytes: &[u8]| value("x", kind, shape, bytes);
        assert_eq!(
            of(abi::TYPE_INT32, &[1], &(-5i32).to_le_bytes()),
            Ok(json!(-5))
        );
        let two = [1i32.to_le_bytes(), 2i32.to_le_bytes()].concat();
        assert_eq!(of(abi::TYPE_INT32, &[2], &two), Ok(json!([1, 2])));
        assert_eq!(
            of(abi::TYPE_UINT64, &[1], &u64::MAX.to_le_bytes()),
            Ok(json!(u64::MAX))
        );
        assert_eq!(
            of(abi::TYPE_FP32, &[1], &0.5f32.to_le_bytes()),
            Ok(json!(0.5))
        );
        assert_eq!(
            of(abi::TYPE_FP32, &[1], &f32::NAN.to_le_bytes()),
            Ok(json!("NaN"))
        );
        assert_eq!(of(abi::TYPE_BOOL, &[1], &[1]), Ok(json!(true)));
        let text = [element("a").unwrap(), element("").unwrap()].concat();
        assert_eq!(of(abi::TYPE_BYTES, &[2], &text), Ok(json!(["a", ""])));
        let short = of(abi::TYPE_INT32, &[2], &[0; 4]).unwrap_err().text;
        assert_eq!(short, "x: has 4 bytes, must have 4 for each of 2 elements");
        assert!(of(9, &[1], &[0; 8]).is_err());
    }
}
