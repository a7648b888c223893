//! Counters of the front, added to once per buffer.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::Serialize;

use crate::memory::MEMORY_USES;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Live counters.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub $name: AtomicU64,)*
        }

        /// What the front counted since its start, and how many of each thing there are now.
        #[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
        pub struct Stats {
            $($(#[$doc])* pub $name: u64,)*
            /// Connections now.
            pub connections: u64,
            /// Connections closed at once because there were too many.
            pub connections_refused_total: u64,
            /// Connections without a CONNECT closed to make room for others.
            pub connections_evicted_total: u64,
            /// Sessions now, connected or kept.
            pub sessions: u64,
            /// Subscriptions now.
            pub subscriptions: u64,
            /// Retained messages now.
            pub retained_messages: u64,
            /// Bytes of retained messages now.
            pub retained_bytes: u64,
            /// Sessions that outlive their connections now.
            pub sessions_kept: u64,
            /// Bytes used of the memory budget now, by use: [`crate::front::MEMORY_USES`].
            pub memory_bytes: [u64; MEMORY_USES.len()],
            /// The memory budget.
            pub memory_bytes_max: u64,
        }

        impl Counters {
            pub fn read(&self) -> Stats {
                Stats { $($name: self.$name.load(Relaxed),)* ..Stats::default() }
            }
        }
    };
}

counters! {
    /// Connections accepted.
    connections_total,
    /// Sessions ended, longest absent first, to make room for others.
    sessions_evicted_total,
    /// CONNECTs refused because there are as many sessions as allowed, and each is connected or holds messages.
    sessions_refused_total,
    /// What clients asked for and did not get because the memory budget had no room.
    memory_refused_total,
    /// Connections ended because they read nothing for long while they held memory that others wanted.
    stuck_readers_total,
    /// Retained messages looked at for new subscriptions.
    retained_steps_total,
    /// Parts of the tree of subscriptions looked at for PUBLISHes.
    route_steps_total,
    /// CONNECTs refused.
    connects_refused_total,
    /// Connections ended because of what the client sent.
    protocol_errors_total,
    /// Sessions taken over by another connection with the same client identifier.
    takeovers_total,
    /// Connections ended because nothing came for 1.5 times the keep alive.
    keep_alive_timeouts_total,
    /// PUBLISHes received.
    received_messages_total,
    /// Bytes of PUBLISHes received.
    received_bytes_total,
    /// PUBLISHes handed to subscribers.
    sent_messages_total,
    /// Bytes written to sockets.
    written_bytes_total,
    /// Messages with QoS 0 dropped because a subscriber did not keep up.
    dropped_slow_total,
    /// Messages with QoS 1 and 2 dropped because a session's queue was full.
    dropped_queue_full_total,
    /// Messages a subscriber did not get because they are larger than it takes.
    dropped_too_large_total,
    /// Messages that expired before they could be sent.
    expired_total,
    /// PUBLISHes refused for good.
    refused_total,
    /// Connections ended because a PUBLISH found no room in time.
    hold_timeouts_total,
    /// PUBLISHes held now.
    held_messages,
    /// Acknowledgements that wait for durability or room now.
    held_acks,
}

pub(crate) fn add(counter: &AtomicU64, n: usize) {
    if n > 0 {
        counter.fetch_add(n as u64, Relaxed);
    }
}

pub(crate) fn sub(counter: &AtomicU64, n: usize) {
    if n > 0 {
        counter.fetch_sub(n as u64, Relaxed);
    }
}

impl Stats {
    /// Bytes queued for sessions, or on their way to kept ones, now.
    pub fn queued_bytes(&self) -> u64 {
        self.memory_bytes[crate::memory::MemoryUse::Queues as usize]
    }

    /// Bytes of unfinished packets and held PUBLISHes now.
    pub fn input_bytes(&self) -> u64 {
        self.memory_bytes[crate::memory::MemoryUse::Incoming as usize]
    }
}
