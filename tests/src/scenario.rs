//! The scenarios and their runner. Each proves one promise on real processes, in a directory of its own.

mod alarms;
mod archive;
mod bad_input;
mod clients;
mod engines;
mod hardship;
mod kill;
mod live;
mod noisy_neighbour;
pub mod security;
mod takeover;

use std::path::PathBuf;
use std::pin::Pin;
use std::time::Instant;

use anyhow::Result;

use crate::lab::{EdgeBuild, Lab, now_ms};
use crate::tools::Tools;

/// What every scenario is given.
pub struct Context {
    pub root: PathBuf,
    pub tools: Tools,
    pub full: bool,
    pub seed: u64,
    pub edge: EdgeBuild,
}

impl Context {
    pub fn lab(&self, name: &str) -> Result<Lab> {
        Lab::new(&self.root, name, &self.edge)
    }
}

type Running<'a> = Pin<Box<dyn Future<Output = Result<String>> + 'a>>;

/// A scenario: what it proves is its name; what it returns is a line of figures.
struct Scenario {
    name: &'static str,
    run: for<'a> fn(&'a Context) -> Running<'a>,
}

macro_rules! scenarios {
    ($($module:ident::$name:ident,)*) => {
        const SCENARIOS: &[Scenario] = &[$(Scenario {
            name: concat!(stringify!($module), "::", stringify!($name)),
            run: |context| Box::pin($module::$name(context)),
        },)*];
    };
}

scenarios! {
    live::message_reaches_a_kafka_client_with_key_headers_and_time,
    live::acknowledgements_leave_in_the_order_of_the_publishes,
    live::retained_message_and_will_reach_a_subscriber,
    live::status_metrics_and_check_say_what_is_so,
    clients::kcat_confluent_and_java_on_one_broker,
    kill::nothing_is_lost_or_doubled_on_kill_9,
    kill::restored_copy_and_clone_of_an_edge_trim_nothing,
    archive::cloud_comes_back_from_the_bucket_alone,
    archive::cloud_comes_back_from_an_s3_bucket,
    engines::each_engine_keeps_what_it_promised_on_kill_9,
    engines::groups_on_several_shards_keep_what_was_committed,
    takeover::paused_owner_of_an_object_shard_is_fenced_and_nothing_is_lost,
    takeover::second_node_on_the_archive_of_a_live_one_is_refused_with_its_name,
    takeover::what_a_deposed_file_node_alone_has_is_sent_and_nothing_is_lost,
    takeover::file_owner_that_was_paused_stops_soon_and_nothing_is_lost,
    takeover::owner_that_cannot_confirm_its_claim_acknowledges_nothing,
    takeover::object_shard_on_s3_needs_no_disk_and_outlives_an_outage,
    security::tls_and_token_let_the_right_edge_in,
    security::wrong_token_wrong_id_and_wrong_certificate_are_refused,
    security::silent_connections_keep_nobody_out,
    security::data_is_for_its_owner_alone,
    security::no_error_shows_a_secret,
    security::admin_port_answers_to_its_own_name_and_token,
    security::ten_thousand_bad_requests_are_a_few_lines,
    security::renewed_certificate_is_used_without_a_restart,
    hardship::clocks_at_1970_and_2099_and_back_stop_nobody,
    hardship::two_edges_with_one_id_take_turns_and_lose_nothing,
    hardship::damaged_database_is_set_aside_and_the_edge_goes_on,
    hardship::salvage_sends_what_a_damaged_database_still_holds,
    hardship::full_edge_holds_acknowledgements_until_there_is_room,
    hardship::full_edge_rejects_where_it_is_told_to,
    hardship::full_edge_drops_the_oldest_and_declares_the_gap,
    hardship::full_disk_at_either_side_loses_nothing,
    hardship::read_only_disk_is_named_and_harms_nothing,
    alarms::each_alert_rule_rings_of_a_real_process,
    noisy_neighbour::one_hostile_client_of_each_kind_stops_nobody,
    bad_input::second_process_on_a_data_directory_is_refused,
    bad_input::unusable_data_directory_is_an_error_that_names_it,
    bad_input::listener_beyond_loopback_is_refused_with_both_fixes,
    bad_input::unknown_and_wrong_keys_are_named,
    bad_input::malformed_bytes_on_every_port_hurt_nobody,
    bad_input::unreachable_bucket_does_not_stop_the_cloud,
}

pub fn list() {
    for scenario in SCENARIOS {
        println!("{}", scenario.name);
    }
}

/// Runs what was asked for, one after the other, and says what passed. True if all did.
pub async fn run(full: bool, seed: Option<u64>, dir: PathBuf, edge: EdgeBuild, names: &[String]) -> Result<bool> {
    let seed = seed.unwrap_or(now_ms() as u64);
    std::fs::create_dir_all(&dir)?;
    let context = Context { root: dir.canonicalize()?, tools: Tools::find()?, full, seed, edge };
    println!("seed {seed}, laboratories in {}", context.root.display());
    let (mut passed, mut failed) = (0, 0);
    for scenario in SCENARIOS {
        if !names.is_empty() && !names.iter().any(|n| scenario.name.contains(n.as_str())) {
            continue;
        }
        let began = Instant::now();
        match (scenario.run)(&context).await {
            Ok(figures) => {
                passed += 1;
                println!(
                    "ok      {} ({:.1} s){}{figures}",
                    scenario.name,
                    began.elapsed().as_secs_f32(),
                    pad(&figures)
                );
            }
            Err(error) => {
                failed += 1;
                println!("FAILED  {} ({:.1} s)\n{error:#}\n", scenario.name, began.elapsed().as_secs_f32());
            }
        }
    }
    println!("scenarios: {passed} passed, {failed} failed");
    Ok(failed == 0 && passed > 0)
}

fn pad(figures: &str) -> &'static str {
    if figures.is_empty() { "" } else { ": " }
}
