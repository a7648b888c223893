//! The scheduler: one task that owns all processes and polls one of those that are ready, drawn by the seed.
//!
//! Time is tokio's paused clock, which moves on only when nothing is ready. The set of ready processes is ordered, so the
//! order in which wakers were called does not matter, only who is ready when.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use parking_lot::Mutex;
use shared::log::BoxFuture;

use super::{draw, note_step};

/// Whose process it is: what dies, pauses and starts together. 0 is the world itself.
pub type Owner = u32;

/// The world: network, store, whoever starts and stops the others.
pub const WORLD: Owner = 0;

/// More steps than any run takes: beyond it something spins.
const STEPS_MAX: u64 = 1_000_000;

/// Starts, stops and pauses processes.
#[derive(Clone, Default)]
pub struct Processes(Arc<Mutex<Shared>>);

#[derive(Default)]
struct Shared {
    next: u64,
    born: Vec<(u64, Owner, BoxFuture<'static, ()>)>,
    ready: BTreeSet<u64>,
    paused: BTreeSet<Owner>,
    /// Processes of an owner that are older than a number are to be dropped.
    killed: Vec<(Owner, u64)>,
    waker: Option<Waker>,
    done: bool,
}

impl Processes {
    /// Starts a process.
    pub fn spawn(&self, owner: Owner, process: impl Future<Output = ()> + Send + 'static) {
        let mut shared = self.0.lock();
        let id = shared.next;
        shared.next += 1;
        shared.born.push((id, owner, Box::pin(process)));
        shared.ready.insert(id);
        shared.wake();
    }

    /// Drops all processes of an owner, wherever they stand, before anything else runs.
    pub fn kill(&self, owner: Owner) {
        let mut shared = self.0.lock();
        let next = shared.next;
        shared.killed.push((owner, next));
        shared.paused.remove(&owner);
        shared.wake();
    }

    /// An owner's processes stand still until [`Processes::resume`]; the world goes on around them.
    pub fn pause(&self, owner: Owner) {
        self.0.lock().paused.insert(owner);
    }

    /// They go on.
    pub fn resume(&self, owner: Owner) {
        let mut shared = self.0.lock();
        shared.paused.remove(&owner);
        shared.wake();
    }

    /// The run is over.
    pub fn finish(&self) {
        let mut shared = self.0.lock();
        shared.done = true;
        shared.wake();
    }

    fn ready(&self, id: u64) {
        let mut shared = self.0.lock();
        shared.ready.insert(id);
        shared.wake();
    }
}

impl Shared {
    /// Waking only makes the runtime look again: no process runs under the lock.
    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

struct ProcessWaker(u64, Processes);

impl Wake for ProcessWaker {
    fn wake(self: Arc<Self>) {
        self.1.ready(self.0);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.1.ready(self.0);
    }
}

struct Process {
    owner: Owner,
    future: BoxFuture<'static, ()>,
}

/// Runs the processes; resolves with the number of steps when the run is over.
pub struct Scheduler {
    shared: Processes,
    processes: BTreeMap<u64, Process>,
    steps: u64,
}

impl Scheduler {
    pub fn new(shared: Processes) -> Self {
        Self { shared, processes: BTreeMap::new(), steps: 0 }
    }

    /// Takes in what was started and lets go of what was killed.
    fn settle(&mut self) -> bool {
        let (born, killed, done) = {
            let mut shared = self.shared.0.lock();
            (std::mem::take(&mut shared.born), std::mem::take(&mut shared.killed), shared.done)
        };
        for (id, owner, future) in born {
            self.processes.insert(id, Process { owner, future });
        }
        for (owner, below) in killed {
            let dead: Vec<u64> =
                self.processes.range(..below).filter(|(_, p)| p.owner == owner).map(|p| *p.0).collect();
            dead.iter().for_each(|id| drop(self.processes.remove(id)));
        }
        done
    }

    /// One of those that are ready and may run.
    fn pick(&self, waker: &Waker) -> Option<u64> {
        let mut shared = self.shared.0.lock();
        shared.waker = Some(waker.clone());
        shared.ready.retain(|id| self.processes.contains_key(id));
        let may_run: Vec<u64> =
            shared.ready.iter().copied().filter(|id| !shared.paused.contains(&self.processes[id].owner)).collect();
        if may_run.is_empty() {
            return None;
        }
        let picked = may_run[draw(may_run.len() as u64) as usize];
        shared.ready.remove(&picked);
        Some(picked)
    }
}

impl Future for Scheduler {
    type Output = u64;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<u64> {
        let this = &mut *self;
        loop {
            if this.settle() {
                // What is left is dropped by whoever drops this.
                return Poll::Ready(this.steps);
            }
            let Some(id) = this.pick(context.waker()) else {
                // A process that was dropped may have started or woken another.
                let shared = this.shared.0.lock();
                if shared.born.is_empty() && shared.killed.is_empty() && !shared.done {
                    return Poll::Pending;
                }
                continue;
            };
            this.steps += 1;
            assert!(this.steps < STEPS_MAX, "a process spins: {id}");
            note_step(id);
            let waker = Waker::from(Arc::new(ProcessWaker(id, this.shared.clone())));
            let process = this.processes.get_mut(&id).expect("picked among them");
            if process.future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
                drop(this.processes.remove(&id));
            }
        }
    }
}
