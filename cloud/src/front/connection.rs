//! One client's connection: frames in, frames out, answers in the order of the questions.
//!
//! ```text
//! +-----------+--------------------------+
//! | size: i32 | header and body          |     big-endian; size counts what follows it
//! +-----------+--------------------------+
//! ```
//! Kafka answers strictly in order, and so does this: one request is worked on at a time, a Fetch that waits holds back
//! what comes behind it. The exception is Produce behind Produce: an append takes its place in the log when it is
//! called, so several may wait for the same disk together, and are still answered in order. Without that one connection
//! could not append more than one request per fsync.

use std::io::IoSlice;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesOrdered;
use kafka_wire::{ApiKey, Encoded};
use shared::door::{LEAVE_PAUSE, Seat};
use shared::log::BoxFuture;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Instant, timeout, timeout_at};

use super::dispatch::{self, Close, Reply};
use super::{Broker, Listener, ORDINARY_REQUEST_BYTES_MAX, RequestContext, memory_units};

/// Most Produce requests of one connection that wait for the disk together.
const PIPELINE_MAX: usize = 64;
/// What a read asks the socket for when nothing is known yet.
const READ_BYTES: usize = 4 * 1024;
/// Most that is set aside for a request before its bytes are there.
const AHEAD_BYTES: usize = 1024 * 1024;
/// Size field, key, version and correlation id: the least that can be a request.
const PREFIX_BYTES: usize = 4;
const REQUEST_BYTES_MIN: usize = 8;
/// Slices handed to one write; the system takes 1024 at most.
const SLICES_MAX: usize = 64;
/// How long answers that are being worked on may take once the broker stops.
const DRAIN: Duration = Duration::from_secs(2);
/// How long the end of a connection may take.
const FAREWELL: Duration = Duration::from_secs(1);

/// Serves a connection until it ends, and says why it did.
pub(super) async fn run(
    broker: &Arc<Broker>,
    listener: Arc<Listener>,
    peer: SocketAddr,
    stream: TcpStream,
    seat: &Seat,
    shutdown: watch::Receiver<bool>,
) -> Close {
    tokio::select! {
        close = handshake(broker, listener, peer, stream, seat, shutdown) => close,
        () = seat.evicted() => {
            tokio::time::sleep(LEAVE_PAUSE).await;
            Close::Evicted
        }
    }
}

async fn handshake(
    broker: &Arc<Broker>,
    listener: Arc<Listener>,
    peer: SocketAddr,
    stream: TcpStream,
    seat: &Seat,
    shutdown: watch::Receiver<bool>,
) -> Close {
    // An answer must not wait for the client's acknowledgement of the one before.
    if let Err(error) = stream.set_nodelay(true) {
        return Close::Failed(error);
    }
    match listener.tls.clone() {
        None => serve(broker, listener, peer, stream, seat, shutdown).await,
        Some(tls) => {
            let handshake = tokio_rustls::TlsAcceptor::from(tls).accept(stream);
            match timeout(broker.settings.first_request_timeout, handshake).await {
                Ok(Ok(stream)) => serve(broker, listener, peer, stream, seat, shutdown).await,
                Ok(Err(error)) => Close::Failed(error),
                Err(_) => Close::Silent,
            }
        }
    }
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    broker: &Arc<Broker>,
    listener: Arc<Listener>,
    peer: SocketAddr,
    stream: S,
    seat: &Seat,
    shutdown: watch::Receiver<bool>,
) -> Close {
    let mut stop = shutdown.clone();
    let mut connection = Connection {
        broker,
        listener,
        peer,
        seat,
        stream,
        frames: Frames::new(Instant::now() + broker.settings.first_request_timeout),
        answers: FuturesOrdered::new(),
        held: None,
        pipelining: true,
        ended: false,
        shutdown,
    };
    let too_late = async {
        let _ = stop.wait_for(|stop| *stop).await;
        tokio::time::sleep(DRAIN).await;
    };
    let close = tokio::select! {
        Err(close) = connection.run() => close,
        () = too_late => Close::Shutdown,
    };
    // TLS peers take an end without a farewell for an attack.
    let _ = timeout(FAREWELL, connection.stream.shutdown()).await;
    close
}

struct Connection<'a, S> {
    broker: &'a Arc<Broker>,
    listener: Arc<Listener>,
    peer: SocketAddr,
    seat: &'a Seat,
    stream: S,
    frames: Frames,
    /// What is being worked on, in order.
    answers: FuturesOrdered<BoxFuture<'static, Result<Reply, Close>>>,
    /// A request that was read and may only begin when the answers before it are out.
    held: Option<Frame>,
    /// Everything in `answers` is a Produce, so another may begin behind it.
    pipelining: bool,
    /// No more requests are read.
    ended: bool,
    shutdown: watch::Receiver<bool>,
}

enum Step {
    Read(Option<Frame>),
    Answer(Reply),
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<'_, S> {
    /// Never returns `Ok`: a connection ends for a reason.
    async fn run(&mut self) -> Result<std::convert::Infallible, Close> {
        loop {
            match self.step().await? {
                Step::Read(None) => self.ended = true,
                Step::Read(Some(frame)) if self.may_begin(&frame) => self.begin(frame)?,
                Step::Read(Some(frame)) => self.held = Some(frame),
                Step::Answer(reply) => {
                    self.send(reply).await?;
                    if self.answers.is_empty()
                        && let Some(frame) = self.held.take()
                    {
                        self.begin(frame)?;
                    }
                }
            }
        }
    }

    async fn step(&mut self) -> Result<Step, Close> {
        let working = !self.answers.is_empty();
        let room = !working || (self.pipelining && self.answers.len() < PIPELINE_MAX);
        let may_read = !self.ended && self.held.is_none() && room;
        tokio::select! {
            biased;
            Some(answer) = self.answers.next(), if working => answer.map(Step::Answer),
            frame = self.frames.next(&mut self.stream, self.broker), if may_read => frame.map(Step::Read),
            _ = self.shutdown.wait_for(|stop| *stop), if !self.ended => Ok(Step::Read(None)),
            else => Err(Close::Gone),
        }
    }

    fn may_begin(&self, frame: &Frame) -> bool {
        self.answers.is_empty() || frame.is_produce()
    }

    fn begin(&mut self, frame: Frame) -> Result<(), Close> {
        self.pipelining = frame.is_produce();
        self.broker.counters.requests.add(1);
        self.broker.counters.request_bytes.add((frame.bytes.len() + PREFIX_BYTES) as u64);
        let context =
            RequestContext { api_version: 0, client_id: None, peer: self.peer, listener: self.listener.clone() };
        let answer = dispatch::begin(self.broker, context, frame.bytes)?;
        self.seat.known();
        let permit = frame.permit;
        self.answers.push_back(Box::pin(async move {
            let reply = answer.await;
            drop(permit);
            reply
        }));
        Ok(())
    }

    async fn send(&mut self, reply: Reply) -> Result<(), Close> {
        let Some(encoded) = reply.encoded else { return Ok(()) };
        self.broker.counters.response_bytes.add(encoded.length as u64);
        let time = self.broker.transfer_time(encoded.length);
        match timeout(time, write_all(&mut self.stream, encoded)).await {
            Ok(written) => written.map_err(Close::Failed),
            Err(_) => Err(Close::Slow),
        }
    }
}

async fn write_all<S: AsyncWrite + Unpin>(stream: &mut S, encoded: Encoded) -> std::io::Result<()> {
    let mut chunks = encoded.chunks;
    let mut first = 0;
    while let Some(rest) = chunks.get_mut(first..).filter(|rest| !rest.is_empty()) {
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let count = rest.len().min(SLICES_MAX);
        slices.iter_mut().zip(rest.iter()).for_each(|(slice, chunk)| *slice = IoSlice::new(chunk));
        let mut written = stream.write_vectored(&slices[..count]).await?;
        if written == 0 {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        for chunk in rest {
            if written < chunk.len() {
                chunk.advance(written);
                break;
            }
            written -= chunk.len();
            *chunk = Bytes::new();
            first += 1;
        }
    }
    stream.flush().await
}

/// A whole request and the memory it was granted.
struct Frame {
    bytes: Bytes,
    permit: OwnedSemaphorePermit,
}

impl Frame {
    fn is_produce(&self) -> bool {
        self.bytes.starts_with(&(ApiKey::Produce as i16).to_be_bytes())
    }
}

/// Cuts the stream of bytes into frames.
struct Frames {
    buffer: BytesMut,
    /// When the size of the first frame must be there; none once it was.
    first_due: Option<Instant>,
    /// Memory granted to the frame that is being read.
    permit: Option<OwnedSemaphorePermit>,
    /// When that frame must be whole.
    due: Option<Instant>,
}

impl Frames {
    fn new(first_due: Instant) -> Self {
        Self { buffer: BytesMut::new(), first_due: Some(first_due), permit: None, due: None }
    }

    /// The next frame, `None` when the client ended between two. May be dropped and called again at any point.
    async fn next<S: AsyncRead + Unpin>(&mut self, stream: &mut S, broker: &Broker) -> Result<Option<Frame>, Close> {
        let idle_until = Instant::now() + broker.settings.idle_timeout;
        loop {
            if let Some(frame) = self.cut(broker).await? {
                return Ok(Some(frame));
            }
            let (until, late) = match self.due {
                None => (idle_until, Close::Idle),
                Some(due) => (due, Close::Slow),
            };
            let (until, late) = match self.first_due {
                Some(first) if first < until => (first, Close::Silent),
                _ => (until, late),
            };
            let read = timeout_at(until, stream.read_buf(&mut self.buffer)).await.map_err(|_| late)?;
            if read.map_err(Close::Failed)? == 0 {
                return if self.buffer.is_empty() { Ok(None) } else { Err(Close::Cut) };
            }
            self.due.get_or_insert_with(|| Instant::now() + broker.settings.transfer_timeout);
        }
    }

    /// Takes a frame off the buffer, or makes room for more bytes of it.
    async fn cut(&mut self, broker: &Broker) -> Result<Option<Frame>, Close> {
        let Some(size) = self.size(broker)? else {
            self.buffer.reserve(READ_BYTES);
            return Ok(None);
        };
        if self.permit.is_none() {
            let memory = match size {
                ..=ORDINARY_REQUEST_BYTES_MAX => &broker.memory.requests,
                _ => &broker.memory.large_requests,
            };
            let permits = memory.clone().acquire_many_owned(memory_units(size)).await;
            self.permit = Some(permits.map_err(|_| Close::Shutdown)?);
            self.first_due = None;
            // Waiting for memory is our fault, not the client's: its time begins when it may go on.
            self.due = Some(Instant::now() + broker.transfer_time(size));
        }
        let missing = (PREFIX_BYTES + size).saturating_sub(self.buffer.len());
        if missing > 0 {
            self.buffer.reserve(missing.min(AHEAD_BYTES.max(self.buffer.len())));
            return Ok(None);
        }
        self.buffer.advance(PREFIX_BYTES);
        let bytes = self.buffer.split_to(size).freeze();
        self.due = None;
        if self.buffer.is_empty() {
            // Lets go of the allocation that the frame lives in: an idle connection must not keep it.
            self.buffer = BytesMut::new();
        } else {
            self.due = Some(Instant::now() + broker.settings.transfer_timeout);
        }
        Ok(self.permit.take().map(|permit| Frame { bytes, permit }))
    }

    /// The size of the frame at the front, once it and the API key behind it are there.
    fn size(&self, broker: &Broker) -> Result<Option<usize>, Close> {
        let Some(&[a, b, c, d, k, e]) = self.buffer.first_chunk::<6>() else { return Ok(None) };
        let size = i32::from_be_bytes([a, b, c, d]);
        let produce = i16::from_be_bytes([k, e]) == ApiKey::Produce as i16;
        let max = if produce { broker.settings.request_bytes_max } else { broker.settings.plain_request_bytes_max };
        match usize::try_from(size) {
            Ok(size) if size > max => Err(Close::TooLarge { size, max }),
            Ok(size) if size >= REQUEST_BYTES_MIN => Ok(Some(size)),
            _ => Err(Close::NotKafka(size)),
        }
    }
}
