//! One connection to the guard: lines in, lines out, never waiting.
//!
//! The rule that would surprise: what a peer that has hung up had sent is dropped unread. It gave up waiting for the answer; to carry
//! out its order now would be to surprise it.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use super::protocol::{MESSAGE_MAX_BYTES, Response};
use super::sys::{self, Peer};

/// Most bytes that wait for a peer that does not read.
const UNSENT_MAX_BYTES: usize = 64 * 1024;
const READ_BYTES: usize = 16 * 1024;

/// What a connection may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Has not said hello.
    Stranger,
    /// Speaks another version: may ask for an upgrade, if it is the owner's.
    OtherVersion {
        /// Belongs to the daemon.
        owner: bool,
    },
    /// May look.
    Looker,
    /// Belongs to the daemon.
    Owner,
}

/// See the module.
pub struct Connection {
    stream: UnixStream,
    /// Who is at the other end.
    pub peer: Peer,
    /// What it may do.
    pub standing: Standing,
    /// Gets a line at each change.
    pub subscribed: bool,
    received: Vec<u8>,
    unsent: Vec<u8>,
}

impl Connection {
    /// Takes over an accepted stream.
    ///
    /// # Errors
    /// When the peer is neither of our user nor root, or the stream cannot be set up.
    pub fn new(stream: UnixStream, our_uid: u32) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let peer = sys::peer(&stream)?;
        if peer.uid != our_uid && peer.uid != 0 {
            return Err(io::Error::from(io::ErrorKind::PermissionDenied));
        }
        Ok(Self { stream, peer, standing: Standing::Stranger, subscribed: false, received: Vec::new(), unsent: Vec::new() })
    }

    /// Takes what has arrived. `Ok(false)`: the peer has hung up.
    ///
    /// # Errors
    /// A line without an end.
    pub fn receive(&mut self) -> io::Result<bool> {
        let mut piece = [0; READ_BYTES];
        loop {
            match self.stream.read(&mut piece) {
                Ok(0) => return Ok(false),
                Ok(count) => self.received.extend_from_slice(&piece[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if self.received.len() > MESSAGE_MAX_BYTES {
                return Err(io::Error::from(io::ErrorKind::InvalidData));
            }
        }
    }

    /// The next whole line, without its newline.
    pub fn next_line(&mut self) -> Option<Vec<u8>> {
        let end = self.received.iter().position(|byte| *byte == b'\n')?;
        let mut line: Vec<u8> = self.received.drain(..=end).collect();
        line.pop();
        Some(line)
    }

    /// Says one line, as far as the socket takes it now.
    ///
    /// # Errors
    /// The peer does not read, or is gone: drop the connection.
    pub fn say(&mut self, response: &Response) -> io::Result<()> {
        serde_json::to_writer(&mut self.unsent, response)?;
        self.unsent.push(b'\n');
        self.flush()
    }

    /// Sends what waits.
    ///
    /// # Errors
    /// As for [`Connection::say`].
    pub fn flush(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        // A subscriber that left one line unread is frozen or too slow; one that asks reads its answers before it asks again.
        let limit = if self.subscribed { 0 } else { UNSENT_MAX_BYTES };
        if self.unsent.len() > limit { Err(io::Error::from(io::ErrorKind::WouldBlock)) } else { Ok(()) }
    }

    /// Whether something waits to be sent.
    pub fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Its stream, for an upgrade.
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
