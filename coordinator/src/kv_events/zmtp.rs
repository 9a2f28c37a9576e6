//! ZMTP 3.0, ZeroMQ's wire protocol (RFC 23 of the ZeroMQ project), as far as a publisher needs it: the NULL mechanism,
//! small frames in, frames of any size out.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::timeout,
};

/// For a peer to introduce itself.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// For a peer to take a message.
const WRITE_LIMIT: Duration = Duration::from_secs(30);
/// Peers send subscriptions and sequence numbers.
const MAX_FRAME: u64 = 4096;
const MAX_FRAMES: usize = 8;

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

#[derive(Debug, thiserror::Error)]
pub(super) enum ZmtpError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the peer {0}")]
    Peer(&'static str),
    #[error("a frame of {0} bytes, limit {MAX_FRAME}")]
    TooLong(u64),
    #[error("the peer did not {0} in time")]
    Late(&'static str),
}

pub(super) struct Frame {
    pub(super) more: bool,
    pub(super) command: bool,
    pub(super) body: Vec<u8>,
}

/// Introduces this side as a socket of type `own`; the peer must be one of `peers`.
pub(super) async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    own: &str,
    peers: &[&str],
) -> Result<(), ZmtpError> {
    timeout(HANDSHAKE_LIMIT, introduce(stream, own, peers))
        .await
        .map_err(|_| ZmtpError::Late("introduce itself"))?
}

async fn introduce<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    own: &str,
    peers: &[&str],
) -> Result<(), ZmtpError> {
    stream.write_all(&greeting()).await?;
    stream.write_all(&ready(own)).await?;
    let mut theirs = [0; 64];
    stream.read_exact(&mut theirs).await?;
    if theirs[0] != 0xFF || theirs[9] & 1 != 1 || theirs[10] < 3 {
        return Err(ZmtpError::Peer("does not speak ZMTP 3"));
    }
    if !theirs[12..32].starts_with(b"NULL\0") {
        return Err(ZmtpError::Peer("wants another security mechanism than NULL"));
    }
    let frame = read_frame(stream).await?;
    let kind = frame.body.strip_prefix(b"\x05READY").filter(|_| frame.command);
    let kind = kind
        .and_then(socket_type)
        .ok_or(ZmtpError::Peer("is not ready"))?;
    if peers.iter().any(|peer| peer.as_bytes() == kind) {
        Ok(())
    } else {
        Err(ZmtpError::Peer("is a socket of another type"))
    }
}

fn greeting() -> [u8; 64] {
    let mut greeting = [0; 64];
    greeting[0] = 0xFF;
    greeting[9] = 0x7F;
    greeting[10] = 3;
    greeting[12..16].copy_from_slice(b"NULL");
    greeting
}

/// The READY command with the one property that it needs.
fn ready(own: &str) -> Vec<u8> {
    let mut body = b"\x05READY\x0bSocket-Type".to_vec();
    body.extend((own.len() as u32).to_be_bytes());
    body.extend(own.as_bytes());
    let mut frame = vec![COMMAND, body.len() as u8];
    frame.extend(body);
    frame
}

/// The property of that name, whose case does not matter.
fn socket_type(mut properties: &[u8]) -> Option<&[u8]> {
    while let Some((&length, rest)) = properties.split_first() {
        let (name, rest) = rest.split_at_checked(length.into())?;
        let (length, rest) = rest.split_first_chunk::<4>()?;
        let (value, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        if name.eq_ignore_ascii_case(b"Socket-Type") {
            return Some(value);
        }
        properties = rest;
    }
    None
}

pub(super) async fn read_frame<R: AsyncRead + Unpin>(reader: &mut R) -> Result<Frame, ZmtpError> {
    let flags = reader.read_u8().await?;
    let length = if flags & LONG == 0 {
        u64::from(reader.read_u8().await?)
    } else {
        reader.read_u64().await?
    };
    if length > MAX_FRAME {
        return Err(ZmtpError::TooLong(length));
    }
    let mut body = vec![0; length as usize];
    reader.read_exact(&mut body).await?;
    Ok(Frame {
        more: flags & MORE != 0,
        command: flags & COMMAND != 0,
        body,
    })
}

/// The frames of one message; commands in between are passed over.
pub(super) async fn read_message<R: AsyncRead + Unpin>(reader: &mut R) -> Result<Vec<Vec<u8>>, ZmtpError> {
    let mut message = Vec::new();
    loop {
        let frame = read_frame(reader).await?;
        if frame.command {
            continue;
        }
        message.push(frame.body);
        if !frame.more {
            return Ok(message);
        }
        if message.len() == MAX_FRAMES {
            return Err(ZmtpError::Peer("sends too many frames"));
        }
    }
}

pub(super) async fn write_message<W: AsyncWrite + Unpin>(
    writer: &mut W,
    frames: &[&[u8]],
) -> Result<(), ZmtpError> {
    let mut bytes = Vec::new();
    for (index, frame) in frames.iter().enumerate() {
        let more = if index + 1 < frames.len() { MORE } else { 0 };
        match u8::try_from(frame.len()) {
            Ok(length) => bytes.extend([more, length]),
            Err(_) => {
                bytes.push(more | LONG);
                bytes.extend((frame.len() as u64).to_be_bytes());
            }
        }
        bytes.extend_from_slice(frame);
    }
    timeout(WRITE_LIMIT, writer.write_all(&bytes))
        .await
        .map_err(|_| ZmtpError::Late("take a message"))??;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn two_sides_understand_each_other() {
        let (mut publisher, mut subscriber) = tokio::io::duplex(256);
        let (ours, theirs) = tokio::join!(
            handshake(&mut publisher, "PUB", &["SUB", "XSUB"]),
            handshake(&mut subscriber, "SUB", &["PUB"])
        );
        ours.expect("a subscriber");
        theirs.expect("a publisher");
        let long = vec![7; 300];
        let send = async {
            write_message(&mut publisher, &[b"topic", &[], &long])
                .await
                .expect("sent");
        };
        let (_, message) = tokio::join!(send, read_message(&mut subscriber));
        assert_eq!(message.expect("a message"), [b"topic".to_vec(), vec![], long]);
    }

    #[tokio::test]
    async fn others_are_turned_away() {
        let (mut publisher, mut stranger) = tokio::io::duplex(256);
        let (ours, _) = tokio::join!(
            handshake(&mut publisher, "PUB", &["SUB", "XSUB"]),
            handshake(&mut stranger, "PULL", &["PUB"])
        );
        assert!(matches!(
            ours,
            Err(ZmtpError::Peer("is a socket of another type"))
        ));
        for (bytes, says) in [
            (
                &b"GET / HTTP/1.1\r\nhost: here\r\nuser-agent: a browser of some kind\r\n\r\n"[..],
                "ZMTP",
            ),
            (&[0xFF, 0, 0, 0, 0, 0, 0, 0, 0, 0x7F, 3][..], "early eof"),
        ] {
            let (mut publisher, mut stranger) = tokio::io::duplex(256);
            stranger.write_all(bytes).await.expect("sent");
            stranger.shutdown().await.expect("ended");
            let error = handshake(&mut publisher, "PUB", &["SUB"])
                .await
                .expect_err("refused");
            assert!(error.to_string().contains(says), "{error}");
        }
    }

    #[tokio::test]
    async fn a_length_is_not_believed() {
        let mut frame = &[LONG, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF][..];
        let error = read_frame(&mut frame).await.err().expect("refused");
        assert!(matches!(error, ZmtpError::TooLong(u64::MAX)));
        let mut endless = &[MORE, 0].repeat(20)[..];
        assert!(read_message(&mut endless).await.is_err());
        for properties in [
            &b"\x20Socket"[..],
            b"\x0bSocket-Type\xff\xff\xff\xffSUB",
            b"\x01a\x00",
        ] {
            assert_eq!(socket_type(properties), None);
        }
    }
}
