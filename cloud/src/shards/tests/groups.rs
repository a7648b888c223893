//! What groups commit is in the shard of their slot, through restarts, deletions, lost catalogues and hung shards.

use std::time::Duration;

use tokio::time::Instant;

use super::*;
use crate::archive::{Archive, ArchiveSettings};
use crate::groups::{GroupError, GroupSettings, Groups, OffsetCommit};
use crate::shard::LocalWal;
use crate::state::{CommittedOffset, GroupChange, SlotChange, TopicChange, coordinator_log};

/// A group whose slot comes to this shard when slots are spread over so many, the first being 0.
fn group_in(shard: u32, shards: u32) -> String {
    let slot = |group: &String| u32::from(CoordinatorSlot::of(group).number());
    (0..).map(|n| format!("group-{n}")).find(|group| slot(group) % shards == shard).unwrap()
}

fn committed(group: &str, partition: Partition, offset: Offset) -> Change {
    let committed = CommittedOffset { offset, leader_epoch: -1, metadata: String::new(), commit_ms: 1 };
    GroupChange::OffsetCommitted { group: group.to_owned(), partition, committed }.into()
}

impl Shards {
    fn commit_offset(&self, group: &str, partition: Partition, offset: Offset) {
        block_on(coordinator_log(self, group).commit(vec![committed(group, partition, offset)])).unwrap();
    }

    fn committed(&self, group: &str, partition: Partition) -> Option<Offset> {
        read_state(coordinator_log(self, group), |state| state.committed(group, partition).map(|c| c.offset))
    }

    /// How many offsets a shard holds.
    fn stored(&self, number: u32) -> usize {
        read_state(&**self.member(number), |state| state.groups().map(|(_, group)| group.offsets.len()).sum())
    }
}

#[test]
fn groups_lie_in_the_shards_of_their_slots_and_outlive_a_restart() {
    let disks = Disks::new();
    let shards = disks.start();
    shards.place(1, 2, &[1]);
    let groups = [0, 1, 2].map(|shard| group_in(shard, 3));
    for (group, offset) in groups.iter().zip(5..) {
        shards.commit_offset(group, at(1, 0), offset);
    }
    let check = |shards: &Shards| {
        for (number, group) in groups.iter().enumerate() {
            assert_eq!(shards.committed(group, at(1, 0)), Some(5 + number as Offset));
            assert_eq!(shards.stored(number as u32), 1, "its own and no other");
        }
        assert_eq!(shards.stored(3), 0, "none in memory");
    };
    check(&shards);
    shards.close();
    check(&disks.start());
}

/// A system as an older build left it: all groups are in shard 0, and nothing says where slots are.
#[test]
fn groups_of_an_older_build_are_found_where_they_are() {
    let disks = Disks::new();
    let old = disks.open(0);
    let group = group_in(1, 3);
    let changes = vec![Change::created(topic(1, 1)), committed(&group, at(1, 0), 7)];
    block_on(old.shard.commit(changes)).unwrap();
    old.shard.close();
    for _ in 0..2 {
        let shards = disks.start();
        assert_eq!((shards.committed(&group, at(1, 0)), shards.stored(0)), (Some(7), 1));
        let slot_of = |group: &str| read_state(&shards, |state| state.slot_shard(CoordinatorSlot::of(group)));
        assert_eq!(slot_of(&group), 0, "a slot that holds something stays");
        assert_eq!(slot_of(&group_in(2, 3)), 2, "and one that holds nothing is spread");
        shards.close();
    }
}

#[test]
fn a_restored_catalogue_finds_the_groups_of_other_shards() {
    let disks = Disks::new();
    let shards = disks.start();
    // What two shards of three held when there were two, so that spreading anew would miss it.
    let group = (0..).map(|n| format!("g-{n}")).find(|group| CoordinatorSlot::of(group).number() == 3).unwrap();
    block_on(
        shards.catalogue().commit(vec![SlotChange::Placed { slot: CoordinatorSlot::of(&group), shard: 1 }.into()]),
    )
    .unwrap();
    shards.place(1, 1, &[1]);
    shards.commit_offset(&group, at(1, 0), 9);
    assert_eq!(shards.stored(1), 1);
    shards.close();
    let mut lost = disks.clone();
    lost.0.insert(0, MemoryWal::new(WAL_BYTES));
    assert_eq!(lost.start().committed(&group, at(1, 0)), Some(9));
}

#[test]
fn a_deleted_topic_takes_its_offsets_along_in_every_shard() {
    let disks = Disks::new();
    let shards = disks.start();
    let groups = [0, 1, 2].map(|shard| group_in(shard, 3));
    shards.place(1, 1, &[1]);
    shards.place(2, 1, &[2]);
    for group in &groups {
        shards.commit_offset(group, at(1, 0), 1);
        shards.commit_offset(group, at(2, 0), 2);
    }
    block_on(shards.commit(vec![Change::Topics(TopicChange::Deleted { id: at(1, 0).topic })])).unwrap();
    for number in 0..3 {
        // Nobody waits for what is told to the slots' shards; what comes after it does.
        block_on(shards.member(number).commit(vec![GroupChange::Deleted { group: "none".into() }.into()])).unwrap();
        assert_eq!(shards.stored(number), 1, "only that of the other topic, in shard {number}");
    }
    // Deleted in the catalogue, and the stop comes before any other shard is told.
    block_on(shards.catalogue().commit(vec![Change::Topics(TopicChange::Deleted { id: at(2, 0).topic })])).unwrap();
    assert_eq!([1, 2].map(|number| shards.stored(number)), [1, 1]);
    shards.close();
    let shards = disks.start();
    assert_eq!([0, 1, 2, 3].map(|number| shards.stored(number)), [0; 4]);
}

/// The disk is lost; what was shipped comes back, each shard's groups with it.
#[tokio::test]
async fn a_restore_from_the_archive_brings_the_groups_of_every_shard() {
    let bucket = tempfile::tempdir().unwrap();
    let groups = [group_in(0, 2), group_in(1, 2)];
    for life in 0..2 {
        let home = tempfile::tempdir().unwrap();
        let (mut members, mut shipping) = (Vec::new(), Vec::new());
        for number in 0..2 {
            let settings = ArchiveSettings {
                url: Some(format!("file://{}", bucket.path().display())),
                data_dir: home.path().to_owned(),
                shard: number,
                max_lag: Duration::from_millis(1),
                ..ArchiveSettings::default()
            };
            let archive = Archive::open(settings).await.unwrap();
            let wal = MemoryWal::new(WAL_BYTES);
            let recovered = archive.recover(&LocalWal(&wal)).await.unwrap();
            let settings = ShardSettings { shard: number, ..ShardSettings::default() };
            let shard =
                Shard::open(settings, Box::new(wal), recovered, Some(archive.cold()), Arc::new(|| 1_000)).unwrap();
            shipping.push(tokio::spawn(archive.run(shard.clone(), std::future::pending())));
            members.push(Member { number, engine: Engine::File, shard });
        }
        let shards = Shards::new(members, BTreeMap::new());
        shards.reconcile().await.unwrap();
        if life == 0 {
            StateLog::commit(&shards, vec![Change::created(topic(1, 1))]).await.unwrap();
        }
        for (group, offset) in groups.iter().zip(5..) {
            if life == 0 {
                shards.commit_offset(group, at(1, 0), offset);
            }
            assert_eq!(shards.committed(group, at(1, 0)), Some(offset));
        }
        assert_eq!([0, 1].map(|number| shards.stored(number)), [1, 1]);
        let is_behind = |member: &Member| member.shard.status().shipped_seq < member.shard.status().next_seq;
        while shards.members().iter().any(is_behind) {
            tokio::task::yield_now().await;
        }
        shipping.iter().for_each(|shipping| shipping.abort());
        shards.close();
    }
}

/// Two shards whose committers are run by hand; the second one's is run when the test says so.
#[tokio::test(start_paused = true)]
async fn a_shard_that_does_not_answer_holds_up_its_own_groups_alone() {
    let open = |shard| {
        let settings = ShardSettings { shard, archived: false, ..ShardSettings::default() };
        let wal = Box::new(MemoryWal::new(WAL_BYTES));
        Shard::open_driven(settings, wal, Recovered::default(), None, Arc::new(|| 1_000)).unwrap()
    };
    let ((near, near_commits), (far, far_commits)) = (open(0), open(1));
    tokio::spawn(near_commits);
    let mut far_commits = Box::pin(far_commits);
    let member = |number, shard| Member { number, engine: Engine::Object, shard };
    let shards = Arc::new(Shards::new(vec![member(0, near), member(1, far)], BTreeMap::new()));
    shards.reconcile().await.unwrap();
    StateLog::commit(&*shards, vec![Change::created(topic(1, 1))]).await.unwrap();
    let settings = GroupSettings { initial_rebalance_delay_ms: 0, ..GroupSettings::default() };
    let patience = settings.commit_timeout;
    let groups = Groups::new(shards.clone(), settings);
    let (near, far) = (group_in(0, 2), group_in(1, 2));
    let offset = |offset| vec![OffsetCommit { partition: at(1, 0), offset, leader_epoch: -1, metadata: String::new() }];
    let commit = |group, n| groups.commit_offsets(group, "", None, -1, offset(n));
    tokio::select! {
        _ = &mut far_commits => panic!("the committer ended"),
        stored = commit(&far, 5) => stored.unwrap(),
    }

    let begun = Instant::now();
    let mut late = Vec::new();
    for n in 6..8 {
        late.push(commit(&far, n).await);
    }
    late.push(groups.delete(&far).await);
    late.push(groups.delete_offsets(&far, [at(1, 0)].into()).await);
    assert!(
        late.iter().all(|late| matches!(late, Err(error @ GroupError::NotStored(_)) if error.code() == 15)),
        "{late:?}"
    );
    assert_eq!(begun.elapsed(), 4 * patience);
    // Everything that is not to become durable there goes on at once.
    let begun = Instant::now();
    commit(&near, 9).await.unwrap();
    assert_eq!(groups.list().into_keys().collect::<BTreeSet<_>>(), BTreeSet::from([near.clone(), far.clone()]));
    assert_eq!(shards.committed(&far, at(1, 0)), Some(5));
    assert_eq!(groups.describe(&far).unwrap().state, "Empty");
    groups.delete(&near).await.unwrap();
    StateLog::commit(&*shards, vec![Change::Topics(TopicChange::Deleted { id: at(1, 0).topic })]).await.unwrap();
    assert_eq!(begun.elapsed(), Duration::ZERO);
    tokio::select! {
        _ = &mut far_commits => panic!("the committer ended"),
        stored = commit(&far, 8) => stored.unwrap(),
    }
    assert_eq!(shards.stored(1), 1, "what waited has happened in its order");
}
