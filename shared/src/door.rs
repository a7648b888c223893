//! How many connections a kind of listener holds, and which one leaves when another comes.
//!
//! A connection is *silent* until it has shown who it is (a good password or token), or, where nobody is asked, until it has
//! made one whole request. When all seats are taken, the connection that is silent for longest is closed in favour of the
//! new one. So connections that never say anything keep nobody out. Knows no sockets: whoever holds a [`Seat`]
//! waits for [`Seat::evicted`] beside its work, and closes after [`LEAVE_PAUSE`].

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use event_listener::Event;
use parking_lot::Mutex;

/// Connections told to leave that have not left yet; while there are so many, new ones wait. They count beyond the
/// bound, so descriptors are kept for them.
pub const LEAVING_MAX: usize = 16;

/// How long an evicted connection waits before it closes. With [`LEAVING_MAX`] it is the most that clients which come again
/// and again can have of a full door: 2,000 new connections a second.
pub const LEAVE_PAUSE: Duration = Duration::from_millis(8);

/// The seats of one kind of listener.
#[derive(Debug)]
pub struct Door {
    max: usize,
    seats: Mutex<Seats>,
    left: Event,
}

#[derive(Debug, Default)]
struct Seats {
    next: u64,
    silent: BTreeMap<u64, Arc<Leave>>,
    status: DoorStatus,
}

/// A door at a moment, for status and metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct DoorStatus {
    /// Connections now.
    pub connections: u64,
    /// Of those, told to leave and not gone yet.
    pub leaving: u64,
    /// Silent connections closed in favour of new ones.
    pub evicted: u64,
    /// Connections closed at once: all seats were taken by clients that are known.
    pub refused: u64,
}

/// One connection's place. Dropping it makes room.
#[derive(Debug)]
pub struct Seat {
    door: Arc<Door>,
    number: u64,
    leave: Arc<Leave>,
}

#[derive(Debug, Default)]
struct Leave {
    told: AtomicBool,
    event: Event,
}

/// Lets other tasks that are ready have their turn. A task that wakes itself goes behind all of them; what a runtime calls yielding
/// comes before most of them.
pub async fn others_first() {
    let mut yielded = false;
    poll_fn(|context| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

impl Door {
    /// A door with `max` seats, at least one.
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { max: max.max(1), seats: Mutex::default(), left: Event::new() })
    }

    /// How many connections it holds at most.
    pub fn max(&self) -> usize {
        self.max
    }

    /// What it holds now, and what it did since the start.
    pub fn status(&self) -> DoorStatus {
        self.seats.lock().status
    }

    /// A seat for a new connection; `None`: all are taken by clients that are known. Waits until other tasks that are ready
    /// had their turn: a hundred connections that come at once would all stand before them. Waits for as long as
    /// [`LEAVING_MAX`] evicted connections are still closing.
    pub async fn enter(self: &Arc<Self>) -> Option<Seat> {
        others_first().await;
        loop {
            let left = {
                let mut seats = self.seats.lock();
                if seats.status.leaving < LEAVING_MAX as u64 {
                    return self.take(&mut seats);
                }
                self.left.listen()
            };
            left.await;
        }
    }

    /// Closes the connection that is silent for longest, if there is one: for who is out of descriptors.
    pub fn evict(&self) -> bool {
        self.seats.lock().evict()
    }

    fn take(self: &Arc<Self>, seats: &mut Seats) -> Option<Seat> {
        if seats.status.connections - seats.status.leaving >= self.max as u64 && !seats.evict() {
            seats.status.refused += 1;
            return None;
        }
        let (number, leave) = (seats.next, Arc::new(Leave::default()));
        seats.next += 1;
        seats.silent.insert(number, leave.clone());
        seats.status.connections += 1;
        Some(Seat { door: self.clone(), number, leave })
    }
}

impl Seats {
    fn evict(&mut self) -> bool {
        let Some((_, oldest)) = self.silent.pop_first() else { return false };
        self.status.leaving += 1;
        self.status.evicted += 1;
        oldest.told.store(true, Ordering::Release);
        oldest.event.notify(usize::MAX);
        true
    }
}

impl Seat {
    /// The client has shown who it is: from now on it is not closed in favour of others.
    pub fn known(&self) {
        self.door.seats.lock().silent.remove(&self.number);
    }

    /// Resolves when the connection must close in favour of another.
    pub async fn evicted(&self) {
        loop {
            // Asked for before looking, so that nothing is missed in between.
            let told = self.leave.event.listen();
            if self.leave.told.load(Ordering::Acquire) {
                return;
            }
            told.await;
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut seats = self.door.seats.lock();
        seats.silent.remove(&self.number);
        seats.status.connections -= 1;
        if self.leave.told.load(Ordering::Acquire) {
            seats.status.leaving -= 1;
        }
        drop(seats);
        self.door.left.notify(usize::MAX);
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Waker};

    use super::*;
    use crate::block_on::block_on;

    fn told(seat: &Seat) -> bool {
        seat.leave.told.load(Ordering::Acquire)
    }

    #[test]
    fn the_longest_silent_connection_makes_room() {
        let door = Door::new(3);
        let seats: Vec<Seat> = (0..3).filter_map(|_| block_on(door.enter())).collect();
        seats[0].known();
        let new = block_on(door.enter()).expect("a silent one leaves");
        assert_eq!(seats.iter().map(told).collect::<Vec<_>>(), [false, true, false]);
        block_on(seats[1].evicted());
        assert_eq!(door.status(), DoorStatus { connections: 4, leaving: 1, evicted: 1, refused: 0 });
        new.known();
        drop(seats);
        assert_eq!(door.status(), DoorStatus { connections: 1, leaving: 0, evicted: 1, refused: 0 });
    }

    #[test]
    fn clients_that_are_known_stay() {
        let door = Door::new(2);
        let seats: Vec<Seat> = (0..2).filter_map(|_| block_on(door.enter())).collect();
        seats.iter().for_each(Seat::known);
        assert!(block_on(door.enter()).is_none());
        assert_eq!(door.status().refused, 1);
        drop(seats);
        assert!(block_on(door.enter()).is_some());
    }

    #[test]
    fn a_flood_waits_until_those_who_were_told_have_left() {
        let door = Door::new(LEAVING_MAX * 4);
        let mut seats: Vec<Seat> = (0..door.max()).filter_map(|_| block_on(door.enter())).collect();
        let flood: Vec<Seat> = (0..LEAVING_MAX).filter_map(|_| block_on(door.enter())).collect();
        assert_eq!(flood.len(), LEAVING_MAX);
        assert_eq!(door.status().connections, (door.max() + LEAVING_MAX) as u64);
        let mut waiting = std::pin::pin!(door.enter());
        let mut context = Context::from_waker(Waker::noop());
        for _ in 0..3 {
            assert!(waiting.as_mut().poll(&mut context).is_pending());
        }
        seats.remove(0);
        assert!(matches!(waiting.as_mut().poll(&mut context), Poll::Ready(Some(_))));
    }

    #[test]
    fn others_have_their_turn_before_a_connection_enters() {
        let door = Door::new(2);
        let mut entering = std::pin::pin!(door.enter());
        let mut context = Context::from_waker(Waker::noop());
        assert!(entering.as_mut().poll(&mut context).is_pending());
        assert_eq!(door.status().connections, 0);
        assert!(matches!(entering.as_mut().poll(&mut context), Poll::Ready(Some(_))));
    }
}
