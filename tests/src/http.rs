//! A small HTTP client over one connection per request: what is sent and what comes back is plain to see.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::TcpStream,
    time::Duration,
};

use serde_json::Value;

const TIMEOUT: Duration = Duration::from_secs(120);

/// Status, headers (lower-case names) and body.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }
}

/// An open reply whose body is read line by line.
pub struct Stream {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    reader: BufReader<TcpStream>,
    /// Bytes left of the current chunk; none: not chunked, read to the end.
    chunk: Option<usize>,
    ended: bool,
}

pub fn get(address: &str, path: &str) -> io::Result<Reply> {
    send(address, ("GET", path), "", None)?.finish()
}

/// The same with a bearer token.
pub fn get_keyed(address: &str, path: &str, key: &str) -> io::Result<Reply> {
    let header = format!("authorization: Bearer {key}\r\n");
    send(address, ("GET", path), &header, None)?.finish()
}

pub fn post(address: &str, path: &str, body: &Value) -> io::Result<Reply> {
    open(address, path, body)?.finish()
}

/// The same with a bearer token.
pub fn post_keyed(address: &str, path: &str, key: &str, body: &Value) -> io::Result<Reply> {
    let header = format!("authorization: Bearer {key}\r\n");
    let body = body.to_string();
    send(address, ("POST", path), &header, Some(body.as_bytes()))?.finish()
}

pub fn post_bytes(address: &str, path: &str, body: &[u8]) -> io::Result<Reply> {
    send(address, ("POST", path), "", Some(body))?.finish()
}

/// Starts a request and returns as soon as the headers are here.
pub fn open(address: &str, path: &str, body: &Value) -> io::Result<Stream> {
    send(address, ("POST", path), "", Some(body.to_string().as_bytes()))
}

/// `headers` are lines, each ended by CRLF.
fn send(
    address: &str,
    (method, path): (&str, &str),
    headers: &str,
    body: Option<&[u8]>,
) -> io::Result<Stream> {
    let mut connection = TcpStream::connect(address)?;
    connection.set_read_timeout(Some(TIMEOUT))?;
    let body = body.unwrap_or_default();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n{headers}\r\n"
    );
    connection.write_all(head.as_bytes())?;
    connection.write_all(body)?;
    let mut reader = BufReader::new(connection);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.ok_or_else(|| io::Error::other(format!("no HTTP reply: {line:?}")))?;
    let mut headers = Vec::new();
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        headers.push((name.to_lowercase(), value.trim().to_owned()));
    }
    let chunked = headers
        .iter()
        .any(|(name, value)| name == "transfer-encoding" && value == "chunked");
    Ok(Stream {
        status,
        headers,
        reader,
        chunk: chunked.then_some(0),
        ended: false,
    })
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.ended {
            return Ok(0);
        }
        if self.chunk == Some(0) {
            let mut line = String::new();
            self.reader.read_line(&mut line)?;
            if line.trim().is_empty() {
                line.clear();
                self.reader.read_line(&mut line)?;
            }
            let size = usize::from_str_radix(line.trim(), 16);
            let size =
                size.map_err(|_| io::Error::new(io::ErrorKind::UnexpectedEof, "the reply was cut off"))?;
            if size == 0 {
                self.ended = true;
                return Ok(0);
            }
            self.chunk = Some(size);
        }
        let room = self.chunk.map_or(buffer.len(), |left| left.min(buffer.len()));
        let read = self.reader.read(&mut buffer[..room])?;
        if let Some(left) = &mut self.chunk {
            if read == 0 {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the reply was cut off",
                ));
            }
            *left -= read;
        }
        Ok(read)
    }
}

impl Stream {
    pub fn finish(mut self) -> io::Result<Reply> {
        let mut body = Vec::new();
        self.read_to_end(&mut body)?;
        Ok(Reply {
            status: self.status,
            headers: self.headers,
            body,
        })
    }

    /// The next server-sent event's data; none at the end of the reply.
    pub fn next_event(&mut self) -> io::Result<Option<String>> {
        loop {
            let mut line = Vec::new();
            let mut byte = [0];
            while self.read(&mut byte)? == 1 && byte[0] != b'\n' {
                line.push(byte[0]);
            }
            if line.is_empty() && self.ended {
                return Ok(None);
            }
            let line = String::from_utf8(line).map_err(io::Error::other)?;
            if let Some(data) = line.strip_prefix("data: ") {
                return Ok(Some(data.trim_end().to_owned()));
            }
        }
    }
}
