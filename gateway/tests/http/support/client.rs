//! HTTP/1.1 by hand, so that tests see the bytes and can break off where they like.

use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, ToSocketAddrs},
};

/// A reply, with a chunked body joined.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    head: String,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("a body in UTF-8")
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// The data of every event of a stream.
    pub(crate) fn events(&self) -> Vec<&str> {
        let text = self.text();
        assert!(text.ends_with("\n\n"), "{text}");
        let events = text.trim_end_matches('\n').split("\n\n");
        events
            .map(|event| event.strip_prefix("data: ").expect("a data line"))
            .collect()
    }

    /// Name and data of every event of a stream whose events have names.
    pub(crate) fn named_events(&self) -> Vec<(String, Value)> {
        let events = self.text().trim_end().split("\n\n");
        events
            .map(|event| {
                let (name, data) = event.split_once('\n').expect("two lines");
                let name = name.strip_prefix("event: ").expect("a name").to_owned();
                let data = data.strip_prefix("data: ").expect("data");
                (name, serde_json::from_str(data).expect("JSON"))
            })
            .collect()
    }

    fn parse(bytes: &[u8]) -> Self {
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n");
        let end = end.unwrap_or_else(|| panic!("no head in {:?}", String::from_utf8_lossy(bytes)));
        let head = String::from_utf8(bytes[..end].to_vec()).expect("a head in UTF-8");
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .expect("a status");
        let mut reply = Self {
            status,
            head,
            body: bytes[end + 4..].to_vec(),
        };
        if reply.header("transfer-encoding") == Some("chunked") {
            reply.body = join_chunks(&reply.body);
        }
        reply
    }
}

fn join_chunks(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let line = rest
            .windows(2)
            .position(|window| window == b"\r\n")
            .expect("a chunk size");
        let size = std::str::from_utf8(&rest[..line]).expect("a chunk size in ASCII");
        let size = usize::from_str_radix(size, 16).expect("a chunk size in hexadecimal");
        rest = &rest[line + 2..];
        if size == 0 {
            return body;
        }
        body.extend_from_slice(&rest[..size]);
        rest = &rest[size + 2..];
    }
}

/// A connection to a gateway.
pub(crate) struct Connection<T = TcpStream>(pub(crate) T);

impl Connection {
    pub(crate) async fn open(address: impl ToSocketAddrs) -> Self {
        Self(TcpStream::connect(address).await.expect("connect"))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> Connection<T> {
    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.expect("send");
    }

    /// Sends a POST without waiting for the reply.
    pub(crate) async fn send_post(&mut self, path: &str, headers: &str, body: &[u8]) {
        let length = body.len();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
        );
        self.send(head.as_bytes()).await;
        self.send(body).await;
    }

    /// Reads until `needle` has come, and returns all that came.
    pub(crate) async fn read_until(&mut self, needle: &str) -> String {
        let mut bytes = Vec::new();
        while !bytes
            .windows(needle.len())
            .any(|window| window == needle.as_bytes())
        {
            let count = self.0.read_buf(&mut bytes).await.expect("read");
            assert!(
                count > 0,
                "closed before {needle:?}: {:?}",
                String::from_utf8_lossy(&bytes)
            );
        }
        String::from_utf8(bytes).expect("UTF-8")
    }

    /// Reads `count` bytes and forgets them.
    pub(crate) async fn skip(&mut self, count: u64) {
        let mut bytes = (&mut self.0).take(count);
        let skipped = tokio::io::copy(&mut bytes, &mut tokio::io::sink())
            .await
            .expect("read");
        assert_eq!(skipped, count, "closed early");
    }

    /// Reads to the end of the connection; nothing is `None`.
    pub(crate) async fn reply(mut self) -> Option<Reply> {
        let mut bytes = Vec::new();
        self.0.read_to_end(&mut bytes).await.expect("read");
        (!bytes.is_empty()).then(|| Reply::parse(&bytes))
    }
}

async fn exchange(address: impl ToSocketAddrs, request: &str) -> Reply {
    let mut connection = Connection::open(address).await;
    connection.send(request.as_bytes()).await;
    connection.reply().await.expect("a reply")
}

pub(crate) async fn get(address: impl ToSocketAddrs, path: &str) -> Reply {
    exchange(
        address,
        &format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
    )
    .await
}

/// GET with extra header lines, each ended by CRLF.
pub(crate) async fn get_with(address: impl ToSocketAddrs, path: &str, headers: &str) -> Reply {
    exchange(
        address,
        &format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n"),
    )
    .await
}

pub(crate) async fn delete(address: impl ToSocketAddrs, path: &str) -> Reply {
    exchange(
        address,
        &format!("DELETE {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
    )
    .await
}

/// POST with extra header lines, each ended by CRLF.
pub(crate) async fn post_with(address: impl ToSocketAddrs, path: &str, headers: &str, body: &[u8]) -> Reply {
    let mut connection = Connection::open(address).await;
    connection.send_post(path, headers, body).await;
    connection.reply().await.expect("a reply")
}

pub(crate) async fn post(address: impl ToSocketAddrs, path: &str, body: &str) -> Reply {
    post_with(
        address,
        path,
        "Content-Type: application/json\r\n",
        body.as_bytes(),
    )
    .await
}
