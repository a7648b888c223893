//! One connection: its socket, its clock, and when to read, wait and write. What packets mean is in `packets`.
//!
//! It is one hand-written poll: whoever changes something that concerns the connection wakes it, and it looks at everything in
//! a fixed order. It reads only while it may take more, into a buffer of the thread, so that an idle connection
//! holds none.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use shared::door::{LEAVE_PAUSE, Seat};
use shared::limited;
use shared::log::BoxFuture;
use shared::login::LoginDelay;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::{debug, error};

use super::fanout::{PendingRun, Target};
use super::session::{Handle, Pulled, Session, Will};
use super::stats::{add, sub};
use super::turns::{Pace, Turn};
use super::{Front, Now};
use crate::codec::{CodecError, Disconnect, Packet, Properties, Reason, Split, Version, connect_version, split};
use crate::memory::MemoryUse;
use crate::session::connect::{self, Terms};
use crate::session::inbound::{Answer, Answers, put_ack};
use crate::store::{StoreFailed, Ticket};

/// Bytes of one read. Each thread has one such buffer.
const READ_BYTES: usize = 64 << 10;
/// Bytes of one read when the memory budget has no room: a little of what was read may have to be kept.
const READ_BYTES_MIN: usize = 4 << 10;
/// A packet that so many bytes have come of, for so long, ends its connection when memory is short.
const UNFINISHED_BYTES: usize = 512;
const UNFINISHED_PATIENCE: Duration = Duration::from_secs(10);
/// How often such a connection looks whether memory is short.
const UNFINISHED_LOOK: Duration = Duration::from_secs(1);
/// When a search for retained messages goes on that the memory budget had no room for.
const PULL_PAUSE: Duration = Duration::from_millis(100);
/// Reads in a row before other tasks get their turn: what was there, and the look that finds no more.
const READS_PER_POLL: usize = 2;
/// Held PUBLISHes are offered again after so long even if the store does not say that there is room.
const OFFER_AGAIN: Duration = Duration::from_secs(1);
/// The least time until the next offer when one changed nothing.
const OFFER_PAUSE: Duration = Duration::from_millis(5);
/// What it costs to take a filter of an ended session out of the tree, in units of a turn.
const WORK_PER_FILTER_REMOVED: usize = 32;
/// How long a last goodbye may take.
pub(super) const GOODBYE: Duration = Duration::from_millis(500);
/// What is read of a connection that is being closed at a time, and how long until the next: 2 MB a second.
const DRAIN_BYTES: usize = 8 << 10;
const DRAIN_PAUSE: Duration = Duration::from_millis(4);

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

pub(super) enum Io {
    /// The writing half is shared with whoever has bytes for it.
    Plain(OwnedReadHalf, Arc<OwnedWriteHalf>),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Why a connection ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Close {
    /// The client said goodbye; with or without its will.
    Client { will: bool },
    /// The socket is gone.
    Lost,
    /// No CONNECT in time, or one refused: the answer, if any, is written already.
    Refused,
    /// We end it, for this reason.
    Ours { reason: Reason, why: String },
}

impl Close {
    pub fn ours(reason: Reason, why: impl Into<String>) -> Self {
        Self::Ours { reason, why: why.into() }
    }
}

impl From<CodecError> for Close {
    fn from(error: CodecError) -> Self {
        Self::ours(error.reason(), error.to_string())
    }
}

impl From<StoreFailed> for Close {
    fn from(failed: StoreFailed) -> Self {
        Self::ours(Reason::IMPLEMENTATION_SPECIFIC_ERROR, failed.to_string())
    }
}

pub(super) enum Stage {
    AwaitConnect,
    /// Waiting for whoever has the session to let go of it.
    Claiming(BoxFuture<'static, Result<Arc<Session>, Reason>>),
    /// Waiting until CONNACK may go out.
    Opening,
    Live,
}

/// Answers of which the connection itself knows what they are.
pub(super) enum Reply {
    ConnAck {
        present: bool,
    },
    /// SUBACK; then the retained messages up to this number of the new subscriptions.
    SubAck {
        bytes: Vec<u8>,
        retained: Vec<Arc<str>>,
        upto: u64,
    },
    Bytes(Vec<u8>),
}

/// A PUBLISH there is no room for.
pub(super) struct Held {
    pub frame: Box<[u8]>,
    /// Its topic, where the frame has an alias.
    pub topic: Option<Arc<str>>,
}

pub(super) struct Connection {
    pub front: Arc<Front>,
    /// Its place at the door: it may lose this until its CONNECT is good.
    pub seat: Arc<Seat>,
    pub handle: Arc<Handle>,
    pub io: Io,
    pub peer: SocketAddr,
    pub stage: Stage,
    pub version: Option<Version>,
    pub terms: Option<Terms>,
    pub will: Option<Will>,
    /// How long the refusal of a wrong password waits.
    pub login_delay: Option<LoginDelay>,
    pub session: Option<Arc<Session>>,
    /// Bytes read and not yet processed.
    pub partial: Vec<u8>,
    /// The packet at the front of `partial` has so many bytes.
    need: usize,
    /// `partial` may hold whole packets.
    pub backlog: bool,
    /// Answers on their way to the session's bytes.
    pub reply: Vec<u8>,
    pub answers: Answers<Reply>,
    commit: Option<(Ticket, BoxFuture<'static, Result<(), StoreFailed>>)>,
    pub held: VecDeque<Held>,
    pub held_bytes: usize,
    pub held_since: Instant,
    pub room: Option<BoxFuture<'static, ()>>,
    /// PUBLISHes with QoS 1 and 2 that count against the receive maximum.
    pub unacked: usize,
    pub aliases: Vec<Option<Arc<str>>>,
    /// Recent topics and their subscribers.
    pub targets: Vec<(Box<str>, u64, Arc<[Target]>)>,
    /// What aliases and recent topics occupy, and what of it is counted in the budget.
    pub topics_bytes: usize,
    pub counted_topics: usize,
    /// What is being delivered in several polls, in order, and the bytes it occupies. Nothing is read meanwhile.
    pub pending: VecDeque<PendingRun>,
    pub pending_bytes: usize,
    pub pace: Pace,
    /// What this poll may do, and has done.
    pub turn: Turn,
    /// There are retained messages to search for that the client may get now.
    pulls: bool,
    /// When a search for retained messages goes on.
    pull_again: Option<Instant>,
    /// Until when the CONNECT must be there.
    connect_until: Instant,
    /// Subscribers this publisher waits for, and until when.
    pub congested: Vec<Arc<Session>>,
    pub congested_until: Instant,
    timer: Pin<Box<Sleep>>,
    last_bytes: Instant,
    /// When the first bytes of the packet came that is unfinished.
    packet_since: Instant,
    stalled: bool,
    /// The client does not read our answers: it is not read from until it does.
    choked: bool,
    /// When held PUBLISHes are offered again although the store did not call, and not before when although it did.
    offer_again: Instant,
    offer_not_before: Instant,
    counted_acks: usize,
    counted_held: usize,
    counted_bytes: usize,
}

/// Serves one accepted socket until it ends.
pub(super) async fn run(
    front: Arc<Front>,
    stream: TcpStream,
    peer: SocketAddr,
    tls: Option<Arc<rustls::ServerConfig>>,
    seat: Seat,
) {
    let (number, seat) = (front.next_number(), Arc::new(seat));
    let connect_until = Instant::now() + front.settings.connect_timeout;
    let placeholder = Arc::new(Handle::new(None));
    front.enter(number, placeholder.clone());
    let io = match tls {
        None => {
            let (read, write) = stream.into_split();
            Some(Io::Plain(read, Arc::new(write)))
        }
        Some(config) => {
            let accept = front.lanes.handshake(TlsAcceptor::from(config).accept(stream));
            let kicked = std::future::poll_fn(|cx| {
                placeholder.register(cx.waker());
                if placeholder.kicked().is_some() { Poll::Ready(()) } else { Poll::Pending }
            });
            tokio::select! {
                accepted = accept => match accepted {
                    Ok(stream) => Some(Io::Tls(Box::new(stream))),
                    Err(error) => {
                        debug!(%peer, %error, "TLS handshake failed");
                        None
                    }
                },
                () = kicked => {
                    debug!(%peer, "TLS handshake broken off");
                    None
                }
                () = seat.evicted() => {
                    debug!(%peer, "TLS handshake broken off in favour of another client");
                    tokio::time::sleep(LEAVE_PAUSE).await;
                    None
                }
                () = tokio::time::sleep_until(connect_until.into()) => {
                    debug!(%peer, "TLS handshake took too long");
                    None
                }
            }
        }
    };
    if let Some(io) = io {
        let handle = match &io {
            Io::Plain(_, socket) => Arc::new(Handle::new(Some(socket.clone()))),
            Io::Tls(_) => Arc::new(Handle::new(None)),
        };
        front.enter(number, handle.clone());
        // A shutdown may have come while the handshake went on.
        if front.closing() {
            handle.kick(Reason::SERVER_SHUTTING_DOWN);
        }
        let mut connection = Connection::new(front.clone(), seat.clone(), handle, io, peer, connect_until);
        // A bug must end one connection: it gives its session back like any other, and the client can come again.
        let served = std::future::poll_fn(|cx| {
            catch_unwind(AssertUnwindSafe(|| connection.poll(cx))).unwrap_or_else(|_| {
                error!(%peer, "a panic ended a connection; this is a bug");
                Poll::Ready(Close::ours(Reason::IMPLEMENTATION_SPECIFIC_ERROR, "internal error"))
            })
        });
        let close = tokio::select! {
            biased;
            close = served => Some(close),
            () = seat.evicted() => None,
        };
        // Before it waits for anything else: a lane may have come to it that it will not use.
        connection.pace.leave();
        let close = match close {
            Some(close) => close,
            None => {
                tokio::time::sleep(LEAVE_PAUSE).await;
                Close::ours(Reason::SERVER_BUSY, "")
            }
        };
        connection.finish(close).await;
    }
    front.leave(number);
}

impl Connection {
    fn new(
        front: Arc<Front>,
        seat: Arc<Seat>,
        handle: Arc<Handle>,
        io: Io,
        peer: SocketAddr,
        connect_until: Instant,
    ) -> Self {
        let now = Instant::now();
        let timer = Box::pin(tokio::time::sleep_until(connect_until.into()));
        let pace = Pace::new(front.lanes.clone(), now);
        Self {
            front,
            seat,
            handle,
            io,
            peer,
            stage: Stage::AwaitConnect,
            version: None,
            terms: None,
            will: None,
            login_delay: None,
            session: None,
            partial: Vec::new(),
            need: 0,
            backlog: false,
            reply: Vec::new(),
            answers: Answers::default(),
            commit: None,
            held: VecDeque::new(),
            held_bytes: 0,
            held_since: now,
            room: None,
            unacked: 0,
            aliases: Vec::new(),
            targets: Vec::new(),
            topics_bytes: 0,
            counted_topics: 0,
            pending: VecDeque::new(),
            pending_bytes: 0,
            pace,
            turn: Turn::WHOLE,
            pulls: false,
            pull_again: None,
            connect_until,
            congested: Vec::new(),
            congested_until: now,
            timer,
            last_bytes: now,
            packet_since: now,
            stalled: false,
            choked: false,
            offer_again: now,
            offer_not_before: now,
            counted_acks: 0,
            counted_held: 0,
            counted_bytes: 0,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Close> {
        match self.advance(cx) {
            Ok(()) => {
                self.count_waiting();
                Poll::Pending
            }
            Err(close) => Poll::Ready(close),
        }
    }

    /// Does all that can be done now. Everything it waits for has our waker when it returns.
    fn advance(&mut self, cx: &mut Context<'_>) -> Result<(), Close> {
        self.handle.register(cx.waker());
        let wants = self.wants_turn(cx);
        let turn = self.pace.begin(wants, cx);
        // Answers leave and clocks run while it waits for its turn.
        self.turn = turn.unwrap_or(Turn::NONE);
        // One that waits is woken by its lane.
        let more = self.take_turn(cx)? && turn.is_some();
        if self.pace.end(&self.turn, more) {
            cx.waker().wake_by_ref();
        }
        if more && self.turn.is_whole() {
            // Other threads on this core may wait too. The one that commits wakes for a moment at a time, and would wait a whole
            // slice of the scheduler for it.
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Whether there is something to do that takes a turn; asks to be woken when there is something to read.
    fn wants_turn(&mut self, cx: &mut Context<'_>) -> bool {
        self.pulls
            || self.pace.needs_lane
            || !self.pending.is_empty()
            || self.may_read() && (self.backlog || self.io.poll_read_ready(cx).is_ready())
    }

    /// Whether there is more to do.
    fn take_turn(&mut self, cx: &mut Context<'_>) -> Result<bool, Close> {
        for read in 0..READS_PER_POLL {
            if read > 0 && self.turn.is_over() {
                break;
            }
            let now = self.front.now();
            let draining = self.poll_kick()?;
            self.poll_claim(cx)?;
            self.poll_room(cx, now)?;
            self.poll_commits(cx)?;
            self.poll_congestion(cx, now);
            self.deliver_pending(now);
            self.poll_write(cx, now)?;
            let may_read = !draining && self.may_read();
            self.poll_timers(cx, now, may_read && !self.turn.is_over())?;
            if draining && self.answers.is_empty() {
                continue;
            }
            if self.turn.is_over() || !self.pending.is_empty() {
                break;
            }
            if !may_read {
                return Ok(false);
            }
            if self.backlog {
                let bytes = std::mem::take(&mut self.partial);
                self.backlog = false;
                let consumed = self.process(&bytes, now);
                self.keep_rest(bytes, consumed)?;
            } else if !self.poll_read(cx)? {
                // Processing nothing changed nothing; all wakers are set.
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether to go on until acknowledgements have left, without reading.
    fn poll_kick(&mut self) -> Result<bool, Close> {
        match self.handle.kicked() {
            None => Ok(false),
            Some(Reason::SERVER_SHUTTING_DOWN) if !self.answers.is_empty() && self.held.is_empty() => Ok(true),
            Some(Reason::QUOTA_EXCEEDED) => {
                Err(Close::ours(Reason::QUOTA_EXCEEDED, "it read nothing for long and held memory that others want"))
            }
            Some(reason) => Err(Close::ours(reason, "")),
        }
    }

    fn poll_claim(&mut self, cx: &mut Context<'_>) -> Result<(), Close> {
        let Stage::Claiming(claim) = &mut self.stage else { return Ok(()) };
        let Poll::Ready(claimed) = claim.as_mut().poll(cx) else { return Ok(()) };
        let Some(terms) = &self.terms else { return Ok(()) };
        if let Ok(session) = &claimed
            && terms.clean_start
        {
            let work = session.state.lock().subscriptions.len() * WORK_PER_FILTER_REMOVED;
            if self.pace.puts_off(&mut self.turn, work) {
                self.stage = Stage::Claiming(Box::pin(std::future::ready(claimed)));
                return Ok(());
            }
            self.turn.add(work);
        }
        match claimed {
            Err(reason) => {
                self.refuse_connect(reason);
                Err(Close::Refused)
            }
            Ok(session) => {
                let opened = self.front.open(&session, terms, self.will.take());
                // Ours from here on: what is refused now is given back like any other.
                self.session = Some(session);
                let (ticket, present) = match opened {
                    Ok(opened) => opened,
                    Err(refusal) => {
                        self.refuse_connect(refusal.reason());
                        return Err(Close::Refused);
                    }
                };
                self.stage = Stage::Opening;
                self.answers.push(ticket, Answer::Other(Reply::ConnAck { present }));
                Ok(())
            }
        }
    }

    /// Offers held PUBLISHes again when there may be room.
    fn poll_room(&mut self, cx: &mut Context<'_>, now: Now) -> Result<(), Close> {
        let Some(room) = &mut self.room else { return Ok(()) };
        if now.instant < self.offer_not_before {
            return Ok(());
        }
        if room.as_mut().poll(cx).is_ready() || now.instant >= self.offer_again {
            self.room = None;
            let held = self.held.len();
            self.offer_held(now)?;
            if self.held.len() == held {
                // There may be room, but not for the first of these: asking again at once would go round and round.
                self.offer_not_before = now.instant + OFFER_PAUSE;
            } else {
                // The new wait has not seen our waker yet.
                cx.waker().wake_by_ref();
            }
        }
        Ok(())
    }

    /// The store was just asked: give it time before asking without being called.
    pub(super) fn again(&mut self, now: Now) {
        self.offer_again = now.instant + OFFER_AGAIN;
    }

    /// Lets go the answers whose tickets are durable; asks to be woken for the first that is not.
    fn poll_commits(&mut self, cx: &mut Context<'_>) -> Result<(), Close> {
        while let Some(ticket) = self.answers.waits_for() {
            if ticket == Ticket::default() || self.front.store.durable(ticket)? {
                if let Some(answer) = self.answers.pop() {
                    self.answer(answer);
                }
                continue;
            }
            let wait = match &mut self.commit {
                Some((waiting, wait)) if *waiting == ticket => wait,
                commit => &mut commit.insert((ticket, self.front.store.wait(ticket))).1,
            };
            match wait.as_mut().poll(cx) {
                Poll::Pending => return Ok(()),
                Poll::Ready(result) => {
                    self.commit = None;
                    result?;
                    // It said so for this ticket, whatever `durable` says a moment later.
                    if let Some(answer) = self.answers.pop() {
                        self.answer(answer);
                    }
                }
            }
        }
        self.commit = None;
        Ok(())
    }

    fn answer(&mut self, answer: Answer<Reply>) {
        let version = self.version.unwrap_or(Version::V4);
        match answer {
            Answer::PubAck(id, reason) => {
                self.unacked = self.unacked.saturating_sub(1);
                put_ack(0x40, id, reason, None, version, &mut self.reply);
            }
            Answer::PubRec(id, reason) => {
                if reason.is_error() {
                    self.unacked = self.unacked.saturating_sub(1);
                }
                put_ack(0x50, id, reason, None, version, &mut self.reply);
            }
            Answer::PubComp(id, reason) => put_ack(0x70, id, reason, None, version, &mut self.reply),
            Answer::Other(Reply::ConnAck { present }) => self.go_live(present),
            Answer::Other(Reply::Bytes(bytes)) => self.reply.extend_from_slice(&bytes),
            Answer::Other(Reply::SubAck { bytes, retained, upto }) => {
                self.reply.extend_from_slice(&bytes);
                if let (false, Some(session)) = (retained.is_empty(), &self.session) {
                    let mut state = session.state.lock();
                    // The answer stands before them.
                    state.back(&self.front).extend_from_slice(&self.reply);
                    self.reply.clear();
                    retained.iter().for_each(|filter| state.start_retained(filter, upto));
                }
            }
        }
    }

    /// CONNACK, then what the session has for the client.
    fn go_live(&mut self, present: bool) {
        let (Some(session), Some(terms)) = (&self.session, &self.terms) else { return };
        let mut state = session.state.lock();
        let back = state.back(&self.front);
        terms.accept(present, &self.front.settings, back);
        state.live = true;
        self.stage = Stage::Live;
        debug!(client = %session.client_id, peer = %self.peer, version = ?terms.version, present, "connected");
    }

    /// Waits a moment for subscribers that cannot keep up with what this connection publishes.
    fn poll_congestion(&mut self, cx: &mut Context<'_>, now: Now) {
        if self.congested.is_empty() {
            return;
        }
        let over = now.instant >= self.congested_until;
        let front = &self.front;
        self.congested.retain(|session| {
            let mut state = session.state.lock();
            if !state.congested(front) {
                return false;
            }
            if over {
                state.out.slow = true;
                return false;
            }
            state.wait_until_drained(cx.waker());
            true
        });
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, now: Now) -> Result<(), Close> {
        let Some(session) = &self.session else { return Ok(()) };
        let (mut pulled, tried) = (Pulled::Nothing, !self.turn.is_over());
        {
            let mut state = session.state.lock();
            if !self.reply.is_empty() {
                state.back(&self.front).extend_from_slice(&self.reply);
                state.count_bytes(&self.front);
                self.reply.clear();
                self.reply.shrink_to(1024);
            }
            if tried && !state.backlog.is_empty() {
                let work;
                (pulled, work) = state.pull_retained(&self.front, now);
                self.turn.add(work);
            }
        }
        self.write_out(cx)?;
        if let Some(session) = &self.session {
            let mut state = session.state.lock();
            if pulled == Pulled::NoRoom {
                self.pull_again = Some(now.instant + PULL_PAUSE);
            } else if tried || state.backlog.is_empty() {
                self.pull_again = None;
            }
            self.pulls = self.pull_again.is_none() && state.may_pull(&self.front);
            if self.pulls && !self.turn.is_over() {
                cx.waker().wake_by_ref();
            }
            // Asked after the writing, so that whoever drains the rest knows whom to wake.
            self.choked = state.pending_bytes() > state.outgoing_max(&self.front);
            if self.choked {
                state.wait_until_drained(cx.waker());
            }
        }
        Ok(())
    }

    fn write_out(&mut self, cx: &mut Context<'_>) -> Result<(), Close> {
        let Some(session) = &self.session else { return Ok(()) };
        match &mut self.io {
            Io::Plain(_, socket) => loop {
                session.flush(&self.front, true);
                let mut state = session.state.lock();
                if state.out.failed {
                    return Err(Close::Lost);
                }
                if !state.out.blocked {
                    return Ok(());
                }
                match (**socket).as_ref().poll_write_ready(cx) {
                    Poll::Pending => return Ok(()),
                    Poll::Ready(Err(_)) => return Err(Close::Lost),
                    Poll::Ready(Ok(())) => state.out.blocked = false,
                }
            },
            Io::Tls(stream) => loop {
                let mut state = session.state.lock();
                state.out.dirty = false;
                let Some((chunk, mut at)) = state.take_chunk(&self.front) else { break };
                drop(state);
                let start = at;
                let result = write_some(stream, cx, &chunk, &mut at);
                add(&self.front.counters.written_bytes_total, at - start);
                session.state.lock().give_back(chunk, at, &self.front);
                match result {
                    Poll::Pending => break,
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(_)) => return Err(Close::Lost),
                }
            },
        }
        if let Io::Tls(stream) = &mut self.io
            && let Poll::Ready(Err(_)) = Pin::new(stream).poll_flush(cx)
        {
            return Err(Close::Lost);
        }
        Ok(())
    }

    /// Whether more may be taken from the client now.
    pub(super) fn may_read(&self) -> bool {
        let receive_maximum = usize::from(self.front.settings.receive_maximum);
        match self.stage {
            Stage::Claiming(_) | Stage::Opening => false,
            Stage::AwaitConnect => true,
            Stage::Live => {
                // An MQTT 5 client that goes beyond the receive maximum is told so where its PUBLISH is counted; a 3.1.1
                // client cannot know it, and is not read from until answers have left.
                !self.choked
                    && self.pending.is_empty()
                    && self.congested.is_empty()
                    && (self.held.is_empty() || self.held_bytes < self.held_bytes_max())
                    && self.answers.len() + self.held.len() <= receive_maximum
            }
        }
    }

    fn held_bytes_max(&self) -> usize {
        self.front.settings.held_bytes_max.min(self.incoming_room() + self.held_bytes)
    }

    /// Bytes more that may be gathered and held.
    fn incoming_room(&self) -> usize {
        self.front.memory.room(MemoryUse::Incoming, self.memory_bytes())
    }

    /// Bytes of the budget that this connection holds, besides what its session does.
    pub(super) fn memory_bytes(&self) -> usize {
        self.counted_bytes + self.counted_topics
    }

    fn poll_timers(&mut self, cx: &mut Context<'_>, now: Now, may_read: bool) -> Result<(), Close> {
        // While we do not read we cannot see its PINGREQ: the clock starts again when we do.
        if self.stalled && may_read {
            self.last_bytes = now.instant;
        }
        self.stalled = !may_read;
        loop {
            let now = Instant::now();
            let mut next = now + Duration::from_secs(3600);
            match &self.stage {
                Stage::AwaitConnect => {
                    let at = self.connect_until;
                    if now >= at {
                        debug!(peer = %self.peer, "no CONNECT in time");
                        return Err(Close::Refused);
                    }
                    next = next.min(at);
                }
                Stage::Live if may_read => {
                    let keep_alive = self.terms.as_ref().map_or(0, |terms| terms.keep_alive_secs);
                    if keep_alive > 0 {
                        // §3.1.2.10: one and a half times the keep alive.
                        let at = self.last_bytes + Duration::from_millis(u64::from(keep_alive) * 1500);
                        if now >= at {
                            add(&self.front.counters.keep_alive_timeouts_total, 1);
                            return Err(Close::ours(
                                Reason::KEEP_ALIVE_TIMEOUT,
                                "nothing came for 1.5 times the keep alive",
                            ));
                        }
                        next = next.min(at);
                    }
                }
                _ => {}
            }
            if self.need > 0 && self.partial.len() >= UNFINISHED_BYTES {
                let at = self.packet_since + UNFINISHED_PATIENCE;
                if now >= at && self.front.is_short_of_memory() {
                    return Err(self.no_room_for_packet());
                }
                next = next.min(at.max(now + UNFINISHED_LOOK));
            }
            if !self.held.is_empty() {
                let at = self.held_since + self.front.settings.hold_timeout;
                if now >= at {
                    add(&self.front.counters.hold_timeouts_total, 1);
                    return Err(Close::ours(Reason::QUOTA_EXCEEDED, "there was no room for a PUBLISH in time"));
                }
                let offer = if now < self.offer_not_before { self.offer_not_before } else { self.offer_again };
                next = next.min(at).min(offer.max(now + Duration::from_millis(1)));
            }
            if !self.congested.is_empty() {
                next = next.min(self.congested_until.max(now + Duration::from_millis(1)));
            }
            if let Some(at) = self.pull_again {
                next = next.min(at.max(now + Duration::from_millis(1)));
            }
            let next = tokio::time::Instant::from_std(next);
            // A timer that fires early is asked again; moving it for every packet would cost more than that.
            if next < self.timer.deadline() || self.timer.is_elapsed() {
                self.timer.as_mut().reset(next);
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Ok(());
            }
            if !self.congested.is_empty() || !self.held.is_empty() || self.pull_again.is_some() {
                // `poll_congestion`, `poll_room` and `poll_write` come before us: have them look again.
                cx.waker().wake_by_ref();
                return Ok(());
            }
        }
    }

    /// Reads and processes one buffer. False: there is nothing to read now.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Result<bool, Close> {
        if self.need > READ_BYTES {
            return self.poll_read_large(cx);
        }
        let room = self.incoming_room();
        SCRATCH.with_borrow_mut(|scratch| {
            if scratch.is_empty() {
                scratch.resize(READ_BYTES, 0);
            }
            let kept = self.partial.len();
            let (Some(front), true) = (scratch.get_mut(..kept), kept < READ_BYTES) else {
                // Cannot be: a packet that does not fit is read elsewhere, and a backlog is processed first.
                return self.poll_read_large(cx);
            };
            front.copy_from_slice(&self.partial);
            if room == 0 && kept >= READ_BYTES_MIN && self.need > kept {
                return Err(self.no_room_for_packet());
            }
            let end = READ_BYTES.min(kept + room.min(self.turn.read_bytes()).max(READ_BYTES_MIN));
            let Some(space) = scratch.get_mut(kept..end) else { return Ok(false) };
            let n = match self.io.poll_read(cx, space) {
                Poll::Pending => return Ok(false),
                Poll::Ready(Ok(0)) | Poll::Ready(Err(_)) => return Err(Close::Lost),
                Poll::Ready(Ok(n)) => n,
            };
            self.turn.add_read(n);
            // The clock is read after the bytes: a record must not seem to have arrived before it was sent.
            let now = self.front.now();
            self.last_bytes = if matches!(self.stage, Stage::AwaitConnect) { self.last_bytes } else { now.instant };
            self.partial.clear();
            let bytes = scratch.get(..kept + n).unwrap_or_default();
            let consumed = self.process(bytes, now)?;
            if consumed > 0 || kept == 0 {
                self.packet_since = now.instant;
            }
            let rest = bytes.get(consumed..).unwrap_or_default();
            if self.partial.capacity() > 4096 && rest.len() < 1024 {
                self.partial = Vec::new();
            }
            self.partial.extend_from_slice(rest);
            self.look_ahead()?;
            if kept + n == end {
                self.turn.use_up();
            }
            Ok(true)
        })
    }

    fn no_room_for_packet(&mut self) -> Close {
        add(&self.front.counters.memory_refused_total, 1);
        // A CONNECT is answered although it is not all there.
        self.version = self.version.or_else(|| connect_version(&self.partial));
        Close::ours(Reason::QUOTA_EXCEEDED, "no memory is left for so large a packet")
    }

    /// A packet larger than the thread's buffer is gathered in a buffer of its own, which grows as its bytes come.
    fn poll_read_large(&mut self, cx: &mut Context<'_>) -> Result<bool, Close> {
        let have = self.partial.len();
        let more = self.need.saturating_sub(have).clamp(1, have.max(READ_BYTES));
        let space = more.min(READ_BYTES).min(self.turn.read_bytes().max(READ_BYTES_MIN));
        if self.partial.capacity() - have < space {
            // What the buffer has is counted already.
            let room = self.incoming_room() + self.counted_bytes.saturating_sub(have);
            if more > room {
                return Err(self.no_room_for_packet());
            }
            self.partial.reserve_exact(more);
        }
        self.partial.resize(have + space, 0);
        let read = match self.partial.get_mut(have..) {
            Some(space) => self.io.poll_read(cx, space),
            None => Poll::Pending,
        };
        let n = match &read {
            Poll::Ready(Ok(n)) => *n,
            _ => 0,
        };
        self.partial.truncate(have + n);
        self.turn.add_read(n);
        let now = self.front.now();
        match read {
            Poll::Pending => return Ok(false),
            Poll::Ready(Ok(0)) | Poll::Ready(Err(_)) => return Err(Close::Lost),
            Poll::Ready(Ok(_)) => self.last_bytes = now.instant,
        }
        self.count_waiting();
        if self.partial.len() >= self.need {
            let bytes = std::mem::take(&mut self.partial);
            let consumed = self.process(&bytes, now);
            self.packet_since = now.instant;
            self.keep_rest(bytes, consumed)?;
        }
        if n == space {
            self.turn.use_up();
        }
        Ok(true)
    }

    fn keep_rest(&mut self, mut bytes: Vec<u8>, consumed: Result<usize, Close>) -> Result<(), Close> {
        bytes.drain(..consumed?.min(bytes.len()));
        self.partial = if bytes.is_empty() { Vec::new() } else { bytes };
        self.look_ahead()
    }

    /// Finds out how long the packet at the front of `partial` is.
    fn look_ahead(&mut self) -> Result<(), Close> {
        self.need = 0;
        if self.backlog {
            return Ok(());
        }
        match split(&self.partial, self.version, self.front.settings.packet_bytes_max)? {
            Split::More { need } => self.need = need,
            Split::Frame(_) => self.backlog = true,
        }
        Ok(())
    }

    /// Keeps the gauges of what waits in step.
    fn count_waiting(&mut self) {
        let counters = &self.front.counters;
        let input = self.partial.capacity() + self.held_bytes + self.pending_bytes;
        self.front.memory.recount(MemoryUse::Incoming, &mut self.counted_bytes, input);
        for (gauge, counted, now) in [
            (&counters.held_acks, &mut self.counted_acks, self.answers.len() + self.held.len()),
            (&counters.held_messages, &mut self.counted_held, self.held.len()),
        ] {
            if now > *counted {
                add(gauge, now - *counted);
            } else {
                sub(gauge, *counted - now);
            }
            *counted = now;
        }
    }

    /// Writes the CONNACK that refuses, as far as the socket takes it at once.
    pub fn refuse_connect(&mut self, reason: Reason) {
        add(&self.front.counters.connects_refused_total, 1);
        debug!(peer = %self.peer, %reason, "CONNECT refused");
        connect::refuse(reason, self.version.unwrap_or(Version::V4), &mut self.reply);
    }

    /// Gives the session back, says goodbye if there is something to say, and closes.
    async fn finish(mut self, close: Close) {
        while !self.pending.is_empty() {
            // It was taken: its subscribers get it, whatever became of the publisher.
            let _lane = self.front.lanes.enter().await;
            self.turn = Turn::WHOLE;
            self.deliver_pending(self.front.now());
        }
        let now = self.front.now();
        self.answers = Answers::default();
        self.held.clear();
        self.held_bytes = 0;
        self.partial = Vec::new();
        self.count_waiting();
        // Freed before it counts as free: saying goodbye takes a while.
        (self.aliases, self.targets) = (Vec::new(), Vec::new());
        self.count_topics(0);
        let client = self.session.as_ref().map_or("", |session| &*session.client_id).to_owned();
        let peer = self.peer;
        let mut goodbye = None;
        match &close {
            Close::Client { .. } | Close::Lost | Close::Refused => debug!(%client, %peer, ?close, "connection ended"),
            Close::Ours { reason, why } => {
                goodbye = Some(*reason);
                match *reason {
                    Reason::SERVER_BUSY => debug!(%peer, "closed without a CONNECT: others wanted its place"),
                    Reason::SERVER_SHUTTING_DOWN
                    | Reason::SESSION_TAKEN_OVER
                    | Reason::KEEP_ALIVE_TIMEOUT
                    | Reason::ADMINISTRATIVE_ACTION => {
                        limited!(info, %client, %peer, %reason, why, "connection ended");
                    }
                    Reason::QUOTA_EXCEEDED | Reason::IMPLEMENTATION_SPECIFIC_ERROR => {
                        limited!(warn, %client, %peer, %reason, why, "connection ended");
                    }
                    // Whoever knocks at a port can send garbage: no reason to fill a log, nor a gateway's card.
                    _ if client.is_empty() => {
                        add(&self.front.counters.protocol_errors_total, 1);
                        debug!(%peer, %reason, why, "connection ended before CONNECT");
                    }
                    _ => {
                        add(&self.front.counters.protocol_errors_total, 1);
                        limited!(info, %client, %peer, %reason, why, "connection ended");
                    }
                }
            }
        }
        if let Some(delay) = self.login_delay.take().filter(|_| !self.front.closing()) {
            tokio::select! {
                () = tokio::time::sleep(delay.wait) => {}
                // Its place is wanted: no delay may hold up those who wait for it.
                () = self.seat.evicted() => {}
            }
        }
        let mut rest = Some(std::mem::take(&mut self.reply));
        let connected = matches!(self.stage, Stage::Live);
        if let Some(session) = self.session.take() {
            let will = !matches!(close, Close::Client { will: false });
            let own = rest.take().unwrap_or_default();
            rest = self.front.detach(&session, &self.handle, will, now).map(|mut bytes| {
                bytes.extend_from_slice(&own);
                bytes
            });
        } else if let (Stage::AwaitConnect, Some(reason)) = (&self.stage, goodbye) {
            // Before CONNECT only a CONNACK can say why; for what is no CONNECT at all there is nothing to say.
            if reason == Reason::UNSUPPORTED_PROTOCOL_VERSION || self.version.is_some() {
                self.refuse_connect(reason);
                rest = Some(std::mem::take(&mut self.reply));
            }
        }
        self.handle.take_kick();
        let Some(mut rest) = rest else { return };
        if let (Some(reason), true, Some(Version::V5)) = (goodbye, connected, self.version) {
            let why = match &close {
                Close::Ours { why, .. } if !why.is_empty() => Some(why.as_str()),
                _ => None,
            };
            // §3.14.2.2.3: no reason string that makes the packet larger than the client takes.
            let room = self.terms.as_ref().map_or(0, |terms| terms.packet_bytes_max);
            let properties = why
                .filter(|why| why.len() + 16 < room)
                .map(|why| Box::new(Properties { reason_string: Some(why), ..Properties::default() }));
            let packet = Packet::Disconnect(Disconnect { reason, properties });
            let encoded = packet.encode(Version::V5, &mut rest);
            debug_assert_eq!(encoded, Ok(()), "a reason string is short");
        }
        if matches!(close, Close::Lost) {
            return;
        }
        let linger = !rest.is_empty();
        drop(self.front);
        let _ = tokio::time::timeout(GOODBYE, say_goodbye(self.io, &rest, linger)).await;
    }
}

/// Writes the last bytes and closes. A socket that is closed while bytes of the peer are unread is reset, and a
/// reset may overtake our last words; so those bytes are read away for a moment.
async fn say_goodbye(io: Io, mut rest: &[u8], linger: bool) -> io::Result<()> {
    match io {
        Io::Plain(mut read, socket) => {
            while !rest.is_empty() {
                socket.writable().await?;
                match socket.try_write(rest) {
                    Ok(n) => rest = rest.get(n..).unwrap_or_default(),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
            socket2::SockRef::from((*socket).as_ref()).shutdown(std::net::Shutdown::Write)?;
            if linger {
                drain(&mut read).await?;
            }
        }
        Io::Tls(mut stream) => {
            stream.write_all(rest).await?;
            stream.shutdown().await?;
            if linger {
                drain(&mut stream).await?;
            }
        }
    }
    Ok(())
}

/// Reads what still comes until the peer closes, a little at a time: whoever is being closed gets no more of the processor.
pub(super) async fn drain(from: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
    let mut sink = vec![0; DRAIN_BYTES];
    while from.read(&mut sink).await? > 0 {
        tokio::time::sleep(DRAIN_PAUSE).await;
    }
    Ok(())
}

impl Io {
    /// Whether there may be something to read.
    fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Plain(_, socket) => (**socket).as_ref().poll_read_ready(cx).map(drop),
            // It may have bytes that it has decrypted.
            Self::Tls(_) => Poll::Ready(()),
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, space: &mut [u8]) -> Poll<io::Result<usize>> {
        match self {
            Self::Plain(socket, _) => {
                let mut buffer = ReadBuf::new(space);
                std::task::ready!(Pin::new(socket).poll_read(cx, &mut buffer))?;
                Poll::Ready(Ok(buffer.filled().len()))
            }
            Self::Tls(stream) => {
                let mut buffer = ReadBuf::new(space);
                std::task::ready!(Pin::new(stream).poll_read(cx, &mut buffer))?;
                Poll::Ready(Ok(buffer.filled().len()))
            }
        }
    }
}

fn write_some(
    stream: &mut TlsStream<TcpStream>,
    cx: &mut Context<'_>,
    chunk: &[u8],
    at: &mut usize,
) -> Poll<io::Result<()>> {
    while let Some(rest) = chunk.get(*at..).filter(|rest| !rest.is_empty()) {
        match std::task::ready!(Pin::new(&mut *stream).poll_write(cx, rest))? {
            0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            n => *at += n,
        }
    }
    Poll::Ready(Ok(()))
}
