//! Fence and collection, exhaustively: a model of how nodes own a shard whose WAL lies in an object store, and a check
//! of every order in which their steps, requests and deletions can happen within bounds.
//!
//! The model follows `src/archive/claim.rs`, `shipper.rs` and `splitter.rs`, with one block per WAL object and one
//! segment per root. It says what must hold (`promises.rs`), and each rule of the protocol is taken away once to see that
//! something then breaks. `cargo test --test fence_model -- --nocapture` shows the counterexamples.
//!
//! `TRIBUTARY_FENCE_MODEL=full` adds the larger bounds: build with `--release`, they visit tens of millions of states.

mod bucket;
mod checker;
mod promises;
mod protocol;

use checker::{Counterexample, search};
use promises::{
    ALL, IN_HISTORY, NO_HOLE, NO_INTERLEAVING, NOT_BY_ITSELF, NOT_TWICE, NOTHING_LATE, SAFETY, TRULY_PUBLISHED,
};
use protocol::{Bounds, Protocol, Rules};

/// More states than any bound here reaches.
const STATES_MAX: usize = 100_000_000;

/// Bounds of the shard without local state: nodes, claims, appends, publishes, lost answers.
const fn bounds(nodes: usize, claims: u8, appends: u8, publishes: u8, lost: u8) -> Bounds {
    Bounds { nodes, claims, appends, publishes, lost, stepwise: true, common: 0 }
}

/// The same where two nodes have local WALs of one origin, which end before block `common`.
const fn copied(common: u8, nodes: usize, claims: u8, appends: u8, publishes: u8, lost: u8) -> Bounds {
    Bounds { common, ..bounds(nodes, claims, appends, publishes, lost) }
}

fn full() -> bool {
    std::env::var("TRIBUTARY_FENCE_MODEL").is_ok_and(|tier| tier == "full")
}

/// Nothing that can happen breaks any of `promises`.
fn holds(rules: Rules, promises: &'static [&'static str], fast: &[Bounds], larger: &[Bounds]) {
    for bounds in fast.iter().chain(larger.iter().filter(|_| full())) {
        let began = std::time::Instant::now();
        let report = search(&Protocol { rules, bounds: *bounds, promises }, STATES_MAX);
        if let Some(Counterexample { trace, .. }) = report.counterexample {
            panic!("{bounds:?}\n{trace}");
        }
        assert!(report.exhausted, "{bounds:?}: more than {STATES_MAX} states");
        let (states, steps, depth) = (report.states, report.steps, report.depth);
        println!("{bounds:?}\n      {states} states, {steps} steps, depth {depth}, {:.1?}", began.elapsed());
    }
}

/// Without one of the rules, `promise` is broken, and the search sees it.
fn breaks(rules: Rules, bounds: Bounds, promise: &'static str, promises: &'static [&'static str]) {
    let report = search(&Protocol { rules, bounds, promises }, STATES_MAX);
    let Some(Counterexample { broken, trace }) = report.counterexample else {
        panic!("{rules:?} {bounds:?}: nothing found in {} states", report.states);
    };
    println!("found after {} states:\n{trace}", report.states);
    assert_eq!(broken.promise, promise, "{}\n{trace}", broken.how);
    assert!(trace.contains("BROKEN"), "the trace does not lead to the end:\n{trace}");
}

#[test]
fn no_order_of_claims_appends_publishes_and_deletions_breaks_a_promise() {
    let fast = [bounds(2, 2, 2, 2, 0), bounds(2, 2, 2, 1, 1)];
    let larger = [
        bounds(2, 3, 2, 2, 1),
        bounds(3, 2, 2, 2, 1),
        bounds(2, 2, 3, 3, 1),
        bounds(2, 2, 2, 2, 2),
        bounds(3, 3, 3, 2, 0),
    ];
    holds(Rules::ALL, ALL, &fast, &larger);
}

#[test]
fn nor_do_three_nodes_that_claim_at_once() {
    holds(Rules::ALL, ALL, &[bounds(3, 3, 1, 1, 0)], &[bounds(3, 3, 2, 1, 1)]);
}

#[test]
fn nor_does_an_answer_that_is_lost_while_roots_are_published() {
    holds(Rules::ALL, ALL, &[bounds(2, 2, 1, 2, 1)], &[bounds(2, 2, 1, 3, 2)]);
}

#[test]
fn nor_does_a_copied_data_directory_that_ships_what_its_original_ships() {
    let fast = [copied(2, 2, 2, 4, 1, 0), copied(2, 2, 1, 4, 1, 1)];
    holds(Rules::ALL, ALL, &fast, &[copied(2, 2, 2, 4, 2, 1), copied(3, 2, 2, 5, 2, 0)]);
}

#[test]
fn looking_for_the_newest_root_before_deleting_keeps_data_whole_too() {
    let rules = Rules { repeat_root: false, check_publish: true, ..Rules::ALL };
    // A round that is begun anew may still meet its own root and step down; what there is, is safe.
    holds(rules, SAFETY, &[bounds(2, 1, 1, 2, 1)], &[bounds(2, 2, 2, 3, 1)]);
}

#[test]
fn without_a_fence_block_two_owners_append() {
    breaks(Rules { fence_block: false, ..Rules::ALL }, bounds(2, 1, 1, 0, 0), IN_HISTORY, ALL);
    breaks(Rules { fence_block: false, ..Rules::ALL }, bounds(2, 1, 1, 0, 0), NOTHING_LATE, &[NOTHING_LATE]);
}

#[test]
fn collected_fence_blocks_let_a_paused_owner_go_on() {
    breaks(Rules { keep_fence_blocks: false, ..Rules::ALL }, bounds(2, 1, 1, 1, 0), NOTHING_LATE, ALL);
}

#[test]
fn a_collected_first_root_lets_a_paused_owner_publish_and_delete() {
    let rules = Rules { keep_fence_roots: false, ..Rules::ALL };
    breaks(rules, bounds(2, 1, 0, 2, 0), TRULY_PUBLISHED, ALL);
    breaks(rules, bounds(2, 1, 0, 2, 0), NO_HOLE, &[NO_HOLE]);
}

#[test]
fn taking_what_exists_for_ones_own_loses_acknowledged_blocks() {
    breaks(Rules { compare: false, ..Rules::ALL }, bounds(2, 1, 1, 0, 0), IN_HISTORY, ALL);
    breaks(Rules { compare: false, ..Rules::ALL }, bounds(3, 2, 2, 0, 0), NO_INTERLEAVING, &[NO_INTERLEAVING]);
}

#[test]
fn a_claim_that_does_not_look_for_newer_roots_puts_its_fence_where_no_root_knows_of_it() {
    breaks(Rules { check_claim: false, ..Rules::ALL }, bounds(2, 2, 1, 3, 0), NOTHING_LATE, ALL);
}

#[test]
fn a_claim_that_does_not_look_again_behind_its_fence_serves_an_old_history() {
    breaks(Rules { check_fence: false, ..Rules::ALL }, bounds(3, 2, 0, 0, 0), IN_HISTORY, ALL);
}

#[test]
fn a_wal_that_is_trimmed_before_its_root_is_published_loses_acknowledged_blocks() {
    breaks(Rules { publish_first: false, ..Rules::ALL }, bounds(2, 0, 1, 1, 0), IN_HISTORY, ALL);
}

#[test]
fn a_block_that_is_given_up_and_made_anew_collides_with_itself() {
    let rules = Rules { repeat_block: false, ..Rules::ALL };
    breaks(rules, bounds(2, 0, 2, 0, 1), NOT_BY_ITSELF, ALL);
    // And once somebody else has trimmed what became of the first, the second is acknowledged in its place.
    breaks(rules, bounds(2, 1, 2, 1, 1), NOTHING_LATE, SAFETY);
}

#[test]
fn a_root_that_is_given_up_and_made_anew_collides_with_itself() {
    breaks(Rules { repeat_root: false, ..Rules::ALL }, bounds(2, 0, 0, 2, 1), NOT_BY_ITSELF, ALL);
}

#[test]
fn a_root_that_is_given_up_and_made_anew_deletes_what_its_successors_need() {
    let rules = Rules { repeat_root: false, ..Rules::ALL };
    breaks(rules, bounds(2, 1, 0, 2, 1), TRULY_PUBLISHED, SAFETY);
    breaks(rules, bounds(2, 1, 0, 2, 1), NO_HOLE, &[NO_HOLE]);
}

#[test]
fn a_first_object_that_the_original_ships_as_well_is_no_fence() {
    breaks(Rules { own_fence: false, ..Rules::ALL }, copied(2, 2, 1, 4, 1, 0), NOT_TWICE, ALL);
}
