//! An explicit-state checker: every state that any order of actions reaches, breadth first, so that the first
//! counterexample is a shortest one.
//!
//! States are told apart by 64 bits of SipHash. At ten million states the chance that any one of them is taken for
//! another is about three in a million. Written here because the crate made for it brings a web server along.

use std::collections::HashMap;
use std::fmt::{Arguments, Write as _};
use std::hash::{BuildHasherDefault, DefaultHasher, Hash, Hasher};

/// What is checked.
pub trait Model {
    /// Everything there is, at one moment.
    type State: Clone + Hash;
    /// What may happen next.
    type Action: Copy;
    /// Where all histories begin.
    fn initial(&self) -> Self::State;
    /// Everything that may happen in `state`.
    fn actions(&self, state: &Self::State, found: &mut Vec<Self::Action>);
    /// What comes of it, told to `tale`; or the promise that it breaks.
    fn step(&self, state: &Self::State, action: Self::Action, tale: &mut Tale) -> Result<Self::State, Broken>;
    /// A state in a line, for people.
    fn picture(&self, state: &Self::State) -> String;
}

/// A promise that does not hold.
#[derive(Debug, Clone)]
pub struct Broken {
    pub promise: &'static str,
    pub how: String,
}

/// Collects what a step did, when somebody is going to read it.
#[derive(Debug, Default)]
pub struct Tale {
    told: Option<String>,
}

impl Tale {
    pub fn tell(&mut self, what: Arguments<'_>) {
        if let Some(told) = &mut self.told {
            let _ = told.write_fmt(what);
        }
    }
}

/// What a search found.
#[derive(Debug)]
pub struct Report {
    pub states: usize,
    pub steps: usize,
    /// Actions in the longest of the shortest ways to a state.
    pub depth: usize,
    /// Whether there was nothing left to look at.
    pub exhausted: bool,
    pub counterexample: Option<Counterexample>,
}

#[derive(Debug)]
pub struct Counterexample {
    pub broken: Broken,
    pub trace: String,
}

/// The state before this one, and which of its actions led here.
#[derive(Debug, Clone, Copy)]
struct Origin {
    parent: u64,
    action: u8,
}

/// The keys are hashes already.
#[derive(Default)]
struct Hashed(u64);

impl Hasher for Hashed {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {
        unreachable!("only u64 keys are hashed")
    }
    fn write_u64(&mut self, key: u64) {
        self.0 = key;
    }
}

type Seen = HashMap<u64, Origin, BuildHasherDefault<Hashed>>;

/// Looks at every state, or at `states_max` of them.
pub fn search<M: Model>(model: &M, states_max: usize) -> Report {
    let initial = model.initial();
    let mut seen = Seen::default();
    let first = key(&initial);
    seen.insert(first, Origin { parent: 0, action: 0 });
    let mut report = Report { states: 1, steps: 0, depth: 0, exhausted: true, counterexample: None };
    let (mut layer, mut next) = (vec![(first, initial)], Vec::new());
    let mut actions = Vec::new();
    let mut tale = Tale::default();
    while !layer.is_empty() {
        for (parent, state) in layer.drain(..) {
            actions.clear();
            model.actions(&state, &mut actions);
            for (number, action) in actions.iter().enumerate() {
                report.steps += 1;
                let origin = Origin { parent, action: number as u8 };
                match model.step(&state, *action, &mut tale) {
                    Ok(after) => {
                        let after_key = key(&after);
                        seen.entry(after_key).or_insert_with(|| {
                            next.push((after_key, after));
                            origin
                        });
                    }
                    Err(broken) => {
                        report.states = seen.len();
                        report.exhausted = false;
                        report.counterexample = Some(Counterexample { broken, trace: trace(model, &seen, origin) });
                        return report;
                    }
                }
            }
        }
        report.states = seen.len();
        if report.states > states_max {
            report.exhausted = false;
            return report;
        }
        report.depth += usize::from(!next.is_empty());
        std::mem::swap(&mut layer, &mut next);
    }
    report
}

fn key<S: Hash>(state: &S) -> u64 {
    let mut hasher = DefaultHasher::new();
    state.hash(&mut hasher);
    hasher.finish()
}

/// The way from the beginning to `last`, told step by step.
fn trace<M: Model>(model: &M, seen: &Seen, last: Origin) -> String {
    let mut way = vec![last];
    let mut state = model.initial();
    let root = key(&state);
    while let Some(origin) = way.last().filter(|origin| origin.parent != root).and_then(|last| seen.get(&last.parent)) {
        way.push(*origin);
    }
    let mut lines = format!("      {}\n", model.picture(&state));
    for (number, origin) in way.iter().rev().enumerate() {
        let mut actions = Vec::new();
        model.actions(&state, &mut actions);
        let mut tale = Tale { told: Some(String::new()) };
        let action = actions.get(usize::from(origin.action)).expect("the action that was taken here before");
        let after = model.step(&state, *action, &mut tale);
        let _ = writeln!(lines, "{:>4}. {}", number + 1, tale.told.unwrap_or_default().trim_end_matches(", "));
        match after {
            Ok(after) => state = after,
            Err(broken) => {
                let _ = writeln!(lines, "      BROKEN: {}: {}", broken.promise, broken.how);
                break;
            }
        }
        if number + 2 == way.len() {
            let _ = writeln!(lines, "      {}", model.picture(&state));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two threads that add one to a counter by reading and writing it.
    struct Racers {
        promised: bool,
    }

    impl Model for Racers {
        /// The counter, and for each thread what it read and whether it has written.
        type State = (u8, [(Option<u8>, bool); 2]);
        type Action = usize;

        fn initial(&self) -> Self::State {
            (0, [(None, false); 2])
        }

        fn actions(&self, state: &Self::State, found: &mut Vec<usize>) {
            found.extend((0..2).filter(|thread| !state.1[*thread].1));
        }

        fn step(&self, state: &Self::State, thread: usize, tale: &mut Tale) -> Result<Self::State, Broken> {
            let mut after = *state;
            let (read, written) = &mut after.1[thread];
            match read {
                None => *read = Some(after.0),
                Some(read) => (after.0, *written) = (*read + 1, true),
            }
            tale.tell(format_args!("thread {thread}: {}", after.0));
            let lost = after.1.iter().all(|(_, written)| *written) && after.0 != 2;
            if self.promised && lost {
                return Err(Broken { promise: "every addition counts", how: format!("{}", after.0) });
            }
            Ok(after)
        }

        fn picture(&self, state: &Self::State) -> String {
            format!("{state:?}")
        }
    }

    #[test]
    fn the_search_visits_every_state_once() {
        let report = search(&Racers { promised: false }, 100);
        // By hand: (reads, writes) of both, times what the late one read.
        assert_eq!((report.states, report.depth, report.exhausted), (13, 4, true));
        assert!(report.counterexample.is_none());
    }

    #[test]
    fn the_search_finds_a_shortest_way_to_a_lost_addition() {
        let found = search(&Racers { promised: true }, 100).counterexample.expect("a counterexample");
        assert_eq!(found.broken.how, "1");
        assert!(found.trace.contains("   4. ") && !found.trace.contains("   5. "), "{}", found.trace);
    }

    #[test]
    fn a_search_that_was_cut_short_says_so() {
        assert!(!search(&Racers { promised: false }, 3).exhausted);
    }
}
