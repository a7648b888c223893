//! A simulation of the whole: edges, the link, shards of two engines, the nodes that serve them, and one bucket, driven by
//! one seed on a scheduler of our own. No sockets, no threads, no clock but a virtual one: the same seed gives the same
//! history. See docs/verification.md for what is simulated, what is judged, and how to replay a seed.

mod chaos;
mod client;
mod edge;
mod judge;
mod node;
mod scheduler;
mod store;
mod world;

use std::cell::RefCell;
use std::ops::Range;

use shared::name::TimestampMs;
use tokio::time::Instant;

use crate::planted::Bug;
use crate::wal::powercut::Random;
use scheduler::{Processes, Scheduler};

/// What everything in a run draws from and reports to. One run to a thread.
struct Context {
    random: Random,
    /// What the product draws: nonces and the jitter of pauses.
    nonces: Random,
    begun: Instant,
    wall_ms: TimestampMs,
    bug: Option<Bug>,
    history: u64,
    violation: Option<String>,
    trace: bool,
    processes: Processes,
}

thread_local! {
    static CONTEXT: RefCell<Option<Context>> = const { RefCell::new(None) };
}

/// 2026-01-01.
const WALL_MS: TimestampMs = 1_767_225_600_000;

fn with<T>(read: impl FnOnce(&mut Context) -> T) -> Option<T> {
    CONTEXT.with(|context| context.try_borrow_mut().ok()?.as_mut().map(read))
}

/// Whether this thread runs a simulation.
pub(crate) fn is_running() -> bool {
    with(|_| ()).is_some()
}

/// The product's next random number, where a simulation runs.
pub(crate) fn random() -> Option<u64> {
    with(|context| context.nonces.next())
}

/// Whether a bug is planted.
pub(crate) fn planted(bug: Bug) -> bool {
    with(|context| context.bug == Some(bug)).unwrap_or(false)
}

/// A number below `bound`, drawn by the seed.
fn draw(bound: u64) -> u64 {
    with(|context| context.random.below(bound)).unwrap_or(0)
}

/// True so many times in a thousand.
fn chance(per_mille: u64) -> bool {
    draw(1000) < per_mille
}

/// Milliseconds since the run began: a clock that only goes forward.
fn now_ms() -> u64 {
    with(|context| context.begun.elapsed().as_millis() as u64).unwrap_or(0)
}

/// The wall clock of all machines.
fn wall_ms() -> TimestampMs {
    with(|context| context.wall_ms + context.begun.elapsed().as_millis() as i64).unwrap_or(WALL_MS)
}

/// The wall clock jumps.
fn jump(by_ms: i64) {
    with(|context| context.wall_ms += by_ms);
}

fn mix(history: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(history, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// Adds an event to the history.
fn note(event: impl FnOnce() -> String) {
    let text = format!("{:>9} {}", now_ms(), event());
    with(|context| {
        context.history = mix(context.history, text.as_bytes());
        if context.trace {
            println!("{text}");
        }
    });
}

/// Adds a step to the history.
fn note_step(process: u64) {
    let now = now_ms();
    with(|context| context.history = mix(mix(context.history, &now.to_be_bytes()), &process.to_be_bytes()));
}

/// An invariant does not hold: the run ends.
fn fail(violation: String) {
    note(|| format!("VIOLATION: {violation}"));
    with(|context| {
        context.violation.get_or_insert(violation);
        context.processes.finish();
    });
}

/// How a run came out.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Outcome {
    /// Hash over all events and steps.
    history: u64,
    steps: u64,
    violation: Option<String>,
    /// What happened how often.
    tally: world::Tally,
}

/// Runs one seed to its end.
fn run(seed: u64, bug: Option<Bug>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let processes = Processes::default();
    let entered = runtime.enter();
    let context = Context {
        random: Random(seed),
        nonces: Random(!seed),
        begun: Instant::now(),
        wall_ms: WALL_MS,
        bug,
        history: 0xcbf2_9ce4_8422_2325,
        violation: None,
        trace: std::env::var_os("SIM_TRACE").is_some(),
        processes: processes.clone(),
    };
    CONTEXT.with(|slot| *slot.borrow_mut() = Some(context));
    let world = world::World::new(processes.clone());
    world.begin();
    let scheduler = tokio::task::unconstrained(Scheduler::new(processes));
    let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| runtime.block_on(scheduler)));
    let steps = ran.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        fail(format!("panic: {}", text.unwrap_or_default()));
        0
    });
    let tally = world.tally();
    drop((world, entered));
    drop(runtime);
    let context = CONTEXT.with(|slot| slot.borrow_mut().take()).expect("it was put there");
    Outcome { history: context.history, steps, violation: context.violation, tally }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().and_then(|text| text.parse().ok())
}

/// The command that replays a seed.
fn replay(seed: u64) -> String {
    format!("SIM_SEED={seed} SIM_TRACE=1 cargo test -p tributary-cloud --lib sim::nothing -- --nocapture")
}

#[test]
fn nothing_acknowledged_is_lost_doubled_or_contradicted() {
    let first = number("SIM_FIRST").unwrap_or(0);
    let seeds: Vec<u64> = match (number("SIM_SEED"), number("SIM_SEEDS")) {
        (Some(seed), _) => vec![seed],
        (None, Some(seeds)) => (first..first + seeds).collect(),
        (None, None) => (0..25).collect(),
    };
    let (mut tally, mut steps, mut broken) = (world::Tally::default(), 0, Vec::new());
    for seed in seeds.iter().copied() {
        let outcome = run(seed, None);
        if let Some(violation) = outcome.violation {
            println!("seed {seed}: {violation}\nreplay: {}", replay(seed));
            broken.push(seed);
        }
        tally.add(&outcome.tally);
        steps += outcome.steps;
    }
    println!("{} seeds, {steps} steps: {tally:?}", seeds.len());
    assert!(broken.is_empty(), "these seeds break a promise: {broken:?}");
}

/// Plants a bug and runs seeds until one finds it.
fn is_found(bug: Bug, seeds: Range<u64>) {
    let first = number("SIM_FIRST").unwrap_or(seeds.start);
    let seeds = first..number("SIM_SEEDS").map_or(seeds.end, |seeds| first + seeds);
    for seed in seeds.clone() {
        if let Some(violation) = run(seed, Some(bug)).violation {
            println!("{bug:?}: found by seed {seed}, after {} seeds: {violation}", seed - first + 1);
            return;
        }
    }
    panic!("{bug:?} is not found by seeds {seeds:?}");
}

#[test]
fn a_take_over_without_a_fence_block_is_found() {
    is_found(Bug::NoFence, 0..40);
}

#[test]
fn collected_fence_blocks_are_found() {
    is_found(Bug::FencesCollected, 0..40);
}

#[test]
fn a_taken_name_counted_as_success_is_found() {
    is_found(Bug::NoNonce, 0..40);
}

#[test]
fn a_position_written_after_its_data_is_found() {
    is_found(Bug::MarkerAfterData, 0..40);
}

#[test]
fn an_answer_before_its_block_is_durable_is_found() {
    is_found(Bug::EarlyAnswer, 0..40);
}

#[test]
fn an_edge_told_to_delete_what_is_merely_durable_is_found() {
    is_found(Bug::SafeIsDurable, 0..40);
}

#[test]
fn offsets_used_again_after_a_restore_are_found() {
    is_found(Bug::OffsetsReused, 0..40);
}

#[test]
fn a_wal_trimmed_before_its_manifest_is_found() {
    is_found(Bug::TrimmedEarly, 0..40);
}

#[test]
fn a_memory_shard_that_uses_offsets_again_is_found() {
    is_found(Bug::LifeForgotten, 0..40);
}

// The next three show in one seed of many: these are where they are known to. A change of the product's timing makes other
// histories; then others are looked for, with SIM_FIRST and SIM_SEEDS.

#[test]
fn a_stream_that_moves_before_it_is_safe_is_found() {
    is_found(Bug::MovedUnsafe, 58..68);
}

#[test]
fn an_older_disk_that_goes_on_is_found() {
    is_found(Bug::OlderDiskGoesOn, 130..140);
}

#[test]
fn a_start_that_trusts_the_page_cache_is_found() {
    is_found(Bug::CacheTrusted, 20..30);
}

/// A bug that the product had, and that the simulation found.
#[test]
fn an_edge_that_forgets_where_an_incarnation_began_is_found() {
    is_found(Bug::RenewalForgotten, 0..40);
}

#[test]
fn one_seed_is_one_history() {
    for seed in [3, 4] {
        let (first, second) = (run(seed, None), run(seed, None));
        assert_eq!(first, second);
        assert!(first.steps > 1000, "{first:?}");
    }
    assert_ne!(run(3, None).history, run(4, None).history);
}
