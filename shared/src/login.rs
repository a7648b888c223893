//! Failed log-ins are answered late, the later the more there were from one address for one user.
//!
//! A right password or token is always answered at once, whatever failed before: nobody can lock somebody else out, also
//! not from behind the same NAT address. Only the wrong one waits. Table and waits are bounded in total; a failure for
//! which there is no room to wait is not answered at all. Pure: `now` is passed in, the caller sleeps.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasher as _;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// What the first failure waits; each further one twice as long as the one before.
pub const LOGIN_DELAY_MIN: Duration = Duration::from_millis(250);
/// What a failure waits at most.
pub const LOGIN_DELAY_MAX: Duration = Duration::from_secs(8);
/// Failures of one user and address are forgotten after so long without one.
const FORGET: Duration = Duration::from_secs(600);
/// Pairs of user and address that are remembered; the one whose last failure is oldest goes first.
const PAIRS_MAX: usize = 4096;
/// Failures that wait for their answer at a time, in total and for one pair.
const WAITING_MAX: usize = 256;
const WAITING_PER_PAIR_MAX: usize = 8;

/// The failed log-ins of one process.
#[derive(Debug, Default)]
pub struct LoginThrottle {
    hasher: RandomState,
    table: Mutex<LoginTable>,
}

#[derive(Debug, Default)]
struct LoginTable {
    pairs: HashMap<LoginPair, LoginFailures>,
    /// Pairs by their last failure.
    order: BTreeMap<u64, LoginPair>,
    next: u64,
    waiting: usize,
    failed: u64,
}

/// A user's name, hashed for it may be long, and the network that the log-in came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct LoginPair {
    user: u64,
    network: IpAddr,
}

#[derive(Debug)]
struct LoginFailures {
    count: u32,
    waiting: usize,
    last: Instant,
    order: u64,
}

/// A failure that waits for its answer. Drop it when the answer has left, or the client has.
#[derive(Debug)]
pub struct LoginDelay {
    /// How long from now.
    pub wait: Duration,
    pair: LoginPair,
    throttle: Arc<LoginThrottle>,
}

impl LoginThrottle {
    /// Notes a failure of `user` from `address`, and says how long its answer waits. `None`: too many wait already, so the
    /// connection is closed without an answer.
    pub fn failed(self: &Arc<Self>, now: Instant, user: &[u8], address: IpAddr) -> Option<LoginDelay> {
        let pair = LoginPair { user: self.hasher.hash_one(user), network: network(address) };
        let mut table = self.table.lock();
        let table = &mut *table;
        table.failed += 1;
        let order = table.next;
        table.next += 1;
        let entry = table.pairs.entry(pair);
        let failures = entry.or_insert(LoginFailures { count: 0, waiting: 0, last: now, order });
        if now.saturating_duration_since(failures.last) > FORGET {
            failures.count = 0;
        }
        failures.count = failures.count.saturating_add(1);
        failures.last = now;
        table.order.remove(&std::mem::replace(&mut failures.order, order));
        table.order.insert(order, pair);
        let wait = LOGIN_DELAY_MIN.saturating_mul(1 << (failures.count - 1).min(16)).min(LOGIN_DELAY_MAX);
        let room = table.waiting < WAITING_MAX && failures.waiting < WAITING_PER_PAIR_MAX;
        if room {
            table.waiting += 1;
            failures.waiting += 1;
        }
        if table.pairs.len() > PAIRS_MAX
            && let Some((_, oldest)) = table.order.pop_first()
        {
            table.pairs.remove(&oldest);
        }
        room.then(|| LoginDelay { wait, pair, throttle: self.clone() })
    }

    /// Log-ins that failed since the start.
    pub fn failed_total(&self) -> u64 {
        self.table.lock().failed
    }
}

impl Drop for LoginDelay {
    fn drop(&mut self) {
        let mut table = self.throttle.table.lock();
        table.waiting -= 1;
        // A pair that was forgotten meanwhile may have come back without this failure.
        if let Some(failures) = table.pairs.get_mut(&self.pair) {
            failures.waiting = failures.waiting.saturating_sub(1);
        }
    }
}

/// An IPv6 client can take any address of its /64.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_wait_grows_by_user_and_address() {
        let (throttle, now) = (Arc::new(LoginThrottle::default()), Instant::now());
        let wait = |user: &str, from: &str, at| throttle.failed(at, user.as_bytes(), address(from)).unwrap().wait;
        let millis: Vec<_> = (0..8).map(|_| wait("a", "10.0.0.1", now).as_millis()).collect();
        assert_eq!(millis, [250, 500, 1000, 2000, 4000, 8000, 8000, 8000]);
        // Another user behind the same address, and the same user elsewhere, are others.
        assert_eq!(wait("b", "10.0.0.1", now), LOGIN_DELAY_MIN);
        assert_eq!(wait("a", "10.0.0.2", now), LOGIN_DELAY_MIN);
        assert_eq!(wait("a", "::ffff:10.0.0.1", now), LOGIN_DELAY_MAX);
        assert_eq!(wait("a", "2001:db8::1", now), LOGIN_DELAY_MIN);
        assert_eq!(wait("a", "2001:db8::2", now), LOGIN_DELAY_MIN * 2);
        assert_eq!(wait("a", "10.0.0.1", now + FORGET + Duration::from_secs(1)), LOGIN_DELAY_MIN);
        assert_eq!(throttle.failed_total(), 14);
    }

    #[test]
    fn what_waits_is_bounded_for_a_pair_and_in_total() {
        let (throttle, now) = (Arc::new(LoginThrottle::default()), Instant::now());
        let fail = |user: usize| throttle.failed(now, &user.to_be_bytes(), address("10.0.0.1"));
        let one: Vec<_> = (0..100).filter_map(|_| fail(0)).collect();
        assert_eq!(one.len(), WAITING_PER_PAIR_MAX);
        let all: Vec<_> = (1..1000).filter_map(fail).collect();
        assert_eq!(one.len() + all.len(), WAITING_MAX);
        drop((one, all));
        assert!(fail(0).is_some());
    }

    #[test]
    fn the_table_is_bounded_and_forgets_the_oldest() {
        let (throttle, now) = (Arc::new(LoginThrottle::default()), Instant::now());
        let fail = |user: usize| throttle.failed(now, &user.to_be_bytes(), address("10.0.0.1")).unwrap().wait;
        for user in 0..PAIRS_MAX * 3 {
            fail(user);
        }
        let table = throttle.table.lock();
        assert_eq!((table.pairs.len(), table.order.len()), (PAIRS_MAX, PAIRS_MAX));
        drop(table);
        assert_eq!(fail(PAIRS_MAX * 3 - 1), LOGIN_DELAY_MIN * 2);
        assert_eq!(fail(0), LOGIN_DELAY_MIN);
    }
}
