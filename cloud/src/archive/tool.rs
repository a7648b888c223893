//! `tributary-cloud archive`: looks into an archive, checks it and copies it, without a node.
//!
//! Everything here reads: no claim, no probe, nothing is written to the archive that is looked at. `restore` writes to
//! another place. The manifest is read as a node reads it, but what does not hold is collected as a finding instead of
//! ending the command, so that `verify` lists all that is wrong.

mod cat;
mod chain;
mod ls;
mod object;
mod progress;
mod restore;
#[cfg(test)]
mod tests;
mod verify;
mod view;

use std::io::{self, Write};

use clap::{Args, Subcommand};
use daemon::settings::SettingsArgs;

use super::{Store, StoreError};
use crate::config::CloudConfig;
use progress::Progress;

/// Everything was as it should be.
const CLEAN: i32 = 0;
/// Something is wrong with the archive.
const FINDINGS: i32 = 1;
/// The command could not do its work.
const FAILED: i32 = 2;

/// What `tributary-cloud archive` can do.
#[derive(Debug, Subcommand)]
pub enum ArchiveCommand {
    /// Lists topics, partitions and shards of an archive.
    Ls {
        /// Which archive.
        #[command(flatten)]
        from: ArchiveArgs,
        /// Lists the keys of all objects, and which of them no manifest names.
        #[arg(long)]
        objects: bool,
        /// Prints JSON.
        #[arg(long)]
        json: bool,
    },
    /// Checks every checksum, every offset and every chain of an archive. Exit code: 0 clean, 1 findings, 2 could not be
    /// checked.
    Verify {
        /// Which archive.
        #[command(flatten)]
        from: ArchiveArgs,
        /// Prints each finding as a line of JSON.
        #[arg(long)]
        json: bool,
    },
    /// Prints records of a topic, those that are only in the shipped log included.
    Cat {
        /// The topic: its name, or its id in hexadecimal digits.
        topic: String,
        /// Which archive.
        #[command(flatten)]
        from: ArchiveArgs,
        /// One partition; all of them, one after the other, without.
        #[arg(long, value_name = "N")]
        partition: Option<u32>,
        /// The first offset.
        #[arg(long = "from", value_name = "OFFSET")]
        first: Option<i64>,
        /// The offset to stop before.
        #[arg(long, value_name = "OFFSET")]
        to: Option<i64>,
        /// How records are printed.
        #[arg(long, value_enum, default_value = "json")]
        format: cat::Format,
    },
    /// Copies an archive to another place, checking each object on the way. A node with an empty data directory that is
    /// started on the copy goes on from it. Begun again after a cut, it goes on where it was.
    Restore {
        /// Which archive.
        #[command(flatten)]
        from: ArchiveArgs,
        /// Where to: file:///PATH or s3://BUCKET/PREFIX, empty or of the same system.
        #[arg(long, value_name = "URL")]
        to: String,
    },
}

/// Which archive.
#[derive(Debug, Args)]
pub struct ArchiveArgs {
    /// file:///PATH or s3://BUCKET/PREFIX; without it, what the settings say.
    #[arg(long)]
    url: Option<String>,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// Why a command could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The settings do not say where.
    #[error("{0}")]
    Settings(String),
    /// Nothing there.
    #[error("{0} holds no archive: there is no shards/*/manifest object below it. Is the prefix right?")]
    Nothing(String),
    /// It was published to, again and again.
    #[error("{0} changes faster than it can be read: stop the node that writes there, or try again")]
    Restless(String),
    /// It does not hold.
    #[error("the archive does not hold:\n{0}")]
    Damaged(String),
    /// No such topic.
    #[error("there is no topic {topic:?} in the archive; there are: {known}")]
    Topic {
        /// What was asked for.
        topic: String,
        /// What there is.
        known: String,
    },
    /// The target is someone else's.
    #[error("{target} belongs to system {there}, not to {ours}: choose an empty place")]
    Foreign {
        /// The target.
        target: String,
        /// Whose it is.
        there: String,
        /// Whose archive is being copied.
        ours: String,
    },
    /// The target is at work.
    #[error(
        "{0} is there already with other content: a node works on that place, or another state was copied to it. Choose an empty one"
    )]
    InUse(String),
    /// Standard output is gone or failed.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

/// Something that is wrong in an archive.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// The object.
    pub key: String,
    /// The byte in it, where one can be named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub position: Option<u64>,
    /// What is wrong.
    pub what: String,
    /// The object is not there: not wrong if a newer root no longer names it.
    #[serde(skip)]
    missing: bool,
}

impl Finding {
    fn new(key: impl ToString, what: impl ToString) -> Self {
        Self { key: key.to_string(), position: None, what: what.to_string(), missing: false }
    }

    fn at(key: impl ToString, position: u64, what: impl ToString) -> Self {
        Self { position: Some(position), ..Self::new(key, what) }
    }

    fn missing(key: impl ToString) -> Self {
        Self { missing: true, ..Self::new(key, "it is named and not there") }
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.position {
            Some(position) => write!(f, "{} at byte {position}: {}", self.key, self.what),
            None => write!(f, "{}: {}", self.key, self.what),
        }
    }
}

impl ArchiveCommand {
    /// The settings that may say where the archive is.
    pub fn settings(&self) -> &SettingsArgs {
        &self.from().settings
    }

    fn from(&self) -> &ArchiveArgs {
        match self {
            Self::Ls { from, .. } | Self::Verify { from, .. } | Self::Cat { from, .. } | Self::Restore { from, .. } => {
                from
            }
        }
    }
}

/// Runs a command on the terminal; returns the exit code. `environment` are the `AWS_*` variables, as main read them.
pub async fn run(command: &ArchiveCommand, config: &CloudConfig, environment: Vec<(String, String)>) -> i32 {
    let options = config.archive.store_options(environment);
    let progress = Progress::visible();
    let mut out = io::BufWriter::new(io::stdout().lock());
    let done = execute(command, config, &options, &progress, &mut out).await;
    let done = done.and_then(|code| out.flush().map(|()| code).map_err(ToolError::from));
    match done {
        Ok(code) => code,
        // Whoever read us has seen enough.
        Err(ToolError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            // Nothing more goes out, and dropping the buffer must not try.
            std::mem::forget(out);
            CLEAN
        }
        Err(error) => {
            eprintln!("error: {error}");
            FAILED
        }
    }
}

async fn execute(
    command: &ArchiveCommand,
    config: &CloudConfig,
    options: &[(String, String)],
    progress: &Progress,
    out: &mut dyn Write,
) -> Result<i32, ToolError> {
    let url = source_url(command.from(), config)?;
    let store = Store::open_existing(&url, options, config.archive.requests())?;
    match command {
        ArchiveCommand::Ls { objects, json, .. } => ls::run(&store, *objects, *json, out).await,
        ArchiveCommand::Verify { json, .. } => verify::run(&store, *json, progress, out).await,
        ArchiveCommand::Cat { topic, partition, first, to, format, .. } => {
            let wanted =
                cat::Wanted { topic, partition: *partition, from: first.unwrap_or(0), to: *to, format: *format };
            cat::run(&store, &wanted, out).await
        }
        ArchiveCommand::Restore { to, .. } => {
            let target = Store::open(to, options, config.archive.requests())?;
            restore::run(&store, &target, progress, out).await
        }
    }
}

/// Where the archive is. With archiving switched off, segments lie in the data directory, in the same form.
fn source_url(args: &ArchiveArgs, config: &CloudConfig) -> Result<String, ToolError> {
    if let Some(url) = &args.url {
        return Ok(url.clone());
    }
    if let Some(url) = config.archive_url().map_err(ToolError::Settings)? {
        return Ok(url);
    }
    let segments = std::path::absolute(config.data_dir.join("segments"))?;
    Ok(format!("file://{}", segments.display()))
}

/// Bytes for people.
fn bytes_text(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}
