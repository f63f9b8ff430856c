//! Pages that come beside the stream, on multifd channels.
//!
//! ```text
//! accept   the stream and N channels, in any order
//! receive  each connection in a thread of its own, straight into the buffers of the writes
//! rounds   at the end of each, all threads wait: the next round may send the same pages again
//! ```

mod channel;
mod connections;
mod inflater;
mod order;
mod rounds;

pub use channel::{Channel, ChannelCounts};
pub use connections::Connections;
pub use rounds::{Rounds, StreamRounds};
