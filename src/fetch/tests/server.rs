//! An HTTP server on 127.0.0.1 that answers as badly as a test wants.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// A request as far as tests look at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub path: String,
    /// `n` of `Range: bytes=n-`.
    pub from: Option<usize>,
    /// How many requests came before it.
    pub before: usize,
}

pub(crate) struct Server {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// `answer` writes the whole answer, head and all; then the connection is closed.
    pub(crate) fn start(
        answer: impl Fn(&Request, &mut TcpStream) -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (requests, stop) =
            (Arc::<Mutex<Vec<Request>>>::default(), Arc::<AtomicBool>::default());
        let (seen, stopped, answer) = (requests.clone(), stop.clone(), Arc::new(answer));
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                let (seen, answer, mut stream) = (seen.clone(), answer.clone(), stream.unwrap());
                std::thread::spawn(move || {
                    let Some(mut request) = read_head(&stream) else { return };
                    {
                        let mut seen = seen.lock().unwrap();
                        request.before = seen.len();
                        seen.push(request.clone());
                    }
                    // The client may hang up on a bad answer.
                    let _ = answer(&request, &mut stream);
                });
            }
        });
        Server { address, requests, stop, thread: Some(thread) }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.address)
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        let _ = self.thread.take().unwrap().join();
    }
}

fn read_head(stream: &TcpStream) -> Option<Request> {
    let mut request = Request { path: String::new(), from: None, before: 0 };
    for (i, line) in BufReader::new(stream).lines().enumerate() {
        let line = line.ok()?;
        if line.is_empty() {
            return Some(request);
        }
        if i == 0 {
            request.path = line.split(' ').nth(1)?.trim_start_matches('/').to_string();
        }
        if let Some(range) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
            request.from = range.strip_suffix('-')?.parse().ok();
        }
    }
    None
}

/// A head with a status such as `404 Not Found` and more header lines.
pub(crate) fn write_head(to: &mut TcpStream, status: &str, more: &str) -> std::io::Result<()> {
    write!(to, "HTTP/1.1 {status}\r\nConnection: close\r\n{more}\r\n")
}

pub(crate) fn write_status(to: &mut TcpStream, status: &str) -> std::io::Result<()> {
    write_head(to, status, "Content-Length: 0\r\n")
}

/// The head of a good answer, honouring the range; what is to be sent after it.
pub(crate) fn write_good_head<'a>(
    to: &mut TcpStream,
    request: &Request,
    body: &'a [u8],
) -> std::io::Result<&'a [u8]> {
    let Some(from) = request.from else {
        write_head(to, "200 OK", &format!("Content-Length: {}\r\n", body.len()))?;
        return Ok(body);
    };
    if from >= body.len() {
        write_status(to, "416 Range Not Satisfiable")?;
        return Ok(&[]);
    }
    let more = format!(
        "Content-Length: {}\r\nContent-Range: bytes {from}-{}/{}\r\n",
        body.len() - from,
        body.len() - 1,
        body.len()
    );
    write_head(to, "206 Partial Content", &more)?;
    Ok(&body[from..])
}

pub(crate) fn write_good(
    to: &mut TcpStream,
    request: &Request,
    body: &[u8],
) -> std::io::Result<()> {
    let rest = write_good_head(to, request, body)?;
    to.write_all(rest)
}
