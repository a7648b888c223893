//! What both brokers do at their rim: read settings, open the admin port, load TLS files, log, and stop on a signal.
//!
//! Only binaries' `main` uses this crate; nothing below it reads the environment.

pub mod admin;
pub mod descriptors;
pub mod files;
pub mod http;
pub mod metrics;
pub mod settings;
pub mod tls;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::{TcpListener, TcpSocket};

/// Longest time a stop may take before the process ends anyway.
pub const STOP_SECS_MAX: u64 = 10;

/// How many tasks a worker runs before it looks for sockets and timers that became ready. With the usual 61 a client waited
/// 80 ms while others had work for every worker, a millisecond at a time.
const EVENT_INTERVAL: u32 = 4;
/// How many tasks a worker runs before it takes one that another thread woke. What a commit lets go is woken by the thread that
/// commits: with the usual interval it waited behind hundreds of new connections.
const WOKEN_ELSEWHERE_INTERVAL: u32 = 2;

/// What everything runs on.
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    runtime_builder().build()
}

fn runtime_builder() -> tokio::runtime::Builder {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.event_interval(EVENT_INTERVAL).global_queue_interval(WOKEN_ELSEWHERE_INTERVAL).enable_all();
    builder
}

/// Logs to standard error; `RUST_LOG` chooses levels, `info` by default.
pub fn init_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false)
        .init();
}

/// Resolves on SIGTERM or SIGINT. From then on the process ends within [`STOP_SECS_MAX`], whatever hangs: all that was
/// acknowledged is durable, so ending is always safe.
pub async fn stop_signal() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    std::thread::spawn(|| {
        std::thread::sleep(Duration::from_secs(STOP_SECS_MAX) - Duration::from_millis(500));
        tracing::error!("not stopped within {STOP_SECS_MAX} s, ending now; nothing acknowledged is lost");
        std::process::exit(1);
    });
    Ok(())
}

/// Connections that wait to be accepted. Of more than that the kernel drops the first packet, and a client tries again after
/// a second: a fleet that comes back at once needs more than the 128 that libraries ask for.
const BACKLOG: u32 = 1024;

/// Listens on `address`; `what` is the setting's key.
pub fn bind(what: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listen = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // A start must not wait for what the last life's connections left behind.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    listen().with_context(|| {
        format!("{what} = \"{address}\" cannot be listened on: is another process using it, or is it not this host's?")
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::sync::mpsc;

    use tokio::io::AsyncReadExt as _;

    use super::*;

    /// Tasks that always have something to do, and how often they were polled.
    fn keep_busy(runtime: &tokio::runtime::Runtime, micros: u64) -> (Arc<AtomicU64>, Arc<AtomicBool>) {
        let (polls, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        for _ in 0..100 {
            let (polls, stop) = (polls.clone(), stop.clone());
            runtime.spawn(std::future::poll_fn(move |cx| {
                polls.fetch_add(1, Ordering::Relaxed);
                // Long enough that what threads and sockets take is little beside it.
                let until = std::time::Instant::now() + Duration::from_micros(micros);
                while std::time::Instant::now() < until {}
                cx.waker().wake_by_ref();
                let stop = stop.load(Ordering::Relaxed);
                if stop { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
            }));
        }
        while polls.load(Ordering::Relaxed) < 1_000 {
            std::thread::yield_now();
        }
        (polls, stop)
    }

    /// The task that was woken has had time to wait for the next.
    fn wait_again() {
        std::thread::sleep(Duration::from_millis(2));
    }

    /// Half of the times it took so many polls of others; a thread that is not run for a while counts for no more than the rest.
    fn median(taken: impl Iterator<Item = u64>) -> u64 {
        let mut taken: Vec<u64> = taken.collect();
        taken.sort();
        taken[taken.len() / 2]
    }

    #[test]
    fn what_another_thread_wakes_comes_before_all_that_is_ready() {
        let runtime = runtime_builder().worker_threads(1).build().unwrap();
        let (polls, stop) = keep_busy(&runtime, 5);
        let (wake, mut woken) = tokio::sync::mpsc::channel::<u64>(1);
        let (report, reported) = mpsc::channel();
        let seen = polls.clone();
        runtime.spawn(async move {
            while let Some(then) = woken.recv().await {
                report.send(seen.load(Ordering::Relaxed) - then).unwrap();
            }
        });
        let taken = (0..101).map(|_| {
            wait_again();
            wake.blocking_send(polls.load(Ordering::Relaxed)).unwrap();
            reported.recv().unwrap()
        });
        let median = median(taken);
        stop.store(true, Ordering::Relaxed);
        assert!(median < 10, "{median} of 100 others were polled before");
    }

    #[test]
    fn a_socket_is_seen_before_all_that_is_ready_is_done() {
        let runtime = runtime_builder().worker_threads(1).build().unwrap();
        let (polls, stop) = keep_busy(&runtime, 50);
        let (mut here, there) = std::os::unix::net::UnixStream::pair().unwrap();
        let (report, reported) = mpsc::channel();
        let seen = polls.clone();
        there.set_nonblocking(true).unwrap();
        runtime.spawn(async move {
            let mut there = tokio::net::UnixStream::from_std(there).unwrap();
            while there.read_u8().await.is_ok() {
                report.send(seen.load(Ordering::Relaxed)).unwrap();
            }
        });
        let taken = (0..101).map(|_| {
            wait_again();
            let then = polls.load(Ordering::Relaxed);
            here.write_all(b"x").unwrap();
            reported.recv().unwrap() - then
        });
        let median = median(taken);
        stop.store(true, Ordering::Relaxed);
        assert!(median < 10, "{median} of 100 others were polled before");
    }

    #[tokio::test]
    async fn a_fleet_that_comes_at_once_is_not_told_to_try_again() {
        let listener = bind("[mqtt] listen", "127.0.0.1:0".parse().unwrap()).unwrap();
        let (address, mut fleet) = (listener.local_addr().unwrap(), Vec::new());
        // Nobody accepts, so that one too many would wait for ever.
        for _ in 0..500 {
            let device = tokio::time::timeout(Duration::from_secs(10), tokio::net::TcpStream::connect(address)).await;
            fleet.push(device.unwrap().unwrap());
        }
    }
}
