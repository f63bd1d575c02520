//! Calls of the service that a kubelet calls: gRPC over HTTP/2 on a socket.

use std::fmt;
use std::time::Duration;

use h2::client;
use http::{HeaderMap, Request};
use prost::Message;
use prost::bytes::{BufMut, Bytes, BytesMut};
use tokio::net::UnixStream;

use crate::stage::PATIENCE;

/// The service's socket.
pub const ADDRESS: &str = "/run/containerd.sock";

/// What gRPC puts in front of a message: not compressed, and its length.
const PREFIX: usize = 5;

/// A call that was refused.
#[derive(Debug)]
pub struct Refusal {
    /// Its status, a `codes.Code` of gRPC.
    pub code: u32,
    /// The reason.
    pub message: String,
}

impl Refusal {
    /// The time of the call, or of what it was to do, is over.
    pub const DEADLINE_EXCEEDED: u32 = 4;
    /// There is no such thing.
    pub const NOT_FOUND: u32 = 5;
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "status {}: {}", self.code, self.message)
    }
}

/// Calls a method of the runtime service.
pub fn call<A: Message + Default>(method: &str, request: &impl Message) -> Result<A, Refusal> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let (trailers, body) = runtime.expect("runtime").block_on(async {
        let exchange =
            tokio::time::timeout(PATIENCE + Duration::from_secs(10), exchange(method, request));
        exchange.await.expect("an answer in time").expect("HTTP/2 with the service")
    });
    let header =
        |name| trailers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    match header("grpc-status") {
        "0" => {
            let message = body.get(PREFIX..).expect("a message");
            Ok(A::decode(message).expect("the message of api.proto"))
        }
        code => {
            let code = code.parse().expect("a status");
            Err(Refusal { code, message: header("grpc-message").to_owned() })
        }
    }
}

/// Gives the trailers, where gRPC has its status, and the body.
async fn exchange(method: &str, message: &impl Message) -> Result<(HeaderMap, Bytes), h2::Error> {
    let socket = UnixStream::connect(ADDRESS).await.expect("containerd's socket");
    let (mut requests, connection) = client::handshake(socket).await?;
    tokio::spawn(async { drop(connection.await) });
    let request = Request::post(format!("http://localhost/runtime.v1.RuntimeService/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .expect("a request");
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.encoded_len()).expect("short"));
    message.encode(&mut frame).expect("room");
    let (answer, mut stream) = requests.send_request(request, false)?;
    stream.send_data(frame.freeze(), true)?;

    let (head, mut body) = answer.await?.into_parts();
    let mut received = BytesMut::new();
    while let Some(part) = body.data().await {
        let part = part?;
        body.flow_control().release_capacity(part.len())?;
        received.extend_from_slice(&part);
    }
    // A refusal may come without a body, and then its status is among the first headers.
    let trailers = body.trailers().await?.unwrap_or(head.headers);
    Ok((trailers, received.freeze()))
}
