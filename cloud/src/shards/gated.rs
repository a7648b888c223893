//! A node of two shards of which one can be made to hang: for tests of what goes on beside it.

use super::*;
use crate::archive::Recovered;
use crate::catalogue::{CatalogueSettings, EngineRule, Placement};
use crate::shard::ShardSettings;
use crate::wal::gated::GatedWal;

/// The catalogue's shard, and shard 1 on the WAL returned, where topics go whose names begin with `slow`, what is set
/// aside of the others, and the list of gaps. For a runtime of one thread, whose clock may be paused.
pub fn quick_and_slow() -> (Arc<Shards>, CatalogueSettings, GatedWal) {
    let open = |number, engine| {
        let wal = GatedWal::new(64 << 20);
        let settings = ShardSettings { shard: number, archived: false, ..ShardSettings::default() };
        let (boxed, recovered, clock) = (Box::new(wal.clone()), Recovered::default(), Arc::new(|| 7));
        let (shard, commit) = Shard::open_driven(settings, boxed, recovered, None, clock).unwrap();
        tokio::spawn(commit);
        (Member { number, engine, shard }, wal)
    };
    let ((quick, _), (hanging, slow)) = (open(0, Engine::File), open(1, Engine::Object));
    let shards = Arc::new(Shards::new(vec![quick, hanging], BTreeMap::new()));
    let rules = ["slow*", "*.rejected", shared::link::GAPS_TOPIC]
        .map(|pattern| EngineRule { pattern: pattern.into(), engine: Engine::Object });
    let placement = Placement::new([(0, Engine::File), (1, Engine::Object)], rules.into());
    (shards, CatalogueSettings { placement, ..CatalogueSettings::default() }, slow)
}
