//! P4: whatever a guest puts into a ring and a front end into the socket, the daemon answers no and goes on.
//!
//! Not here: images that lie, and what a well-behaved driver gets.
//!
//! Rules: what a status byte can be written for ends with IOERR or UNSUPP; what cannot be a chain at all breaks the
//! ring, which the error eventfd tells. Either way other queues, the next connection and the disk are as before.

#![expect(clippy::unwrap_used, reason = "a test says by a panic what is wrong")]

mod acks;
mod bench;
mod broken;
mod descriptors;
mod flood;
mod front_end;
mod messages;
mod refused;
mod rings;
mod session;
mod state;
mod zeros;
