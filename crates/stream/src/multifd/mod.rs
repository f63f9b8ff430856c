//! Pages that come beside the stream, on multifd channels.
//!
//! ```text
//! accept   the stream and N channels, in any order
//! receive  each in a thread of its own, straight into buffers that are written from
//! rounds   at whose ends all wait for one another: the next one may have the same pages again
//! ```

mod channel;
mod connections;
mod inflater;
mod order;
mod rounds;

pub use channel::{Channel, ChannelCounts};
pub use connections::Connections;
pub use rounds::{Rounds, StreamRounds};
