//! Runs a fuzz body in an ordinary test: on the seeds that are kept of it, and on seeds with a few bytes changed.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::Once;

use proptest::prelude::*;

thread_local! {
    static PANICS: Cell<usize> = const { Cell::new(0) };
}

/// Runs `body` on every file of `corpus/<target>`, then on changed ones.
pub fn replay(target: &str, body: fn(&[u8])) {
    count_panics();
    let seeds: Vec<(PathBuf, Vec<u8>)> = seeds(target);
    let run = |name: &dyn std::fmt::Display, data: &[u8]| {
        let before = PANICS.get();
        body(data);
        // A server catches panics, so that they end one connection: here each is a finding.
        assert_eq!(PANICS.get(), before, "{target}: a panic was caught on {name}: {data:02x?}");
    };
    for (path, data) in &seeds {
        println!("{}", path.display());
        run(&path.display(), data);
    }
    let changed = (
        any::<prop::sample::Index>(),
        prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        any::<prop::sample::Index>(),
    );
    proptest!(|((seed, changes, cut) in changed)| {
        let mut data = seeds[seed.index(seeds.len())].1.clone();
        for (at, byte) in changes {
            if !data.is_empty() {
                let at = at.index(data.len());
                data[at] = byte;
            }
        }
        data.truncate(data.len() - cut.index(data.len() + 1) / 4);
        run(&"changed bytes", &data);
    });
}

fn seeds(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let mut above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(|dir| dir.join("tests/fuzz/corpus"));
    let corpus = above.find(|dir| dir.is_dir()).expect("tests/fuzz/corpus above this crate").join(target);
    let entries = std::fs::read_dir(&corpus).unwrap_or_else(|error| panic!("{}: {error}", corpus.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("a directory entry").path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} has no seeds", corpus.display());
    paths.into_iter().map(|path| (path.clone(), std::fs::read(path).expect("a seed"))).collect()
}

fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.set(PANICS.get() + 1);
            before(info);
        }));
    });
}
