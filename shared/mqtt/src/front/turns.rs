//! Whose turn it is, and how long it may be.
//!
//! A worker polls connections that are ready one after the other. If each of hundreds did a whole turn, a client that sends a
//! message now and then would wait for all of them. So a whole turn needs a [lane](Lanes). There are fewer lanes than
//! workers, and whoever wants one stands in one queue. What is little goes without a lane, on credit that grows with time.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use shared::door::others_first;
use shared::log::BoxFuture;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How much a whole turn does of what a client sent: packets, bytes, messages handed to subscribers, steps of searches. A unit is
/// some 200 ns where it is dear: a SUBSCRIBE of 100 levels counts 107 and takes 22 microseconds.
pub(crate) const WORK_PER_TURN: usize = 4 << 10;
/// What a read costs, whatever comes of it: it is a call of the system, and often one to answer.
const WORK_PER_READ: usize = 32;
/// Bytes that are read, and perhaps decrypted, for a unit.
const BYTES_PER_WORK: usize = 128;
/// Bytes that may be read for a unit that is left.
const READ_AHEAD: usize = 16;
/// The credit of who has just come: enough for a CONNECT and some SUBSCRIBEs.
const CREDIT_FIRST: i64 = 128;
/// The most that is saved up, and the most that is owed.
const CREDIT_MAX: i64 = 512;
const DEBT_MAX: i64 = WORK_PER_TURN as i64;
/// A turn that did less is over at once.
const SHORT: usize = CREDIT_MAX as usize;
/// Less than this is not worth a turn.
const CREDIT_MIN: i64 = 3 * WORK_PER_READ as i64;
/// How long a unit of credit takes to grow: a twentieth of a worker's time, or 14,000 small messages a second, one by one.
const CREDIT_UNIT: Duration = Duration::from_micros(2);

/// Permits for whole turns. A worker is left for those who want little, where there are two and nobody shakes hands.
#[derive(Debug, Clone)]
pub(crate) struct Lanes {
    turns: Arc<Semaphore>,
    /// Handshakes have as many for themselves: a newcomer would stand behind each turn of thousands that are busy, once per piece
    /// of its handshake, until its time is over.
    handshakes: Arc<Semaphore>,
}

impl Default for Lanes {
    fn default() -> Self {
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        // Tests count what one lane lets through, on whatever machine.
        Self::new(if cfg!(test) { 1 } else { workers.saturating_sub(1).max(1) })
    }
}

impl Lanes {
    fn new(count: usize) -> Self {
        let lanes = || Arc::new(Semaphore::new(count));
        Self { turns: lanes(), handshakes: lanes() }
    }

    /// Waits for a lane, which is held until what is returned is dropped; nothing that waits may be done in it. Others that are
    /// ready already are polled before: each of them might take a lane that is free again at once.
    pub async fn enter(&self) -> Option<OwnedSemaphorePermit> {
        Self::enter_one_of(self.turns.clone()).await
    }

    async fn enter_one_of(lanes: Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
        let lane = lanes.acquire_owned().await.ok();
        others_first().await;
        lane
    }

    /// Does a handshake so that each poll of it is a whole turn.
    pub async fn handshake<T>(&self, handshake: impl Future<Output = T>) -> T {
        let mut handshake = pin!(handshake);
        let mut entering: Option<BoxFuture<'_, _>> = None;
        std::future::poll_fn(|cx| {
            let lane = entering.get_or_insert_with(|| Box::pin(Self::enter_one_of(self.handshakes.clone())));
            let _lane = std::task::ready!(lane.as_mut().poll(cx));
            entering = None;
            handshake.as_mut().poll(cx)
        })
        .await
    }
}

/// A place in the queue for a lane, once it was asked for.
#[derive(Default)]
struct Queue(Option<BoxFuture<'static, Option<OwnedSemaphorePermit>>>);

impl Queue {
    /// A lane that is free or has come to it; if there is none and it `must`, it stands in the queue. `None`: there are no lanes any
    /// more, and nobody to wait for.
    fn poll(&mut self, lanes: &Lanes, cx: &mut Context<'_>, must: bool) -> Poll<Option<OwnedSemaphorePermit>> {
        if self.0.is_none() {
            if let Ok(lane) = lanes.turns.clone().try_acquire_owned() {
                return Poll::Ready(Some(lane));
            }
            if !must {
                return Poll::Pending;
            }
        }
        let place = self.0.get_or_insert_with(|| {
            let lanes = lanes.clone();
            Box::pin(async move { lanes.turns.acquire_owned().await.ok() })
        });
        let lane = std::task::ready!(place.as_mut().poll(cx));
        self.0 = None;
        Poll::Ready(lane)
    }
}

/// How much may be done at once, and what was.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Turn {
    may: usize,
    done: usize,
}

impl Turn {
    /// Nothing may be done.
    pub const NONE: Self = Self { may: 0, done: 0 };
    /// What anybody may do without a lane.
    pub const LITTLE: Self = Self { may: CREDIT_FIRST as usize, done: 0 };
    /// One of [`WORK_PER_TURN`].
    pub const WHOLE: Self = Self { may: WORK_PER_TURN, done: 0 };

    pub fn add(&mut self, work: usize) {
        self.done = self.done.saturating_add(work);
    }

    /// So many bytes were read.
    pub fn add_read(&mut self, bytes: usize) {
        self.add(WORK_PER_READ + bytes / BYTES_PER_WORK);
    }

    /// There is more than may be done.
    pub fn use_up(&mut self) {
        self.done = self.done.max(self.may);
    }

    pub fn is_over(&self) -> bool {
        self.done >= self.may
    }

    pub fn is_whole(&self) -> bool {
        self.may >= WORK_PER_TURN
    }

    pub fn left(&self) -> usize {
        self.may.saturating_sub(self.done)
    }

    /// How many bytes may be read at once.
    pub fn read_bytes(&self) -> usize {
        self.left() * READ_AHEAD
    }
}

/// Gives one connection its turns.
pub(super) struct Pace {
    lanes: Lanes,
    queue: Queue,
    lane: Option<OwnedSemaphorePermit>,
    /// Units that may be done without a lane; below zero: done in one and not made good yet.
    credit: i64,
    credited: Instant,
    /// What comes next is more than anybody's credit.
    pub needs_lane: bool,
}

impl Pace {
    pub fn new(lanes: Lanes, now: Instant) -> Self {
        Self { lanes, queue: Queue::default(), lane: None, credit: CREDIT_FIRST, credited: now, needs_lane: false }
    }

    /// The next turn. `None`: the connection `wants` to do something and must wait for a lane; `cx` is woken when it has one.
    pub fn begin(&mut self, wants: bool, cx: &mut Context<'_>) -> Option<Turn> {
        // Whoever stands in the queue is the next to have it.
        self.lane = None;
        if !wants {
            // A lane that nobody uses is kept from nobody.
            self.queue = Queue::default();
        }
        let must = self.queue.0.is_some();
        if let Poll::Ready(lane) = self.queue.poll(&self.lanes, cx, must) {
            self.lane = lane;
            return Some(Turn::WHOLE);
        }
        if !wants {
            // Something may come while it looks.
            return Some(Turn::LITTLE);
        }
        self.grow(Instant::now());
        if let Ok(may) = usize::try_from(self.credit)
            && self.credit >= CREDIT_MIN
            && !self.needs_lane
        {
            return Some(Turn { may, done: 0 });
        }
        let Poll::Ready(lane) = self.queue.poll(&self.lanes, cx, true) else { return None };
        self.lane = lane;
        Some(Turn::WHOLE)
    }

    fn grow(&mut self, now: Instant) {
        let units = now.saturating_duration_since(self.credited).as_micros() / CREDIT_UNIT.as_micros();
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        self.credited += CREDIT_UNIT * units;
        self.credit = (self.credit + i64::from(units)).min(CREDIT_MAX);
    }

    /// Ends a turn; true if the connection must be polled again, because there is `more` to do or to give a lane back. After a
    /// turn that was not short it keeps the lane until then: those that are ready already are polled before, and would take it
    /// one after the other.
    pub fn end(&mut self, turn: &Turn, more: bool) -> bool {
        if turn.done >= SHORT {
            // Time before it makes good nothing that is owed for it.
            self.grow(Instant::now());
        }
        self.credit = (self.credit - i64::try_from(turn.done).unwrap_or(i64::MAX)).max(-DEBT_MAX);
        if turn.done < SHORT {
            self.lane = None;
        }
        more || self.lane.is_some()
    }

    /// Ends `turn`, because something comes that costs so much; true if it must wait for a turn that is whole.
    pub fn puts_off(&mut self, turn: &mut Turn, work: usize) -> bool {
        self.needs_lane = !turn.is_whole() && work > CREDIT_MAX as usize;
        if self.needs_lane {
            turn.use_up();
        }
        self.needs_lane
    }

    /// Wants no more turns.
    pub fn leave(&mut self) {
        (self.queue, self.lane) = (Queue::default(), None);
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    /// A connection that has used all its credit, and the time.
    fn spent(lanes: &Lanes) -> (Pace, Instant) {
        // It has had no time yet.
        let now = Instant::now() + Duration::from_secs(3600);
        (Pace { credit: 0, ..Pace::new(lanes.clone(), now) }, now)
    }

    #[test]
    fn whole_turns_are_done_one_at_a_time_and_in_order() {
        let (lanes, context) = (Lanes::new(1), &mut Context::from_waker(Waker::noop()));
        let (mut first, now) = spent(&lanes);
        let (mut second, _) = spent(&lanes);
        let (mut third, _) = spent(&lanes);
        // Something may come while it looks, and a window of messages is not to be cut in two for that.
        assert!(first.begin(false, context).unwrap().is_whole());
        let mut turn = first.begin(true, context).unwrap();
        assert!(turn.is_whole());
        assert!(second.begin(true, context).is_none());
        assert!(third.begin(true, context).is_none());
        // Who has done little is not held up, but does no more than that.
        assert_eq!(Pace::new(lanes.clone(), now).begin(true, context).unwrap().left(), CREDIT_FIRST as usize);
        turn.add(SHORT);
        assert!(first.end(&turn, false), "it must be polled again to give the lane back");
        assert!(second.begin(true, context).is_none(), "others that are ready have their turn before");
        // It wants another turn, and is the last in the queue.
        assert!(first.begin(true, context).is_none());
        assert!(third.begin(true, context).is_none());
        let turn = second.begin(true, context).unwrap();
        assert!(turn.is_whole());
        assert!(!second.end(&turn, false), "it was short");
        let turn = third.begin(true, context).unwrap();
        assert!(third.end(&turn, true));
    }

    #[test]
    fn who_wants_no_lane_any_more_keeps_it_from_nobody() {
        for leaves in [false, true] {
            let (lanes, context) = (Lanes::new(1), &mut Context::from_waker(Waker::noop()));
            let (mut first, _) = spent(&lanes);
            let (mut second, _) = spent(&lanes);
            let (mut third, _) = spent(&lanes);
            let turn = first.begin(true, context).unwrap();
            assert!(second.begin(true, context).is_none());
            assert!(!first.end(&turn, false));
            // The lane has come to the second, and the third is behind it.
            assert!(third.begin(true, context).is_none());
            if leaves {
                second.leave();
            } else {
                assert!(!second.begin(false, context).unwrap().is_whole());
            }
            assert!(third.begin(true, context).unwrap().is_whole());
        }
    }

    #[test]
    fn time_before_a_whole_turn_makes_good_nothing_of_it() {
        let (lanes, context) = (Lanes::new(1), &mut Context::from_waker(Waker::noop()));
        let (mut pace, _) = spent(&lanes);
        pace.credited = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
        let mut turn = pace.begin(true, context).unwrap();
        turn.use_up();
        pace.end(&turn, false);
        pace.lane = None;
        let _lane = lanes.turns.clone().try_acquire_owned().unwrap();
        assert!(pace.begin(true, context).is_none());
    }

    #[test]
    fn one_dear_packet_waits_for_a_lane_whatever_the_credit() {
        let (lanes, context) = (Lanes::new(1), &mut Context::from_waker(Waker::noop()));
        let lane = lanes.turns.clone().try_acquire_owned().unwrap();
        let mut pace = Pace::new(lanes.clone(), Instant::now());
        let mut turn = pace.begin(true, context).unwrap();
        assert!(!pace.puts_off(&mut turn, CREDIT_MAX as usize));
        assert!(!turn.is_over());
        assert!(pace.puts_off(&mut turn, CREDIT_MAX as usize + 1));
        assert!(turn.is_over());
        pace.end(&turn, true);
        (pace.credit, pace.credited) = (CREDIT_MAX, Instant::now());
        assert!(pace.begin(true, context).is_none());
        drop(lane);
        let mut turn = pace.begin(true, context).unwrap();
        assert!(!pace.puts_off(&mut turn, usize::MAX), "this is the turn for it");
        turn.add(WORK_PER_TURN);
        pace.end(&turn, false);
        (pace.credit, pace.credited) = (CREDIT_MAX, Instant::now());
        pace.lane = None;
        let _lane = lanes.turns.clone().try_acquire_owned().unwrap();
        assert!(pace.begin(true, context).is_some(), "credit is good for what is cheap");
    }

    #[test]
    fn credit_grows_with_time_up_to_a_bound_and_debts_are_paid() {
        let (mut pace, now) = spent(&Lanes::new(1));
        let after = |micros| now + Duration::from_micros(micros);
        // Looking often loses nothing.
        (1..=199).for_each(|micros| pace.grow(after(micros)));
        pace.grow(after(200));
        assert_eq!(pace.credit, 100);
        let mut turn = Turn::WHOLE;
        turn.add(150);
        pace.end(&turn, false);
        assert_eq!(pace.credit, -50);
        pace.grow(after(260));
        assert_eq!(pace.credit, -20);
        pace.grow(after(400));
        assert_eq!(pace.credit, 50);
        pace.grow(after(1 << 40));
        assert_eq!(pace.credit, CREDIT_MAX);
        turn.add(usize::MAX);
        pace.end(&turn, false);
        assert_eq!(pace.credit, -DEBT_MAX);
    }

    #[tokio::test]
    async fn a_handshake_waits_for_a_lane_at_each_poll_and_for_no_turn() {
        let (lanes, polls) = (Lanes::new(1), std::cell::Cell::new(0));
        let _turn = lanes.turns.clone().try_acquire_owned().unwrap();
        let mut handshake = Box::pin(lanes.handshake(std::future::poll_fn(|cx| {
            polls.set(polls.get() + 1);
            cx.waker().wake_by_ref();
            if polls.get() < 3 { Poll::Pending } else { Poll::Ready(()) }
        })));
        let context = &mut Context::from_waker(Waker::noop());
        // Others first, in the lane, and then its work, and others again.
        for (done, free) in [(0, 0), (1, 1), (1, 0), (2, 1)] {
            assert!(handshake.as_mut().poll(context).is_pending());
            assert_eq!((polls.get(), lanes.handshakes.available_permits()), (done, free));
        }
        let lane = lanes.handshakes.clone().try_acquire_owned().unwrap();
        for _ in 0..5 {
            assert!(handshake.as_mut().poll(context).is_pending());
        }
        drop(lane);
        assert!(handshake.as_mut().poll(context).is_pending());
        assert_eq!(polls.get(), 2);
        assert!(handshake.as_mut().poll(context).is_ready());
    }
}
