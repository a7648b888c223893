//! Topics: names, ids, partitions and settings, over the state log.
//!
//! Reads are of durable state. Changes of one name go one after the other: a check and its commit are one step, so of two
//! requests for the same name one makes the topic and the other finds it. Changes of different names do not wait for each
//! other, since the shards of one may hang. A change that has begun is brought to its end even if who asked has gone or has
//! given up waiting.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::future::{FutureExt as _, Shared};
use shared::limited;
use shared::log::{AppendError, BoxFuture};
use shared::name::{NameError, Partition, TopicId, TopicName};
use tokio::time::{Instant, timeout_at};

use claims::{Claim, Claims, Held};

use crate::state::{CATALOGUE, Change, StateLog, TOPIC_PARTITIONS_MAX, Topic, TopicChange, read_state};

mod claims;
pub mod configs;
pub mod placement;

pub use configs::TopicConfig;
pub use placement::{ENGINE_SETTING, EngineRule, Placement};

/// Largest `max.message.bytes`: batches are held whole in memory on their way.
pub const MESSAGE_BYTES_LIMIT: usize = 32 * 1024 * 1024;

/// Bounds of the catalogue and what a topic gets that says nothing.
#[derive(Debug, Clone)]
pub struct CatalogueSettings {
    /// Partitions of a topic that does not say (Kafka's `num.partitions`).
    pub default_partitions: u32,
    /// Partitions of a topic made for edges' streams: they are placed once and never move, so there is room to grow.
    pub stream_partitions: u32,
    /// Most topics.
    pub topics_max: usize,
    /// Most partitions of all topics together.
    pub partitions_max: usize,
    /// Default of `retention.ms`; -1 keeps all.
    pub retention_ms: i64,
    /// Default of `retention.bytes`; -1 keeps all.
    pub retention_bytes: i64,
    /// Default of `max.message.bytes`.
    pub max_message_bytes: usize,
    /// Which shards new topics go to.
    pub placement: Placement,
}

impl Default for CatalogueSettings {
    fn default() -> Self {
        Self {
            default_partitions: 1,
            stream_partitions: 16,
            topics_max: 10_000,
            partitions_max: 50_000,
            retention_ms: 7 * 24 * 3600 * 1000,
            retention_bytes: -1,
            max_message_bytes: shared::limits::BATCH_BYTES_MAX,
            placement: Placement::default(),
        }
    }
}

/// Why the catalogue refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CatalogueError {
    /// INVALID_TOPIC_EXCEPTION (17).
    #[error(transparent)]
    InvalidName(#[from] NameError),
    /// UNKNOWN_TOPIC_OR_PARTITION (3).
    #[error("there is no topic {0:?}")]
    UnknownTopic(String),
    /// UNKNOWN_TOPIC_ID (100).
    #[error("there is no topic with id {0}")]
    UnknownTopicId(TopicId),
    /// TOPIC_ALREADY_EXISTS (36).
    #[error("topic {0:?} exists already")]
    AlreadyExists(TopicName),
    /// INVALID_PARTITIONS (37).
    #[error("{0}")]
    InvalidPartitions(String),
    /// INVALID_CONFIG (40).
    #[error("{0}")]
    InvalidConfig(String),
    /// POLICY_VIOLATION (44): a bound of this broker.
    #[error("{0}")]
    Bound(String),
    /// REQUEST_TIMED_OUT (7): who asked does not wait any longer.
    #[error("the change is not durable everywhere yet; if it has begun it goes on: look, or ask for it again")]
    TimedOut,
    /// KAFKA_STORAGE_ERROR (56): the log did not take it; retry.
    #[error("the change could not be stored: {0}")]
    NotStored(String),
}

impl CatalogueError {
    /// Kafka's number for it.
    pub fn code(&self) -> i16 {
        match self {
            Self::UnknownTopic(_) => 3,
            Self::TimedOut => 7,
            Self::InvalidName(_) => 17,
            Self::AlreadyExists(_) => 36,
            Self::InvalidPartitions(_) => 37,
            Self::InvalidConfig(_) => 40,
            Self::Bound(_) => 44,
            Self::NotStored(_) => 56,
            Self::UnknownTopicId(_) => 100,
        }
    }
}

impl From<AppendError> for CatalogueError {
    fn from(error: AppendError) -> Self {
        Self::NotStored(error.to_string())
    }
}

/// Waits for a change until `deadline`. One that has begun goes on after that.
pub async fn within<T>(
    deadline: Instant,
    change: impl Future<Output = Result<T, CatalogueError>>,
) -> Result<T, CatalogueError> {
    timeout_at(deadline, change).await.unwrap_or(Err(CatalogueError::TimedOut))
}

/// A topic somebody asks for.
#[derive(Debug, Clone, Default)]
pub struct NewTopic {
    /// Its name, not yet checked.
    pub name: String,
    /// `None`: as many as the broker's default.
    pub partitions: Option<u32>,
    /// Settings, not yet checked.
    pub configs: Vec<(String, Option<String>)>,
}

/// What the topics come to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct CatalogueStatus {
    /// Topics.
    pub topics: usize,
    /// Their partitions.
    pub partitions: usize,
}

/// The topics there are.
pub struct Catalogue {
    state: Arc<dyn StateLog>,
    settings: CatalogueSettings,
    claims: Arc<Claims>,
}

impl Catalogue {
    /// The topics of a state log.
    pub fn new(state: Arc<dyn StateLog>, settings: CatalogueSettings) -> Self {
        Self { state, settings, claims: Arc::default() }
    }

    /// Bounds and defaults in force.
    pub fn settings(&self) -> &CatalogueSettings {
        &self.settings
    }

    /// The topic of that name. A name that is none has no topic.
    pub fn topic(&self, name: &str) -> Option<Topic> {
        let name = TopicName::parse(name).ok()?;
        read_state(&*self.state, |state| state.topic_named(&name).cloned())
    }

    /// The topic of that identity.
    pub fn topic_by_id(&self, id: TopicId) -> Option<Topic> {
        read_state(&*self.state, |state| state.topic(id).cloned())
    }

    /// All topics, ordered by name.
    pub fn topics(&self) -> Vec<Topic> {
        read_state(&*self.state, |state| state.topics().cloned().collect())
    }

    /// A partition by the topic's name and its number, if there is one.
    pub fn partition(&self, topic: &str, index: i32) -> Option<Partition> {
        let (topic, index) = (self.topic(topic)?, u32::try_from(index).ok()?);
        (index < topic.partitions).then_some(Partition { topic: topic.id, index })
    }

    /// A topic's settings in force.
    pub fn config(&self, topic: &Topic) -> TopicConfig {
        configs::typed(&topic.configs, &self.settings)
    }

    /// How much there is.
    pub fn status(&self) -> CatalogueStatus {
        read_state(&*self.state, |state| CatalogueStatus {
            topics: state.topics().count(),
            partitions: state.topics().map(|topic| topic.partitions as usize).sum(),
        })
    }

    /// Topics and partitions, those that are being made included.
    fn counts(&self, held: &Held) -> (usize, usize) {
        let CatalogueStatus { topics, partitions } = self.status();
        (topics + held.coming.0, partitions + held.coming.1)
    }

    /// Makes a topic; resolves when it is durable.
    pub async fn create(&self, topic: NewTopic) -> Result<Topic, CatalogueError> {
        match self.create_all(vec![topic], false).pop() {
            Some(made) => made.await,
            None => Err(CatalogueError::NotStored("no answer".to_owned())),
        }
    }

    /// The topic of that name, made with so many partitions if it is not there. Who asks at the same time gets the same one.
    pub async fn find_or_create(&self, name: &str, partitions: Option<u32>) -> Result<Topic, CatalogueError> {
        if let Some(topic) = self.topic(name) {
            return Ok(topic);
        }
        let wanted = NewTopic { name: name.to_owned(), partitions, configs: Vec::new() };
        match self.create(wanted).await {
            Err(CatalogueError::AlreadyExists(name)) => {
                self.topic(name.as_str()).ok_or_else(|| CatalogueError::UnknownTopic(name.to_string()))
            }
            result => result,
        }
    }

    /// Begins to make topics, each by itself right or wrong, and resolves for each when it is durable; with `validate_only`
    /// only says what would come of it. Those that lie in the same shards are one commit, and wait for no others.
    pub fn create_all(
        &self,
        wanted: Vec<NewTopic>,
        validate_only: bool,
    ) -> Vec<BoxFuture<'_, Result<Topic, CatalogueError>>> {
        let mut plans = Vec::with_capacity(wanted.len());
        let mut commits: BTreeMap<Vec<u32>, (Vec<Claim>, Vec<Change>)> = BTreeMap::new();
        {
            let mut held = self.claims.lock();
            let mut counts = self.counts(&held);
            let mut named: Vec<TopicName> = Vec::new();
            for topic in wanted {
                let plan = self.prepare(&topic, counts, &held, &named);
                if let Plan::Make(topic, shards) = &plan {
                    let partitions = topic.partitions as usize;
                    counts = (counts.0 + 1, counts.1 + partitions);
                    named.push(topic.name.clone());
                    if !validate_only {
                        let (claims, changes) = commits.entry(shards.clone()).or_default();
                        claims.push(self.claims.claim_in(&mut held, topic.name.clone(), (1, partitions)));
                        let (topic, mut shards) = (topic.clone(), shards.clone());
                        // The first partitions of all topics are not to lie in one shard: most topics have few.
                        let first = usize::from(topic.id.0[15]) % shards.len().max(1);
                        shards.rotate_left(first);
                        changes.push(Change::Topics(TopicChange::Created { topic, shards, own: CATALOGUE, from: 0 }));
                    }
                }
                plans.push((topic, plan));
            }
        }
        let begin = |(shards, (claims, changes))| (shards, self.commit(claims, changes));
        let commits: BTreeMap<Vec<u32>, Commit> = commits.into_iter().map(begin).collect();
        let answer = |(wanted, plan): (NewTopic, Plan)| -> BoxFuture<'_, Result<Topic, CatalogueError>> {
            match plan {
                Plan::Refuse(error) => Box::pin(std::future::ready(Err(error))),
                Plan::Wait(name) if validate_only => {
                    Box::pin(std::future::ready(Err(CatalogueError::AlreadyExists(name))))
                }
                Plan::Wait(name) => Box::pin(async move {
                    drop(self.claims.claim(&name).await);
                    self.create(wanted).await
                }),
                Plan::Make(topic, shards) => {
                    let stored = commits.get(&shards).cloned();
                    Box::pin(async move {
                        if let Some(stored) = stored {
                            stored.await?;
                            limited!(info, topic = %topic.name, partitions = topic.partitions, "topic created");
                        }
                        Ok(topic)
                    })
                }
            }
        };
        plans.into_iter().map(answer).collect()
    }

    /// What is to be done for a topic that is wanted. `held` are names that others change, `named` those made before it.
    fn prepare(&self, wanted: &NewTopic, counts: (usize, usize), held: &Held, named: &[TopicName]) -> Plan {
        let name = match TopicName::parse(&wanted.name) {
            Ok(name) => name,
            Err(error) => return Plan::Refuse(error.into()),
        };
        // In this order: what nobody changes any more can be seen in the state.
        if named.contains(&name) {
            return Plan::Refuse(CatalogueError::AlreadyExists(name));
        }
        if held.contains(&name) {
            return Plan::Wait(name);
        }
        match self.check(name, wanted, counts) {
            Ok((topic, shards)) => Plan::Make(topic, shards),
            Err(error) => Plan::Refuse(error),
        }
    }

    /// The topic, and the shards its partitions go to.
    fn check(
        &self,
        name: TopicName,
        wanted: &NewTopic,
        counts: (usize, usize),
    ) -> Result<(Topic, Vec<u32>), CatalogueError> {
        if self.topic(name.as_str()).is_some() {
            return Err(CatalogueError::AlreadyExists(name));
        }
        let partitions = wanted.partitions.unwrap_or(self.settings.default_partitions);
        if partitions == 0 {
            return Err(CatalogueError::InvalidPartitions("a topic has at least one partition".to_owned()));
        }
        if counts.0 >= self.settings.topics_max {
            return Err(CatalogueError::Bound(format!("there are {} topics, the most allowed", counts.0)));
        }
        self.check_room(counts.1, partitions)?;
        let mut configs = configs::check(&wanted.configs).map_err(CatalogueError::InvalidConfig)?;
        let placement = &self.settings.placement;
        let (engine, shards) = placement.place(&name, &configs).map_err(CatalogueError::InvalidConfig)?;
        if engine != placement.default_engine() {
            // Whatever rules say later, the topic says what it is.
            configs.insert(ENGINE_SETTING.to_owned(), engine.name().to_owned());
        }
        Ok((Topic { id: fresh_topic_id()?, name, partitions, configs, created_ms: self.state.now_ms() }, shards))
    }

    fn check_room(&self, there: usize, more: u32) -> Result<(), CatalogueError> {
        let max = self.settings.partitions_max;
        if more > TOPIC_PARTITIONS_MAX || there.saturating_add(more as usize) > max {
            let text = format!("{more} more partitions beside the {there} there are would be more than {max}");
            return Err(CatalogueError::Bound(text));
        }
        Ok(())
    }

    /// Deletes a topic with all its records, and what groups committed on it.
    pub async fn delete(&self, id: TopicId) -> Result<Topic, CatalogueError> {
        let find = || self.topic_by_id(id).ok_or(CatalogueError::UnknownTopicId(id));
        let claim = self.claims.claim(&find()?.name).await;
        let topic = find()?;
        self.commit(vec![claim], vec![Change::Topics(TopicChange::Deleted { id })]).await?;
        limited!(info, topic = %topic.name, "topic deleted");
        Ok(topic)
    }

    /// Gives a topic more partitions, `total` in all; with `validate_only` only says whether it could.
    pub async fn add_partitions(&self, name: &str, total: i32, validate_only: bool) -> Result<(), CatalogueError> {
        let find = || self.topic(name).ok_or_else(|| CatalogueError::UnknownTopic(name.chars().take(249).collect()));
        let claim = self.claims.claim(&find()?.name).await;
        let topic = find()?;
        let there = topic.partitions;
        let Some(total) = u32::try_from(total).ok().filter(|total| *total > there) else {
            let text = format!("topic {name:?} has {there} partitions; {total} is not more");
            return Err(CatalogueError::InvalidPartitions(text));
        };
        {
            let mut held = self.claims.lock();
            self.check_room(self.counts(&held).1, total - there)?;
            held.reserve(&topic.name, (total - there) as usize);
        }
        if total > TOPIC_PARTITIONS_MAX {
            return Err(CatalogueError::Bound(format!("a topic has at most {TOPIC_PARTITIONS_MAX} partitions")));
        }
        if validate_only {
            return Ok(());
        }
        self.commit(vec![claim], vec![Change::Topics(TopicChange::PartitionsAdded { id: topic.id, count: total })])
            .await?;
        limited!(info, topic = %topic.name, partitions = total, "partitions added");
        Ok(())
    }

    /// Gives a topic the settings that `altered` makes of those it has; with `validate_only` only says whether it could.
    pub async fn configure(
        &self,
        name: &str,
        validate_only: bool,
        altered: impl FnOnce(&BTreeMap<String, String>, &CatalogueSettings) -> Result<BTreeMap<String, String>, String>,
    ) -> Result<(), CatalogueError> {
        let name = TopicName::parse(name)?;
        let find = || self.topic(name.as_str()).ok_or_else(|| CatalogueError::UnknownTopic(name.to_string()));
        find()?;
        let claim = self.claims.claim(&name).await;
        let topic = find()?;
        let configs = altered(&topic.configs, &self.settings).map_err(CatalogueError::InvalidConfig)?;
        if validate_only {
            return Ok(());
        }
        // What is so already is told again: a shard may have refused it.
        self.commit(
            vec![claim],
            vec![Change::Topics(TopicChange::Configured { id: topic.id, configs: configs.clone() })],
        )
        .await?;
        limited!(info, topic = %topic.name, ?configs, "topic settings changed");
        Ok(())
    }

    /// Begins a commit of what is claimed, which stays claimed to the end of it whatever becomes of the caller.
    fn commit(&self, claims: Vec<Claim>, changes: Vec<Change>) -> Commit {
        let stored = self.state.commit(changes);
        let done = tokio::spawn(async move {
            let result = stored.await;
            drop(claims);
            result
        });
        let done: BoxFuture<'static, _> =
            Box::pin(
                async move { Ok(done.await.map_err(|_| CatalogueError::NotStored("shutting down".to_owned()))??) },
            );
        done.shared()
    }
}

/// A commit that several may wait for.
type Commit = Shared<BoxFuture<'static, Result<(), CatalogueError>>>;

/// What is to be done for a topic that is wanted.
enum Plan {
    /// It may be made, in these shards.
    Make(Topic, Vec<u32>),
    /// Somebody makes or changes a topic of that name right now.
    Wait(TopicName),
    Refuse(CatalogueError),
}

/// A random (version 4) UUID. Ids whose usual text begins with `-` are passed over: command lines take them for options.
fn fresh_topic_id() -> Result<TopicId, CatalogueError> {
    let mut id = [0; 16];
    loop {
        getrandom::fill(&mut id).map_err(|error| CatalogueError::NotStored(format!("no randomness: {error}")))?;
        id[6] = (id[6] & 0x0f) | 0x40;
        id[8] = (id[8] & 0x3f) | 0x80;
        const DASH: u8 = 62;
        if id[0] >> 2 != DASH {
            return Ok(TopicId(id));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use futures_util::future::join_all;
    use parking_lot::Mutex as SyncMutex;
    use shared::log::BoxFuture;
    use tokio::sync::Notify;

    use super::*;
    use crate::state::memory::MemoryStateLog;
    use crate::state::{Engine, State};

    fn new(name: &str, partitions: u32) -> NewTopic {
        NewTopic { name: name.to_owned(), partitions: Some(partitions), configs: Vec::new() }
    }

    fn catalogue(settings: CatalogueSettings) -> Catalogue {
        Catalogue::new(Arc::new(MemoryStateLog::new()), settings)
    }

    /// A state log whose commits wait until they are let go.
    #[derive(Default)]
    struct Held {
        log: Arc<MemoryStateLog>,
        waiting: SyncMutex<usize>,
        go: Arc<Notify>,
    }

    impl StateLog for Held {
        fn commit(&self, changes: Vec<Change>) -> BoxFuture<'static, Result<(), AppendError>> {
            *self.waiting.lock() += 1;
            let (log, go) = (self.log.clone(), self.go.clone());
            Box::pin(async move {
                go.notified().await;
                log.commit(changes).await
            })
        }

        fn with_state(&self, read: &mut dyn FnMut(&State)) {
            self.log.with_state(read);
        }

        fn now_ms(&self) -> shared::name::TimestampMs {
            self.log.now_ms()
        }
    }

    #[test]
    fn what_is_described_is_what_the_shard_does() {
        let (catalogue, shard) = (CatalogueSettings::default(), crate::shard::ShardSettings::default());
        assert_eq!((catalogue.retention_ms, catalogue.retention_bytes), (shard.retention_ms, shard.retention_bytes));
    }

    #[tokio::test]
    async fn a_topic_is_there_when_the_answer_comes() {
        let catalogue = catalogue(CatalogueSettings::default());
        let made = catalogue.create(new("telemetry", 3)).await.unwrap();
        assert_eq!(catalogue.topic("telemetry"), Some(made.clone()));
        assert_eq!(catalogue.topic_by_id(made.id), Some(made.clone()));
        assert_eq!(catalogue.partition("telemetry", 2), Some(Partition { topic: made.id, index: 2 }));
        assert_eq!(catalogue.partition("telemetry", 3), None);
        assert_eq!(catalogue.partition("telemetry", -1), None);
        assert_eq!(catalogue.create(new("telemetry", 1)).await, Err(CatalogueError::AlreadyExists(made.name.clone())));
        assert_eq!(catalogue.status(), CatalogueStatus { topics: 1, partitions: 3 });
        catalogue.delete(made.id).await.unwrap();
        assert_eq!(catalogue.delete(made.id).await, Err(CatalogueError::UnknownTopicId(made.id)));
        let again = catalogue.create(new("telemetry", 1)).await.unwrap();
        assert_ne!(again.id, made.id, "the same name, another topic");
    }

    #[tokio::test]
    async fn of_many_who_ask_for_one_name_each_gets_the_same_topic() {
        let held = Arc::new(Held::default());
        let catalogue = Arc::new(Catalogue::new(held.clone(), CatalogueSettings::default()));
        let ask = |_| {
            let catalogue = catalogue.clone();
            tokio::spawn(async move { catalogue.find_or_create("events", None).await.unwrap().id })
        };
        let asked: Vec<_> = (0..10).map(ask).collect();
        while *held.waiting.lock() == 0 {
            tokio::task::yield_now().await;
        }
        asked[0].abort();
        held.go.notify_one();
        let mut ids = BTreeSet::new();
        for asked in asked.into_iter().skip(1) {
            ids.insert(asked.await.unwrap());
        }
        assert_eq!(ids.len(), 1);
        assert_eq!(*held.waiting.lock(), 1, "although who asked first had gone, the topic was made once");
    }

    #[tokio::test]
    async fn each_of_several_topics_is_judged_by_itself() {
        let settings = CatalogueSettings { topics_max: 3, partitions_max: 10, ..CatalogueSettings::default() };
        let catalogue = catalogue(settings);
        let configured = |value: &str| NewTopic {
            configs: vec![("cleanup.policy".into(), Some(value.into()))],
            ..new("configured", 1)
        };
        let wanted = vec![
            new("a", 2),
            new("a", 2),
            new("no/name", 1),
            new("none", 0),
            new("many", 9),
            configured("compact"),
            NewTopic { name: "default".into(), ..NewTopic::default() },
        ];
        let dry: Vec<i16> = codes(&join_all(catalogue.create_all(wanted.clone(), true)).await);
        assert!(catalogue.topics().is_empty());
        let wet = codes(&join_all(catalogue.create_all(wanted, false)).await);
        assert_eq!(dry, wet);
        assert_eq!(wet, [0, 36, 17, 37, 44, 40, 0]);
        assert_eq!(catalogue.topic("default").unwrap().partitions, 1);
        catalogue.create(configured("delete")).await.unwrap();
        assert!(matches!(catalogue.create(new("fourth", 1)).await, Err(CatalogueError::Bound(_))));
    }

    fn codes(results: &[Result<Topic, CatalogueError>]) -> Vec<i16> {
        results.iter().map(|result| result.as_ref().err().map_or(0, CatalogueError::code)).collect()
    }

    #[tokio::test]
    async fn an_engine_is_chosen_when_a_topic_is_made_and_shown_ever_after() {
        let rule = EngineRule { pattern: "cache.*".to_owned(), engine: Engine::Memory };
        let shards = [(0, Engine::File), (1, Engine::Object), (2, Engine::Object), (3, Engine::Memory)];
        let placement = Placement::new(shards, vec![rule]);
        let log = Arc::new(MemoryStateLog::new());
        let settings = CatalogueSettings { placement, ..CatalogueSettings::default() };
        let catalogue = Catalogue::new(log.clone(), settings);
        let with = |name: &str, engine: &str| NewTopic {
            configs: vec![(ENGINE_SETTING.to_owned(), Some(engine.to_owned()))],
            ..new(name, 4)
        };
        for (wanted, engine, placed) in
            [(new("plain", 4), "file", vec![0, 0, 0, 0]), (new("cache.a", 4), "memory", vec![3, 3, 3, 3])]
        {
            let topic = catalogue.create(wanted).await.unwrap();
            let described = configs::describe(&topic.configs, catalogue.settings());
            let shown = described.iter().find(|entry| entry.name == ENGINE_SETTING).unwrap();
            assert_eq!((shown.value.as_str(), shown.read_only), (engine, true));
            let shard = |index| read_state(&*log, |state| state.shard_of(Partition { topic: topic.id, index }));
            assert_eq!((0..4).map(shard).collect::<Vec<_>>(), placed);
        }
        // Partitions take turns, and which shard has the first is the topic's own.
        let wanted = (0..40).map(|n| with(&format!("object.{n}"), "object")).collect();
        let made = join_all(catalogue.create_all(wanted, false)).await;
        let placed = made.into_iter().map(|topic| {
            let id = topic.unwrap().id;
            (0..4).map(|index| read_state(&*log, |state| state.shard_of(Partition { topic: id, index }))).collect()
        });
        assert_eq!(placed.collect::<BTreeSet<Vec<u32>>>(), BTreeSet::from([vec![1, 2, 1, 2], vec![2, 1, 2, 1]]));
        assert!(matches!(catalogue.create(with("t", "tape")).await, Err(CatalogueError::InvalidConfig(_))));
        let few = super::Catalogue::new(log, CatalogueSettings::default());
        assert!(matches!(few.create(with("t", "memory")).await, Err(CatalogueError::InvalidConfig(_))));
    }

    #[tokio::test]
    async fn partitions_only_grow() {
        let catalogue = catalogue(CatalogueSettings { partitions_max: 10, ..CatalogueSettings::default() });
        catalogue.create(new("t", 2)).await.unwrap();
        for total in [-1, 0, 1, 2] {
            let refused = catalogue.add_partitions("t", total, false).await;
            assert!(matches!(refused, Err(CatalogueError::InvalidPartitions(_))), "{total}: {refused:?}");
        }
        assert!(matches!(catalogue.add_partitions("t", 11, false).await, Err(CatalogueError::Bound(_))));
        assert!(matches!(catalogue.add_partitions("x", 3, false).await, Err(CatalogueError::UnknownTopic(_))));
        catalogue.add_partitions("t", 5, true).await.unwrap();
        assert_eq!(catalogue.topic("t").unwrap().partitions, 2);
        catalogue.add_partitions("t", 5, false).await.unwrap();
        assert_eq!(catalogue.topic("t").unwrap().partitions, 5);
    }

    #[tokio::test]
    async fn what_is_not_stored_is_not_there() {
        let log = Arc::new(MemoryStateLog::new());
        let catalogue = Catalogue::new(log.clone(), CatalogueSettings::default());
        log.refuse(Some(AppendError::Full("wal budget".into())));
        assert!(matches!(catalogue.create(new("t", 1)).await, Err(CatalogueError::NotStored(_))));
        assert_eq!(catalogue.topic("t"), None);
        log.refuse(None);
        catalogue.create(new("t", 1)).await.unwrap();
    }
}
