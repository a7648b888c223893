//! Progress of long commands on standard error.

use std::io::{IsTerminal as _, Write as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::bytes_text;

/// How often a terminal's line is written anew, and how often a line is added to a file.
const ON_TERMINAL: Duration = Duration::from_secs(1);
const IN_FILE: Duration = Duration::from_secs(10);

/// What is done of what there is to do.
#[derive(Debug, Default)]
pub(super) struct Progress {
    objects_all: AtomicU64,
    objects: AtomicU64,
    bytes_all: AtomicU64,
    bytes: AtomicU64,
    visible: bool,
}

impl Progress {
    /// One that is shown.
    pub fn visible() -> Self {
        Self { visible: true, ..Self::default() }
    }

    /// So much more is to be done.
    pub fn expect(&self, objects: u64, bytes: u64) {
        self.objects_all.fetch_add(objects, Ordering::Relaxed);
        self.bytes_all.fetch_add(bytes, Ordering::Relaxed);
    }

    /// An object of so many bytes is done.
    pub fn done(&self, bytes: u64) {
        self.objects.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Objects and bytes done.
    pub fn so_far(&self) -> (u64, u64) {
        (self.objects.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }

    fn line(&self, elapsed: Duration) -> String {
        let (objects, bytes) = self.so_far();
        let rate = (bytes as f64 / elapsed.as_secs_f64().max(0.001)) as u64;
        format!(
            "{objects} of {} objects, {} of {}, {}/s",
            self.objects_all.load(Ordering::Relaxed),
            bytes_text(bytes),
            bytes_text(self.bytes_all.load(Ordering::Relaxed)),
            bytes_text(rate)
        )
    }

    /// Does `work` and shows how far it is.
    pub async fn shown<T>(&self, work: impl Future<Output = T>) -> T {
        if !self.visible {
            return work.await;
        }
        let terminal = std::io::stderr().is_terminal();
        let began = Instant::now();
        let mut tick = tokio::time::interval(if terminal { ON_TERMINAL } else { IN_FILE });
        tick.tick().await;
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => {
                    self.show(began.elapsed(), terminal, true);
                    return done;
                }
                _ = tick.tick() => self.show(began.elapsed(), terminal, false),
            }
        }
    }

    fn show(&self, elapsed: Duration, terminal: bool, last: bool) {
        let line = self.line(elapsed);
        let mut err = std::io::stderr().lock();
        // Progress that nobody can see is no reason to stop.
        let _ = match (terminal, last) {
            (true, false) => write!(err, "\r\x1b[K{line}").and_then(|()| err.flush()),
            (true, true) => writeln!(err, "\r\x1b[K{line}"),
            (false, _) => writeln!(err, "{line}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_much_of_what_and_how_fast() {
        let progress = Progress::default();
        progress.expect(3, 3 << 20);
        progress.done(1 << 20);
        assert_eq!(progress.line(Duration::from_millis(500)), "1 of 3 objects, 1.0 MiB of 3.0 MiB, 2.0 MiB/s");
    }
}
