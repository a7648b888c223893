//! What requests that change several things at a time have in common: each is right or wrong by itself.

use std::collections::HashSet;
use std::hash::Hash;

use kafka_wire::ErrorCode;

/// Why one of them was refused: code and words.
pub type Refused = (ErrorCode, String);

/// Names that come more than once in a request. Nobody can tell which of them is meant, so each is refused.
pub struct Repeated<T>(HashSet<T>);

impl<T: Eq + Hash + Clone> Repeated<T> {
    /// Those among `names`.
    pub fn among(names: impl Iterator<Item = T>) -> Self {
        let mut seen = HashSet::new();
        Self(names.filter(|name| !seen.insert(name.clone())).collect())
    }

    /// Refuses `name`, which people know as `what`, if it is one.
    pub fn check(&self, name: &T, what: &str) -> Result<(), Refused> {
        match self.0.contains(name) {
            true => Err((ErrorCode::INVALID_REQUEST, format!("{what} is named more than once in the request"))),
            false => Ok(()),
        }
    }
}

/// Code and words of an answer.
pub fn outcome(done: Result<(), Refused>) -> (ErrorCode, Option<String>) {
    match done {
        Ok(()) => (ErrorCode::NONE, None),
        Err((code, text)) => (code, Some(text)),
    }
}
