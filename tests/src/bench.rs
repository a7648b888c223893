//! Benchmarks against peers: alternating runs in one session, medians, ratios. A peer is always the real program.

pub mod cloud;
pub mod edge;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Measured values by row, then by peer, one per round.
#[derive(Default)]
pub struct Table {
    rows: Vec<String>,
    peers: Vec<String>,
    values: BTreeMap<(String, String), Vec<f64>>,
}

impl Table {
    pub fn add(&mut self, row: &str, peer: &str, value: f64) {
        for (list, name) in [(&mut self.rows, row), (&mut self.peers, peer)] {
            if !list.iter().any(|n| n == name) {
                list.push(name.to_owned());
            }
        }
        self.values.entry((row.to_owned(), peer.to_owned())).or_default().push(value);
        println!("  {peer}: {row}: {}", short(value));
    }

    /// Markdown: medians with the least and greatest value, and the ratio of the first peer to each other.
    pub fn print(&self) {
        let Some((ours, others)) = self.peers.split_first() else { return };
        let heads = others.iter().map(|o| format!(" {o} | {ours} : {o} |")).collect::<String>();
        println!("\n| work | {ours} |{heads}\n|---|---|{}", "---|---|".repeat(others.len()));
        for row in &self.rows {
            let mut line = format!("| {row} | {} |", self.cell(row, ours));
            for other in others {
                let ratio = match (self.median(row, ours), self.median(row, other)) {
                    (Some(a), Some(b)) if b > 0.0 => format!("{:.2}", a / b),
                    _ => "-".into(),
                };
                line += &format!(" {} | {ratio} |", self.cell(row, other));
            }
            println!("{line}");
        }
    }

    /// Markdown: how the first of two builds compares with the second, round by round. Above 1 the first is better,
    /// whichever way the row counts.
    pub fn print_pairs(&self, ours: &str, before: &str) {
        println!("\n| work | {ours} | {before} | ratio, better above 1 | |\n|---|---|---|---|---|");
        for row in &self.rows {
            let values = |peer: &str| self.values.get(&(row.to_owned(), peer.to_owned()));
            let (Some(new), Some(old)) = (values(ours), values(before)) else { continue };
            let better = |(new, old): (&f64, &f64)| if is_cost(row) { old / new } else { new / old };
            let mut ratios: Vec<f64> = new.iter().zip(old).map(better).filter(|ratio| ratio.is_finite()).collect();
            ratios.sort_by(f64::total_cmp);
            let (Some(least), Some(greatest)) = (ratios.first(), ratios.last()) else { continue };
            let median = ratios.get(ratios.len() / 2).copied().unwrap_or(f64::NAN);
            let verdict = if *greatest < WORSE_BELOW { "worse" } else { "" };
            let (ours, before) = (self.cell(row, ours), self.cell(row, before));
            println!("| {row} | {ours} | {before} | {median:.2} ({least:.2}-{greatest:.2}) | {verdict} |");
        }
    }

    fn cell(&self, row: &str, peer: &str) -> String {
        let Some(values) = self.values.get(&(row.to_owned(), peer.to_owned())) else { return "-".into() };
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let greatest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        match self.median(row, peer) {
            Some(median) if values.len() > 1 => format!("{} ({}-{})", short(median), short(least), short(greatest)),
            Some(median) => short(median),
            None => "-".into(),
        }
    }

    fn median(&self, row: &str, peer: &str) -> Option<f64> {
        let mut values = self.values.get(&(row.to_owned(), peer.to_owned()))?.clone();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    }
}

/// A row whose ratios all lie below this became slower by more than a run's noise.
const WORSE_BELOW: f64 = 0.97;

/// Whether less is better in a row: times, bytes and processor time.
fn is_cost(row: &str) -> bool {
    [", us", ", ms", ", s", "MiB resident", "CPU", "bytes written"].iter().any(|unit| row.contains(unit))
}

/// The name of the older build in tables.
pub const BEFORE: &str = "before";

/// A program of an older build, if there is a directory of one.
pub fn older(directory: Option<&Path>, program: &str) -> Result<Option<PathBuf>> {
    let Some(directory) = directory else { return Ok(None) };
    let path = directory.join(program);
    if !path.is_file() {
        bail!("{} is missing: --before wants a directory with a release build of the older version", path.display());
    }
    Ok(Some(path.canonicalize()?))
}

fn short(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{:.2} M", v / 1e6),
        v if v >= 1e4 => format!("{:.0} k", v / 1e3),
        v if v >= 100.0 => format!("{v:.0}"),
        v => format!("{v:.2}"),
    }
}

/// Resident memory in MiB.
pub fn resident_mib(pid: u32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find(|l| l.starts_with("VmRSS:")).context("VmRSS")?;
    let kib: f64 = line.split_whitespace().nth(1).context("VmRSS")?.parse()?;
    Ok(kib / 1024.0)
}

/// Processor seconds used so far, user and system.
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after = text.rsplit_once(')').context("stat")?.1;
    let ticks: Vec<f64> = after.split_whitespace().skip(11).take(2).filter_map(|t| t.parse().ok()).collect();
    let [user, system] = ticks[..] else { bail!("/proc/{pid}/stat is odd") };
    Ok((user + system) / 100.0)
}

/// Builds both brokers in the profile of this program: a benchmark of a debug build says nothing.
pub fn build_release() -> Result<()> {
    if cfg!(debug_assertions) {
        bail!("benchmarks want a release build: cargo run --release --bin system-tests -- ...");
    }
    if let Some(cargo) = std::env::var_os("CARGO") {
        let status = Command::new(cargo).args(["build", "--release", "--quiet", "--workspace", "--bins"]).status()?;
        if !status.success() {
            bail!("the brokers do not build");
        }
    }
    Ok(())
}
