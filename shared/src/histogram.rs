//! Counts per upper bound, as Prometheus draws them.

use serde::Serialize;

/// How values were spread.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Histogram {
    /// Upper bounds, ascending; one more bucket takes the rest.
    pub bounds: Vec<f64>,
    /// Values per bucket, not cumulative; one more than `bounds`.
    pub counts: Vec<u64>,
    /// Sum of all values.
    pub sum: f64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new(&Self::COMMIT_SECONDS)
    }
}

impl Histogram {
    /// Bounds for how long a commit to a disk takes, in seconds.
    pub const COMMIT_SECONDS: [f64; 11] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5];

    /// Nothing yet.
    pub fn new(bounds: &[f64]) -> Self {
        Self { bounds: bounds.to_vec(), counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    /// Counts one value.
    pub fn add(&mut self, value: f64) {
        let bucket = self.bounds.iter().position(|bound| value <= *bound).unwrap_or(self.bounds.len());
        if let Some(count) = self.counts.get_mut(bucket) {
            *count += 1;
        }
        self.sum += value;
    }

    /// How many values there were.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}
