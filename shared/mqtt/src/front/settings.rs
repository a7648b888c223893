//! What an operator may set.

use std::time::Duration;

use shared::config::Secret;

/// Settings of a [`super::Front`]. Every bound has its answer to "and when it is full?".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Largest packet taken, header included; a larger one ends the connection (0x95).
    pub packet_bytes_max: usize,
    /// PUBLISHes with QoS 1 and 2 a client may have open; MQTT 5 clients that go beyond are disconnected (0x93), 3.1.1 clients, who are not told, are not read from.
    pub receive_maximum: u16,
    /// Topic aliases a client may set up.
    pub topic_alias_max: u16,
    /// Longest keep alive, imposed on MQTT 5 clients; 0: what the client says.
    pub keep_alive_secs_max: u16,
    /// Longest life of a session without a connection, `u32::MAX`: for ever. A client that asks for more gets this.
    pub session_expiry_secs_max: u32,
    /// Longest client identifier; a longer one is refused (0x85).
    pub client_id_bytes_max: usize,
    /// Connections at a time. For one more, the oldest that has not sent its CONNECT is closed; where there is none, the new
    /// one is.
    pub connections_max: usize,
    /// Sessions that outlive their connections. For one more, the longest absent one that holds no message is ended; where
    /// there is none, it is refused (0x97).
    pub sessions_max: usize,
    /// Subscriptions of one session; one more is refused (0x97).
    pub subscriptions_max: usize,
    /// PUBLISHes with QoS 1 and 2 on their way to one client; what comes then is queued.
    pub inflight_max: u16,
    /// Messages queued for one session, offline or behind its window; the newest is dropped and counted.
    pub queue_messages_max: usize,
    /// Bytes queued for one session; the newest is dropped and counted.
    pub queue_bytes_max: usize,
    /// Bytes that clients may make the front hold, all together, besides retained messages: wills, topic aliases, subscriptions,
    /// queues, what waits for sockets, and unfinished packets. One client gets a quarter of what is left at most.
    pub memory_bytes_max: usize,
    /// Bytes waiting for one socket. Publishers to it are slowed for a moment at half of it; then QoS 0 is dropped and counted, QoS 1 and 2 queued.
    pub outbound_bytes_max: usize,
    /// How long one subscriber that does not keep up may slow its publishers.
    pub slow_subscriber_wait: Duration,
    /// Bytes of PUBLISHes of one connection held while there is no room for them; then it is not read from.
    pub held_bytes_max: usize,
    /// How long a PUBLISH is held; then the connection ends (0x97), so that the client sends again.
    pub hold_timeout: Duration,
    /// How long a connection may take until its CONNECT is there, TLS handshake included.
    pub connect_timeout: Duration,
    /// Retained messages; one more is refused (0x97).
    pub retained_messages_max: usize,
    /// Bytes of retained messages; one more is refused (0x97).
    pub retained_bytes_max: usize,
    /// Who may connect; with none, whoever reaches a listener. A CONNECT without a name and password of one of them is
    /// refused (0x86).
    pub users: Vec<User>,
}

/// A user name and its password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// As in CONNECT.
    pub name: String,
    /// As in CONNECT.
    pub password: Secret,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            packet_bytes_max: 1 << 20,
            receive_maximum: 1024,
            topic_alias_max: 16,
            keep_alive_secs_max: 0,
            session_expiry_secs_max: 7 * 24 * 3600,
            client_id_bytes_max: 256,
            connections_max: 10_000,
            sessions_max: 20_000,
            subscriptions_max: 1_000,
            inflight_max: 1024,
            queue_messages_max: 1_000,
            queue_bytes_max: 4 << 20,
            memory_bytes_max: 64 << 20,
            outbound_bytes_max: 1 << 20,
            slow_subscriber_wait: Duration::from_millis(100),
            held_bytes_max: 64 << 10,
            hold_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(10),
            retained_messages_max: 100_000,
            retained_bytes_max: 32 << 20,
            users: Vec::new(),
        }
    }
}

/// Settings of one listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerSettings {
    /// Its name in logs.
    pub name: String,
    /// Takes clients that prove nothing although it can be reached from elsewhere.
    pub allow_anonymous: bool,
}

impl Default for ListenerSettings {
    fn default() -> Self {
        Self { name: "mqtt".to_owned(), allow_anonymous: false }
    }
}
