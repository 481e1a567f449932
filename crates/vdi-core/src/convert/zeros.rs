//! Zeros in a buffer, found quickly.

use std::ops::Range;

/// Zeros are left out in steps of this size: a file system's usual block. Smaller
/// steps would save no space.
const STEP_BYTES: usize = 4096;

/// The parts of `buf` that are not zero, in steps that begin at multiples of
/// [`STEP_BYTES`] on the disk; neighbours in one piece.
pub(super) fn nonzero_pieces(buf: &[u8], at_bytes: u64) -> impl Iterator<Item = Range<usize>> + '_ {
    let first =
        STEP_BYTES - usize::try_from(at_bytes % STEP_BYTES as u64).expect("less than a step");
    let step_end = move |start: usize| {
        let end = if start < first {
            first
        } else {
            start - (start - first) % STEP_BYTES + STEP_BYTES
        };
        end.min(buf.len())
    };
    let is_data = move |start: usize| !is_zero(&buf[start..step_end(start)]);
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < buf.len() && !is_data(at) {
            at = step_end(at);
        }
        let start = at;
        while at < buf.len() && is_data(at) {
            at = step_end(at);
        }
        (start < at).then_some(start..at)
    })
}

/// Whether all bytes are zero; in the shape that the compiler makes vector code of.
pub(crate) fn is_zero(buf: &[u8]) -> bool {
    let (lines, rest) = buf.as_chunks::<64>();
    lines
        .iter()
        .all(|line| line.iter().fold(0, |seen, &byte| seen | byte) == 0)
        && rest.iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(buf: &[u8], at_bytes: u64) -> Vec<Range<usize>> {
        nonzero_pieces(buf, at_bytes).collect()
    }

    #[test]
    fn zeros_are_left_out_in_steps_of_the_disk_not_of_the_buffer() {
        let mut buf = vec![0; 5 * STEP_BYTES];
        assert_eq!(pieces(&buf, 0), []);
        buf[STEP_BYTES] = 1;
        buf[3 * STEP_BYTES - 1] = 1;
        assert_eq!(
            pieces(&buf, 0).as_slice(),
            std::slice::from_ref(&(STEP_BYTES..3 * STEP_BYTES))
        );
        // The buffer begins 512 bytes into a step: the steps end 512 bytes earlier in it.
        assert_eq!(pieces(&buf, 512), [3584..7680, 11_776..15_872]);
        *buf.last_mut().unwrap() = 1;
        assert_eq!(
            pieces(&buf, 0).last(),
            Some(&(4 * STEP_BYTES..5 * STEP_BYTES))
        );
    }

    #[test]
    fn the_pieces_hold_every_byte_that_is_not_zero() {
        for len in [1, 511, 512, 4095, 4096, 4097, 20_000] {
            for set in [0, len / 2, len - 1] {
                let mut buf = vec![0; len];
                buf[set] = 7;
                let found = pieces(&buf, 1536);
                assert_eq!(found.len(), 1, "{len} {set}");
                assert!(found[0].contains(&set), "{len} {set}");
                assert!(found[0].len() <= STEP_BYTES);
            }
        }
    }
}
