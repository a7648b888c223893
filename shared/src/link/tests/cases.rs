//! What the link promises, one case at a time, and many at once.

use super::world::*;
use crate::link::frame::{self, Credit, HelloReply, HelloStreamReply, Limits};
use crate::link::sender::{Report, Sender, SenderSettings, Step};

const ROUGH: Faults = Faults { lose: 8, lose_reply: 8, repeat: 8, full: 5, proxy_bytes_max: usize::MAX };

#[test]
fn every_record_arrives_once_and_in_order_on_a_rough_wire() {
    for seed in 0..40 {
        let mut world = World::new(seed);
        let a = world.add_edge("a", &["s", "t"], 1);
        world.add_edge("b", &["s"], 2);
        world.faults = ROUGH;
        world.writes = true;
        for _ in 0..6 {
            let length = 500 + world.rng.below(3000);
            world.run(length);
            match world.rng.below(3) {
                0 => world.restart(a, world.edges[a].store.clone()),
                1 => world.cloud.sessions.clear(),
                _ => {}
            }
        }
        world.settle();
        world.check();
        assert_eq!(world.reports(|report| matches!(report, Report::SentTwice { .. })), 0, "seed {seed}");
        assert!(world.count(|_| true) > 500);
    }
}

#[test]
fn a_cloud_restored_from_the_bucket_gets_the_rest_again() {
    for seed in 0..40 {
        let mut world = World::new(1000 + seed);
        world.add_edge("a", &["s", "t"], 1);
        (world.faults, world.writes) = (ROUGH, true);
        for _ in 0..5 {
            let length = 500 + world.rng.below(3000);
            world.run(length);
            world.restore_cloud();
        }
        world.settle();
        world.check();
        assert_eq!(world.reports(|report| matches!(report, Report::SentTwice { .. })), 0, "seed {seed}");
    }
}

#[test]
fn an_older_copy_of_the_edges_disk_loses_nothing_new() {
    let mut renewed = 0;
    for seed in 0..40 {
        let mut world = World::new(2000 + seed);
        let a = world.add_edge("a", &["s", "t"], 1);
        (world.faults, world.writes) = (ROUGH, true);
        for _ in 0..3 {
            let length = 500 + world.rng.below(2000);
            world.run(length);
            let image = world.edges[a].store.clone();
            let length = 2000 + world.rng.below(4000);
            world.run(length);
            world.restart(a, image);
        }
        world.settle();
        world.check();
        renewed += world.reports(|report| matches!(report, Report::SentTwice { .. }));
    }
    assert!(renewed > 40);
}

/// An edge on an older copy of its disk has just made a new incarnation durable. Of the 30 records that it holds all are
/// safe, but not deleted.
fn renewed_with_safe_records_held() -> (World, usize) {
    let mut world = World::new(21);
    let a = world.add_edge("a", &["s"], 1);
    let at = |world: &World| world.edges[a].store.0[&stream("s")].clone();
    for _ in 0..10 {
        world.write(a, &stream("s"), 3, 10);
    }
    world.run(2000);
    world.cloud.bucket = world.cloud.durable.clone();
    while at(&world).safe < 30 {
        world.run(100);
    }
    let image = world.edges[a].store.clone();
    world.write(a, &stream("s"), 3, 10);
    world.run(2000);
    world.cloud.bucket = world.cloud.durable.clone();
    let incarnation = at(&world).incarnation;
    world.restart(a, image);
    world.write(a, &stream("s"), 5, 10);
    while at(&world).incarnation == incarnation {
        world.run(1);
    }
    assert_eq!((at(&world).first, at(&world).safe, at(&world).next), (0, 30, 35));
    assert_eq!(world.reports(|report| matches!(report, Report::SentTwice { from: 30, upto: 35, .. })), 1);
    (world, a)
}

#[test]
fn a_kill_before_the_first_confirmation_of_a_new_incarnation_sends_nothing_else_twice() {
    let (mut world, a) = renewed_with_safe_records_held();
    world.restart(a, world.edges[a].store.clone());
    world.settle();
    world.check();
    assert_eq!(world.count(|_| true), 33 + 5);
    assert_eq!(world.reports(|report| matches!(report, Report::CloudLost { .. })), 0);
}

#[test]
fn a_cloud_that_lost_a_new_incarnation_gets_what_that_began_with() {
    let (mut world, a) = renewed_with_safe_records_held();
    // Faster than the bucket: what was confirmed is lost again, and what is in the bucket is not.
    let bucket = world.cloud.bucket.clone();
    while world.edges[a].store.0[&stream("s")].confirmed < 35 {
        world.run(1);
    }
    world.cloud.bucket = bucket;
    world.restore_cloud();
    world.settle();
    world.check();
    assert_eq!(world.count(|_| true), 33 + 5);
    let lost = |report: &Report| matches!(report, Report::CloudLost { position: 0, confirmed: 35, resumed: 30, .. });
    assert_eq!(world.reports(lost), 1);
}

#[test]
fn a_cloned_card_is_told_apart_and_both_arrive() {
    for seed in 0..40 {
        let mut world = World::new(3000 + seed);
        let a = world.add_edge("a", &["s"], 1);
        (world.faults, world.writes) = (ROUGH, true);
        world.run(3000);
        let card = world.edges[a].store.clone();
        world.add_copy("a", card);
        world.run(60_000);
        world.settle();
        world.check();
        assert!(world.reports(|report| matches!(report, Report::SentTwice { .. })) > 0, "seed {seed}");
        assert!(world.cloud.alarms > 0, "two gateways that take turns are noticed");
    }
}

#[test]
fn what_drop_oldest_drops_is_declared() {
    let mut gaps = 0;
    for seed in 0..40 {
        let mut world = World::new(4000 + seed);
        world.add_edge("a", &["s", "t"], 1);
        (world.faults, world.writes, world.drop_oldest) = (ROUGH, true, true);
        world.run(8000);
        world.settle();
        world.check();
        gaps += world.reports(|report| matches!(report, Report::GapDeclared { .. }));
        assert!(world.edges[0].store.0.values().all(|s| s.dropped.is_none() || s.first == s.next));
    }
    assert!(gaps > 40);
}

#[test]
fn a_record_the_cloud_can_never_take_is_set_aside_and_the_rest_goes_on() {
    for seed in 0..20 {
        let mut world = World::new(5000 + seed);
        world.add_edge("a", &["s", "t"], 1);
        (world.faults, world.writes, world.value_bytes) = (ROUGH, true, 900);
        world.limits.batch_bytes_max = 800;
        world.run(6000);
        world.settle();
        world.check();
        assert!(world.count(|record| record.rejected) > 10, "seed {seed}");
        assert!(world.count(|record| !record.rejected) > 10);
    }
}

#[test]
fn a_limit_that_was_lowered_later_is_found_by_halving() {
    // The hello still promises more than the cloud then takes.
    let mut world = World::new(1);
    let a = world.add_edge("a", &["s"], 1);
    world.run(1000);
    world.limits.batch_bytes_max = 700;
    for _ in 0..20 {
        world.write(a, &stream("s"), 7, 10);
    }
    world.write(a, &stream("s"), 1, 0);
    world.edges[a].store.0.get_mut(&stream("s")).unwrap().push(&[{
        let mut value = 99_999u64.to_be_bytes().to_vec();
        let mut noise = Rng::new(5);
        value.extend((0..2000).map(|_| noise.next() as u8));
        value
    }]);
    world.write(a, &stream("s"), 5, 10);
    world.settle();
    world.check();
    assert_eq!(world.count(|record| record.rejected), 1);
    assert_eq!(world.count(|record| !record.rejected), 146);
}

#[test]
fn a_body_that_a_proxy_refuses_is_halved_and_that_is_remembered() {
    let mut world = World::new(7);
    let a = world.add_edge("a", &["s"], 1);
    world.settings.compression = crate::batch::Compression::None;
    world.restart(a, world.edges[a].store.clone());
    for _ in 0..50 {
        world.write(a, &stream("s"), 20, 100);
    }
    world.faults.proxy_bytes_max = 10_000;
    world.run(5000);
    let halved = world.reports(|report| matches!(report, Report::BodyHalved { .. }));
    assert!(halved > 0);
    for _ in 0..50 {
        world.write(a, &stream("s"), 20, 100);
    }
    world.run(5000);
    assert_eq!(world.reports(|report| matches!(report, Report::BodyHalved { .. })), halved);
    assert_eq!(world.count(|_| true), 2000);
    world.check();
}

#[test]
fn a_stream_that_is_not_allowed_waits_and_the_others_go_on() {
    let mut world = World::new(9);
    let a = world.add_edge("a", &["s", "t"], 1);
    let topic = world.edges[a].store.0[&stream("s")].topic.clone();
    world.cloud.forbidden.insert(topic);
    world.write(a, &stream("s"), 3, 10);
    world.write(a, &stream("t"), 3, 10);
    world.run(2000);
    assert_eq!(world.count(|_| true), 3);
    assert_eq!(world.edges[a].store.0[&stream("s")].parked.as_deref(), Some("topic not allowed"));
    world.cloud.forbidden.clear();
    world.run(10_000);
    assert_eq!(world.count(|_| true), 6);
    assert_eq!(world.edges[a].store.0[&stream("s")].parked, None);
}

#[test]
fn a_cloud_that_forgot_everything_gets_all_that_is_held() {
    let mut world = World::new(11);
    let a = world.add_edge("a", &["s"], 1);
    for _ in 0..10 {
        world.write(a, &stream("s"), 3, 10);
    }
    world.run(2000);
    assert_eq!(world.count(|_| true), 30);
    world.cloud = Cloud::default();
    world.run(20_000);
    assert_eq!(world.count(|_| true), 30);
    world.check();
    assert_eq!(world.reports(|report| matches!(report, Report::CloudLost { .. })), 1);
}

#[test]
fn a_cloud_that_never_agrees_does_not_make_incarnations_without_end() {
    let mut world = World::new(17);
    let a = world.add_edge("a", &["s"], 1);
    world.write(a, &stream("s"), 3, 10);
    world.cloud.disagrees = true;
    world.run(60_000);
    let renewed = world.reports(|report| matches!(report, Report::SentTwice { .. }));
    assert!((2..20).contains(&renewed), "{renewed}");
    world.cloud.disagrees = false;
    world.settle();
    world.check();
}

#[test]
fn a_stream_that_dropped_all_it_had_costs_nothing() {
    let mut world = World::new(19);
    let a = world.add_edge("a", &["s"], 1);
    world.run(1000);
    // Dropped while they wait for company.
    world.write(a, &stream("s"), 3, 10);
    let double = world.edges[a].store.0.get_mut(&stream("s")).unwrap();
    double.trim(3);
    assert_eq!((double.first, double.next, double.dropped), (3, 3, Some((0, 3))));
    let sealed = world.seals;
    world.run(60_000);
    assert!(world.seals <= sealed + 1, "{} bodies sealed of nothing", world.seals - sealed);
    world.write(a, &stream("s"), 2, 10);
    world.settle();
    world.check();
    assert_eq!(world.edges[a].store.0[&stream("s")].dropped, None);
}

#[test]
fn a_cloud_without_room_is_waited_for() {
    let mut world = World::new(13);
    let a = world.add_edge("a", &["s"], 1);
    world.faults.full = 100;
    world.write(a, &stream("s"), 3, 10);
    world.run(20_000);
    assert_eq!(world.count(|_| true), 0);
    assert!(world.reports(|report| matches!(report, Report::Held { .. })) < 30, "it waits longer and longer");
    world.settle();
    assert_eq!(world.count(|_| true), 3);
}

#[test]
fn a_stream_that_must_wait_holds_up_no_other() {
    let mut world = World::new(17);
    let a = world.add_edge("a", &["full", "free"], 1);
    world.cloud.full_streams.insert(stream("full"));
    for _ in 0..60 {
        world.write(a, &stream("full"), 1, 10);
        world.write(a, &stream("free"), 1, 10);
        world.run(1_000);
    }
    let records = world.cloud.durable.records.iter();
    let free: usize = records.filter(|(key, _)| key.stream == stream("free")).map(|(_, stored)| stored.len()).sum();
    // What came in the last moments may be under way; what waited with the other stream would be half a minute's.
    assert!(free >= 57 && free == world.count(|_| true), "{free} of 60");
    assert!(world.reports(|report| matches!(report, Report::Held { .. })) < 30, "it waits longer and longer");
    world.cloud.full_streams.clear();
    world.settle();
    world.check();
    assert_eq!(world.count(|_| true), 120);
}

/// A poll lasts up to 25 s. A stream that begins meanwhile must not wait for the next one to learn what is safe.
#[test]
fn a_poll_asks_for_streams_of_which_nothing_is_stored_yet() {
    let mut world = World::new(23);
    let a = world.add_edge("a", &["s"], 1);
    let store = &world.edges[a].store;
    let edge = crate::name::EdgeId::parse("a").unwrap();
    let mut sender = Sender::new(SenderSettings::default(), edge, [1; 16], 7);
    assert!(matches!(sender.step(0, store), Step::Hello(_)));
    let reply = HelloReply {
        version: frame::VERSION_HIGHEST,
        time_ms: 0,
        limits: Limits { batch_bytes_max: 1 << 20, body_bytes_max: 1 << 20, poll_secs_max: 25 },
        credit: Credit { bytes: 1 << 20, wait_ms: 0 },
        streams: vec![HelloStreamReply { name: stream("s"), position: None, safe: None, parked: None }],
    };
    sender.hello_done(0, Ok(reply), store);
    let Step::Poll { body, .. } = sender.step(0, store) else { panic!("a poll begins at once") };
    assert_eq!(frame::decode::<frame::Poll>(&body).unwrap().known, [(stream("s"), 0)]);
}
