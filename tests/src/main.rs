//! `system-tests`: starts, cuts and kills real brokers and judges what is left; also the demo and the load generator.

mod admin;
mod attempts;
mod bench;
mod demo;
mod device;
#[cfg(test)]
mod docs;
mod judge;
mod kafka;
mod lab;
mod load;
mod message;
mod packet;
mod process;
mod producer;
mod proxy;
mod scenario;
mod tools;
mod wire;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// System tests, demo and benchmarks of Tributary.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Run scenarios against the built brokers (all of the tier, or those named).
    Run {
        /// The full tier: the numbers of docs/verification.md.
        #[arg(long)]
        full: bool,
        /// Seed of everything random; printed by every run.
        #[arg(long)]
        seed: Option<u64>,
        /// Where laboratories are put; those of failed scenarios stay.
        #[arg(long, default_value = "target/system-tests")]
        dir: PathBuf,
        /// Another build of the edge, for example for another processor.
        #[arg(long)]
        edge_program: Option<PathBuf>,
        /// What starts it: an emulator and its options, separated by spaces.
        #[arg(long, default_value = "")]
        edge_wrapper: String,
        /// Names, or parts of names, of scenarios.
        names: Vec<String>,
    },
    /// List the scenarios.
    List,
    /// A cloud node, an edge and simulated devices on embedded defaults, with live offsets, until Ctrl-C.
    Demo(demo::Options),
    /// Load on any MQTT broker.
    Load(load::Load),
    /// The edge against mosquitto and, if given, a bare forwarder: docs/benchmarks.md.
    BenchEdge(bench::edge::Options),
    /// The cloud against Apache Kafka, and the link: docs/benchmarks.md.
    BenchCloud(bench::cloud::Options),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let done = match arguments.command {
        Action::Run { full, seed, dir, edge_program, edge_wrapper, names } => {
            let edge = lab::EdgeBuild { program: edge_program, wrapper: edge_wrapper };
            runtime.block_on(scenario::run(full, seed, dir, edge, &names))
        }
        Action::List => {
            scenario::list();
            Ok(true)
        }
        Action::Load(load) => load::run(&load).map(|()| true),
        Action::BenchEdge(options) => runtime.block_on(bench::edge::run(options)).map(|()| true),
        Action::BenchCloud(options) => runtime.block_on(bench::cloud::run(options)).map(|()| true),
        Action::Demo(options) => runtime.block_on(demo::run(options)).map(|()| true),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
