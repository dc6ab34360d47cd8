// SPDX-License-Identifier: Apache-2.0
//! String tensors, as Triton lays them out: for each element four bytes of length, little-endian, then the bytes.

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
}
