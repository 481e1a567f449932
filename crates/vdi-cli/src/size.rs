//! Sizes as people write and read them.
//!
//! Suffixes are powers of 1024, as `qemu-img` has them, with or without `iB`:
//! `64k`, `64K` and `64KiB` are the same. `KB`, `MB` and so on are powers of 1000
//! to some and of 1024 to others, so they are refused rather than guessed.

use std::fmt;

/// The suffixes and the powers of two they stand for.
const UNITS: [(char, u32); 6] = [
    ('K', 10),
    ('M', 20),
    ('G', 30),
    ('T', 40),
    ('P', 50),
    ('E', 60),
];

/// Most digits behind the point: enough for a byte of a TiB, few enough for 128-bit arithmetic.
const MOST_DECIMALS: usize = 12;

/// Why a text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SizeError {
    #[error("not a size; write a number and perhaps a unit, such as 512, 64k, 1.5G or 20GiB")]
    NotASize,
    #[error(
        "`{unit}B` is a power of 1000 to some and of 1024 to others; \
         write {unit} or {unit}iB for the power of 1024"
    )]
    Ambiguous { unit: char },
    #[error("a byte has no parts; give fractions a unit, such as 1.5G")]
    PartOfAByte,
    #[error("at most {MOST_DECIMALS} digits may follow the point")]
    TooManyDecimals,
    #[error("more than {limit} bytes, the largest size of a file", limit = i64::MAX)]
    TooLarge,
}

/// Reads a size such as `10`, `512b`, `1.5G` or `20 GiB`, in bytes.
pub(crate) fn parse(text: &str) -> Result<u64, SizeError> {
    let text = text.trim();
    let number_len = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(number_len);
    let power = power_of(suffix.trim_start())?;
    let (whole, decimals) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || decimals.contains('.') || number.ends_with('.') {
        return Err(SizeError::NotASize);
    }
    if power == 0 && !decimals.is_empty() {
        return Err(SizeError::PartOfAByte);
    }
    if decimals.len() > MOST_DECIMALS {
        return Err(SizeError::TooManyDecimals);
    }
    let whole: u64 = whole.parse().map_err(|_| SizeError::TooLarge)?;
    let part: u128 = if decimals.is_empty() {
        0
    } else {
        decimals.parse().map_err(|_| SizeError::NotASize)?
    };
    let scale = 10_u128.pow(u32::try_from(decimals.len()).map_err(|_| SizeError::TooManyDecimals)?);
    let bytes = (u128::from(whole) << power) + (part << power) / scale;
    i64::try_from(bytes)
        .map(i64::cast_unsigned)
        .map_err(|_| SizeError::TooLarge)
}

/// The power of two that `suffix` stands for.
fn power_of(suffix: &str) -> Result<u32, SizeError> {
    let mut letters = suffix.chars();
    let Some(first) = letters.next() else {
        return Ok(0);
    };
    let rest = letters.as_str();
    if matches!(first, 'b' | 'B') && rest.is_empty() {
        return Ok(0);
    }
    let unit = first.to_ascii_uppercase();
    let power = UNITS
        .iter()
        .find(|(name, _)| *name == unit)
        .map(|(_, power)| *power);
    match (power, rest.to_ascii_lowercase().as_str()) {
        (Some(power), "" | "ib") => Ok(power),
        (Some(_), "b") => Err(SizeError::Ambiguous { unit }),
        _ => Err(SizeError::NotASize),
    }
}

/// Shows a number of bytes with three significant digits and a binary unit: `1.5 GiB`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Human(pub(crate) u64);

impl fmt::Display for Human {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((unit, power)) = UNITS.iter().rev().find(|(_, power)| self.0 >> power > 0) else {
            return write!(f, "{} B", self.0);
        };
        let one = 1_u128 << power;
        // Enough decimals for three digits in all; 1023 stays whole.
        let (scale, width) = match self.0 >> power {
            0..=9 => (100, 2),
            10..=99 => (10, 1),
            _ => (1, 0),
        };
        let rounded = (u128::from(self.0) * scale + one / 2) / one;
        let (whole, part) = (rounded / scale, rounded % scale);
        if part == 0 {
            return write!(f, "{whole} {unit}iB");
        }
        let part = format!("{part:0width$}");
        write!(f, "{whole}.{} {unit}iB", part.trim_end_matches('0'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_powers_of_1024_however_they_are_written() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512b", 512),
            ("1k", 1 << 10),
            ("1K", 1 << 10),
            ("1KiB", 1 << 10),
            ("1kib", 1 << 10),
            ("10M", 10 << 20),
            ("10 MiB", 10 << 20),
            (" 3g ", 3 << 30),
            ("2T", 2 << 40),
            ("1P", 1 << 50),
            ("7E", 7 << 60),
            ("1.5G", 3 << 29),
            ("0.25M", 256 << 10),
            ("9223372036854775807", i64::MAX.cast_unsigned()),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_its_reason() {
        for (text, error) in [
            ("", SizeError::NotASize),
            ("G", SizeError::NotASize),
            ("-1", SizeError::NotASize),
            ("0x10", SizeError::NotASize),
            ("1.", SizeError::NotASize),
            (".5G", SizeError::NotASize),
            ("1.2.3G", SizeError::NotASize),
            ("10Q", SizeError::NotASize),
            ("10Mb5", SizeError::NotASize),
            ("1é", SizeError::NotASize),
            ("10MB", SizeError::Ambiguous { unit: 'M' }),
            ("10kb", SizeError::Ambiguous { unit: 'K' }),
            ("1.5", SizeError::PartOfAByte),
            ("1.5b", SizeError::PartOfAByte),
            ("1.0000000000001G", SizeError::TooManyDecimals),
            ("8E", SizeError::TooLarge),
            ("9223372036854775808", SizeError::TooLarge),
            ("99999999999999999999999T", SizeError::TooLarge),
            ("18446744073709551615E", SizeError::TooLarge),
        ] {
            assert_eq!(parse(text), Err(error), "{text}");
        }
    }

    #[test]
    fn people_see_three_digits_and_a_unit() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10 << 20, "10 MiB"),
            ((2 << 20) + 512, "2 MiB"),
            (3_157_000, "3.01 MiB"),
            (1023 << 20, "1023 MiB"),
            ((1 << 40) - 1, "1024 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(Human(bytes).to_string(), text, "{bytes}");
        }
    }
}
