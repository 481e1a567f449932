//! A request in guest memory, cut into descriptors as a layout says.
//!
//! Not in a ring yet: descriptors are in order here, without a `next`.

use std::sync::Arc;

use super::layout::Layout;
use super::memory::{Buffer, Memory};
use super::request::{Request, UNTOUCHED};
use super::ring::{Descriptor, INDIRECT, NEXT, WRITE};

const HEADER_BYTES: u32 = 16;
const STATUS_BYTES: u32 = 1;

/// The pieces of a request in guest memory.
pub(super) struct Chain {
    pub(super) descriptors: Vec<Descriptor>,
    pub(super) writable: Vec<(u64, u32)>,
    pub(super) buffers: Vec<Buffer>,
}

impl Chain {
    /// Takes memory for a request and fills it.
    pub(super) fn new(memory: &Arc<Memory>, request: &Request, layout: &Layout) -> Self {
        let bytes = request.readable_bytes();
        let data = u32::try_from(request.data.len()).expect("tests send less than 4 GiB");
        let mut chain = Self {
            descriptors: Vec::new(),
            writable: Vec::new(),
            buffers: Vec::new(),
        };
        let readable = layout.readable_sizes(HEADER_BYTES, data);
        let writable = layout.writable_sizes(request.answer_bytes, STATUS_BYTES);
        let largest = readable.iter().chain(&writable).copied().max();
        let mut layout = layout.clone();
        let mut done = 0;
        for size in readable {
            let at = chain.place(memory, size, largest, &mut layout);
            memory.write(at, &bytes[done..done + size as usize]);
            done += size as usize;
            chain.push(at, size, 0, layout.empty_between);
        }
        for size in writable {
            let at = chain.place(memory, size, largest, &mut layout);
            memory.write(at, &vec![UNTOUCHED; size as usize]);
            chain.writable.push((at, size));
            chain.push(at, size, WRITE, layout.empty_between);
        }
        chain
    }

    fn place(
        &mut self,
        memory: &Arc<Memory>,
        size: u32,
        largest: Option<u32>,
        layout: &mut Layout,
    ) -> u64 {
        let len = u64::from(size);
        if largest == Some(size)
            && let Some(at) = layout.largest_at.take()
        {
            self.buffers.push(memory.claim(at, len));
            return at;
        }
        let buffer = memory.allocate(len + layout.misaligned_by, 512);
        let at = buffer.at() + layout.misaligned_by;
        self.buffers.push(buffer);
        at
    }

    fn push(&mut self, at: u64, len_bytes: u32, flags: u16, and_empty: bool) {
        let descriptor = Descriptor {
            at,
            len_bytes,
            flags,
            next: 0,
        };
        self.descriptors.push(descriptor);
        if and_empty {
            self.descriptors.push(Descriptor {
                len_bytes: 0,
                ..descriptor
            });
        }
    }

    /// Moves all but the first `count` descriptors into a table, and returns what stays outside.
    pub(super) fn move_into_table(
        &mut self,
        memory: &Arc<Memory>,
        count: usize,
        writable: bool,
    ) -> Vec<Descriptor> {
        let mut direct = self.descriptors.clone();
        let inside = direct.split_off(count.min(direct.len() - 1));
        let len = u32::try_from(inside.len()).expect("tables are short") * 16;
        let table = memory.allocate(u64::from(len), 16);
        let mut bytes = Vec::new();
        for (at, descriptor) in inside.iter().enumerate() {
            let mut linked = *descriptor;
            if at + 1 < inside.len() {
                linked.flags |= NEXT;
                linked.next = u16::try_from(at + 1).expect("tables are short");
            }
            bytes.extend(linked.to_bytes());
        }
        table.write(&bytes);
        direct.push(Descriptor {
            at: table.at(),
            len_bytes: len,
            flags: INDIRECT | if writable { WRITE } else { 0 },
            next: 0,
        });
        self.buffers.push(table);
        direct
    }
}
