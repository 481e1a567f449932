//! The raw layer of a queue: any descriptors, any head, any index, and what becomes of them.
//!
//! Nothing here is checked before the device sees it. For requests see the layer above.

use std::time::{Duration, Instant};

use super::Queue;
use crate::driver::ring::{Descriptor, Used};

/// What became of a hostile chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It came back.
    Used(Used),
    /// The device said by the error eventfd that it gave the ring up.
    Broken,
    /// Nothing happened in the time given.
    Silence,
}

impl Queue {
    /// Writes descriptors from index `first` of the table, shows the device `first` as a head, and kicks.
    pub fn offer_chain(&mut self, first: u16, descriptors: &[Descriptor]) {
        for (index, descriptor) in (first..).zip(descriptors) {
            self.ring.set_descriptor(index, *descriptor);
        }
        self.offer(first);
    }

    /// Shows the device any number as a head, and kicks.
    pub fn offer(&mut self, head: u16) {
        self.offered.push(head);
        self.ring.set_available(self.available, head);
        self.available = self.available.wrapping_add(1);
        self.ring.set_available_index(self.available);
        self.kick();
    }

    /// Shows the device one head twice at once, and kicks.
    pub fn offer_twice(&mut self, head: u16) {
        self.offer_both(head, head);
    }

    /// Shows the device two heads at once, and kicks.
    pub fn offer_both(&mut self, first: u16, second: u16) {
        for head in [first, second] {
            self.offered.push(head);
            self.ring.set_available(self.available, head);
            self.available = self.available.wrapping_add(1);
        }
        self.ring.set_available_index(self.available);
        self.kick();
    }

    /// Shows the device any available index, and kicks.
    pub fn jump_to(&mut self, index: u16) {
        self.ring.set_available_index(index);
        self.kick();
    }

    /// Kicks, wanted or not.
    pub fn kick(&mut self) {
        self.kicks += 1;
        self.kick.write(1).expect("the counter is far from full");
    }

    /// Waits for what becomes of a chain that was offered.
    pub fn fate(&mut self, time: Duration) -> Fate {
        let deadline = Instant::now() + time;
        loop {
            self.reap();
            if let Some(used) = self.returned.pop() {
                return Fate::Used(used);
            }
            if self.broken_since.take().is_some() {
                return Fate::Broken;
            }
            if !self.sleep_until(deadline) {
                return Fate::Silence;
            }
        }
    }
}
