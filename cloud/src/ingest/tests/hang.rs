//! A shard whose store does not answer, and all that goes on beside it. The clock is virtual: nothing here really waits.

use super::*;
use crate::shards::Shards;
use crate::shards::gated::quick_and_slow;
use crate::state::read_state;
use crate::wal::gated::GatedWal;

/// A node with the catalogue in shard 0, and topics whose names begin with `slow` in shard 1.
struct Node {
    ingest: Arc<Ingest>,
    shards: Arc<Shards>,
    slow: GatedWal,
}

impl Node {
    fn new(settings: IngestSettings) -> Self {
        let (shards, topics, slow) = quick_and_slow();
        let topics = Arc::new(Catalogue::new(shards.clone(), topics));
        let ingest = Ingest::new(settings, shards.clone(), shards.clone(), topics, shards.clone(), || 7);
        Self { ingest, shards, slow }
    }

    async fn hello(&self, hello: Hello) -> HelloReply {
        self.ingest.hello(&Grants::default().caller(None).unwrap(), hello).await.unwrap()
    }

    async fn append(&self, entries: Vec<(AppendEntry, Bytes)>, session: Session) -> AppendReply {
        let (entries, bodies) = entries.into_iter().unzip();
        let append = Append { edge: edge("gw"), session, entries };
        let room = self.ingest.budget.clone().acquire_many_owned(1).await.unwrap();
        self.ingest.append(&Grants::default().caller(None).unwrap(), append, bodies, room).await.unwrap()
    }

    fn records(&self, topic: &str) -> Offset {
        let name = TopicName::parse(topic).unwrap();
        let topic = read_state(&*self.shards, |state| state.topic_named(&name).cloned()).unwrap();
        let at = |index| self.shards.bounds(Partition { topic: topic.id, index }).unwrap().high_watermark;
        (0..topic.partitions).map(at).sum()
    }
}

fn outcomes(reply: &AppendReply) -> Vec<(&str, &Outcome)> {
    reply.streams.iter().map(|stream| (stream.name.as_str(), &stream.outcome)).collect()
}

#[tokio::test(start_paused = true)]
async fn a_hung_shard_keeps_neither_the_memory_of_bodies_nor_other_streams() {
    let node = Node::new(IngestSettings::default());
    node.hello(hello(session(1, 1), &["quick", "slow"])).await;
    let free = node.ingest.budget.available_permits();
    node.append(vec![entry("slow", None, 0, 2)], session(1, 1)).await;
    node.slow.hang();
    let both = vec![entry("slow", Some(2), 2, 4), entry("quick", None, 0, 3)];
    let mut answer = std::pin::pin!(node.append(both, session(1, 1)));
    while node.records("quick-topic") < 3 {
        assert!(futures_util::poll!(&mut answer).is_pending());
        tokio::task::yield_now().await;
    }
    assert_eq!(node.ingest.budget.available_permits(), free, "the shards have the batches");
    let reply = answer.await;
    let [("quick", Outcome::Stored), ("slow", Outcome::Later { reason })] = &outcomes(&reply)[..] else {
        panic!("{reply:?}")
    };
    assert!(reason.contains("20s") && reason.contains("may still be stored"), "{reason}");
    assert_eq!(reply.streams[1].position, Some(at(2)), "what is durable");

    // What comes of the stream meanwhile is not sent to the shard again, and holds up nobody.
    let begun = tokio::time::Instant::now();
    let both = vec![entry("slow", Some(2), 2, 4), entry("quick", Some(3), 3, 5)];
    let reply = node.append(both, session(1, 1)).await;
    assert_eq!(begun.elapsed(), Duration::ZERO);
    assert!(
        matches!(outcomes(&reply)[..], [("quick", Outcome::Stored), ("slow", Outcome::Parked { .. })]),
        "{reply:?}"
    );
    let reply = node.hello(hello(session(1, 2), &["quick", "slow"])).await;
    assert_eq!(reply.streams.iter().map(|stream| stream.parked.is_some()).collect::<Vec<_>>(), [false, true]);

    node.slow.release();
    while node.records("slow-topic") < 4 {
        tokio::task::yield_now().await;
    }
    let reply = node.hello(hello(session(1, 3), &["quick", "slow"])).await;
    assert_eq!((&reply.streams[1].parked, reply.streams[1].position), (&None, Some(at(4))));
    let reply = node.append(vec![entry("slow", Some(2), 2, 4)], session(1, 3)).await;
    assert_eq!(outcomes(&reply), [("slow", &Outcome::Have)]);
    let reply = node.append(vec![entry("slow", Some(4), 4, 5)], session(1, 3)).await;
    assert_eq!(outcomes(&reply), [("slow", &Outcome::Stored)]);
    assert_eq!((node.records("quick-topic"), node.records("slow-topic"), node.ingest.status().records), (5, 5, 10));
}

/// The shard that the stream's next batch goes to cannot know of the one that is on its way in another.
#[tokio::test(start_paused = true)]
async fn a_late_batch_is_not_stored_again_in_another_shard() {
    let node = Node::new(IngestSettings::default());
    node.hello(hello(session(1, 1), &["slow"])).await;
    node.slow.hang();
    let reply = node.append(vec![entry("slow", None, 0, 2), entry("slow", Some(2), 2, 3)], session(1, 1)).await;
    assert!(matches!(outcomes(&reply)[..], [("slow", Outcome::Later { .. })]), "{reply:?}");
    let mut elsewhere = hello(session(1, 2), &["slow"]);
    elsewhere.streams[0].topic = TopicName::parse("quick-topic").unwrap();
    assert!(node.hello(elsewhere.clone()).await.streams[0].parked.is_some());
    let reply = node.append(vec![entry("slow", None, 0, 2)], session(1, 2)).await;
    assert!(matches!(outcomes(&reply)[..], [("slow", Outcome::Parked { .. })]), "{reply:?}");
    node.slow.release();
    while node.records("slow-topic") < 2 {
        tokio::task::yield_now().await;
    }
    elsewhere.session.hello = 3;
    assert_eq!(node.hello(elsewhere).await.streams[0].position, Some(at(2)));
    let reply = node.append(vec![entry("slow", None, 0, 2)], session(1, 3)).await;
    assert_eq!(outcomes(&reply), [("slow", &Outcome::Have)]);
    assert_eq!((node.records("slow-topic"), node.records("quick-topic")), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn a_request_does_not_wait_for_its_turn_for_ever() {
    let node = Node::new(IngestSettings::default());
    node.hello(hello(session(1, 1), &["slow"])).await;
    let lane = node.ingest.lane(&edge("gw")).unwrap();
    let turn = lane.turn.lock().await;
    let free = node.ingest.budget.available_permits();
    let room = node.ingest.budget.clone().acquire_many_owned(5).await.unwrap();
    let append = Append { edge: edge("gw"), session: session(1, 1), entries: Vec::new() };
    let caller = Grants::default();
    let refused = node.ingest.append(&caller.caller(None).unwrap(), append, Vec::new(), room).await;
    assert!(matches!(refused, Err(IngestError::Unavailable(_))), "{refused:?}");
    assert_eq!(node.ingest.budget.available_permits(), free);
    drop(turn);
}

/// Each record that is set aside leads to another shard and back. The edge hears of it once.
#[tokio::test(start_paused = true)]
async fn records_set_aside_in_another_shard_do_not_cost_an_answer_each() {
    let node = Node::new(IngestSettings::default());
    node.hello(hello(session(1, 1), &["quick"])).await;
    let batches = (0..9).map(|at| {
        let (mut entry, bytes) = entry("quick", Some(at).filter(|at| *at > 0), at, at + 1);
        entry.rejected = at % 3 != 0;
        (entry, bytes)
    });
    let reply = node.append(batches.collect(), session(1, 1)).await;
    assert_eq!((outcomes(&reply), reply.streams[0].position), (vec![("quick", &Outcome::Stored)], Some(at(9))));
    assert_eq!((node.records("quick-topic"), node.records("quick-topic.rejected")), (3, 6));
    assert_eq!(node.ingest.status().rejected, 6);
}

#[tokio::test(start_paused = true)]
async fn a_stream_whose_topic_cannot_be_made_yet_is_parked_and_the_others_are_not() {
    let node = Node::new(IngestSettings::default());
    node.slow.hang();
    let reply = node.hello(hello(session(1, 1), &["quick", "slow"])).await;
    assert_eq!(reply.streams[0].parked, None);
    assert!(reply.streams[1].parked.as_ref().unwrap().contains("does not answer"), "{reply:?}");
    let mut other = hello(session(1, 1), &["quick"]);
    other.edge = edge("gw-2");
    let begun = tokio::time::Instant::now();
    assert_eq!(node.hello(other).await.streams[0].parked, None);
    assert_eq!(begun.elapsed(), Duration::ZERO, "another edge does not wait");
    node.slow.release();
    let reply = node.hello(hello(session(1, 2), &["quick", "slow"])).await;
    assert_eq!(reply.streams[1].parked, None);
}

#[test]
fn a_small_batch_does_not_keep_its_body() {
    let body = Bytes::from(vec![7; 1000]);
    let batches = unshared(vec![body.slice(..900), body.slice(900..950), body.slice(950..)]);
    assert_eq!(batches.iter().map(Bytes::len).collect::<Vec<_>>(), [900, 50, 50]);
    let within = |batch: &Bytes| body.as_ptr_range().contains(&batch.as_ptr());
    assert_eq!(batches.iter().map(within).collect::<Vec<_>>(), [true, false, false]);
}

/// A line that is on its way is enough: an hour of trying again would leave hundreds.
#[tokio::test(start_paused = true)]
async fn a_gap_whose_list_hangs_parks_its_stream_and_is_listed_no_more_than_again() {
    let node = Node::new(IngestSettings::default());
    node.hello(hello(session(1, 1), &["quick"])).await;
    let gap = |after: Offset, first: Offset| {
        let (mut entry, bytes) = entry("quick", Some(after), first, first + 1);
        entry.gap = Some((after, first));
        (entry, bytes)
    };
    let reply = node.append(vec![entry("quick", None, 0, 2), gap(2, 4)], session(1, 1)).await;
    assert_eq!((outcomes(&reply), node.records(GAPS_TOPIC)), (vec![("quick", &Outcome::Stored)], 1));
    node.slow.hang();
    let reply = node.append(vec![gap(5, 9)], session(1, 1)).await;
    assert!(matches!(outcomes(&reply)[..], [("quick", Outcome::Later { .. })]), "{reply:?}");
    for _ in 0..10 {
        let begun = tokio::time::Instant::now();
        let reply = node.append(vec![gap(5, 9)], session(1, 1)).await;
        assert!(matches!(outcomes(&reply)[..], [("quick", Outcome::Parked { .. })]), "{reply:?}");
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }
    node.slow.release();
    while node.records(GAPS_TOPIC) < 2 {
        tokio::task::yield_now().await;
    }
    let reply = node.append(vec![gap(5, 9)], session(1, 1)).await;
    assert_eq!((outcomes(&reply), node.records(GAPS_TOPIC)), (vec![("quick", &Outcome::Stored)], 3));
    assert_eq!((node.records("quick-topic"), node.ingest.status().records), (4, 4));
}
