//! The heartbeat object: what a node says of itself in the bucket, for other nodes and for people.
//!
//! ```text
//! <prefix>/cluster/nodes/{node id:010}
//!
//! envelope with magic TRBN, version 1; its payload is postcard
//! ```
//! It is the only object that is written over. Whose a shard is is said by its roots and never by this: a heartbeat that is
//! lost, old or wrong costs a wait or a question to a person, and no record.

use std::fmt;

use bytes::Bytes;
use object_store::path::Path;
use serde::{Deserialize, Serialize};

use crate::envelope::EnvelopeFormat;
use crate::manifest::{self, ManifestError};

const FORMAT: EnvelopeFormat = EnvelopeFormat { magic: *b"TRBN", version: 1, kind: 0 };
/// Larger than any heartbeat: 64 shards and some listeners are less than 10 KiB.
pub(super) const HEARTBEAT_BYTES_MAX: u64 = 64 << 10;

/// What a node says of itself. Published as version 1: what must say more becomes version 2.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// The node's number.
    pub node_id: i32,
    /// Random, made anew by each start of the process.
    pub incarnation: [u8; 16],
    /// Rises with each beat: that it moves says that the node lives.
    pub counter: u64,
    /// Which process of which data directory this is.
    pub identity: OwnerIdentity,
    /// Where Kafka clients are told to connect to, by listener.
    pub kafka: Vec<AdvertisedListener>,
    /// Where edges connect to, if it is known.
    pub link_url: Option<String>,
    /// Where other nodes connect to; there is no such port yet.
    pub node_url: Option<String>,
    /// Where the node stands; there is no such setting yet.
    pub rack: Option<String>,
    /// The host's name, for people.
    pub host: String,
    /// The data directory, for people.
    pub data_dir: String,
    /// The software's version.
    pub software: String,
    /// What it can do of what nodes must agree on; 1 so far.
    pub level: u16,
    /// Whether it serves.
    pub state: NodePhase,
    /// Shards that it has claimed or is about to claim, ascending.
    pub shards: Vec<OwnedShard>,
}

/// What tells one process from another. Where all of it is equal and the reader holds the lock of the data directory, the
/// process that wrote it has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnerIdentity {
    /// Random, kept in the data directory: another one in another directory.
    pub data_id: [u8; 16],
    /// The kernel's random number of this boot: another one on another machine.
    pub boot_id: [u8; 16],
    /// Device of the file that is locked: another one or another inode for a copy of the directory.
    pub device: u64,
    /// Its inode.
    pub inode: u64,
}

/// A Kafka listener as clients are told of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdvertisedListener {
    /// Its name in the settings, or its address.
    pub name: String,
    /// Host and port.
    pub address: String,
}

/// Whether a node serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodePhase {
    /// It does, or is about to.
    Serving,
    /// It has stopped in order, and nothing of it runs any more.
    Gone,
}

/// A shard and the epoch it is claimed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnedShard {
    /// The shard.
    pub number: u32,
    /// The epoch.
    pub epoch: u32,
    /// Whether the claim is made; false while it is about to be.
    pub claimed: bool,
}

impl Heartbeat {
    /// The object.
    pub fn encode(&self) -> Bytes {
        FORMAT.seal(&postcard::to_stdvec(self).expect("plain data always encodes into memory"))
    }

    /// Reads the object.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        manifest::decode(FORMAT.open(bytes)?)
    }

    /// The epoch it has claimed a shard with.
    pub fn epoch_of(&self, shard: u32) -> Option<u32> {
        self.shards.iter().find(|owned| owned.number == shard && owned.claimed).map(|owned| owned.epoch)
    }
}

/// The node, for people.
impl fmt::Display for Heartbeat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {} on host {}", self.node_id, self.host)?;
        for (at, listener) in self.kafka.iter().enumerate() {
            f.write_str(if at == 0 { ", Kafka at " } else { " and " })?;
            f.write_str(&listener.address)?;
        }
        write!(f, ", data_dir {}", self.data_dir)
    }
}

/// All heartbeats of a bucket.
pub(in crate::archive) fn nodes(prefix: &Path) -> Path {
    prefix.clone().join("cluster").join("nodes")
}

/// One node's heartbeat.
pub(super) fn node(prefix: &Path, node_id: i32) -> Path {
    nodes(prefix).join(format!("{node_id:010}"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::envelope::EnvelopeError;
    use proptest::prelude::*;

    pub fn heartbeat(node_id: i32, shards: &[(u32, u32)]) -> Heartbeat {
        let own = node_id as u8;
        Heartbeat {
            node_id,
            incarnation: [own; 16],
            counter: 300,
            identity: OwnerIdentity { data_id: [own | 0x80; 16], boot_id: [7; 16], device: 5, inode: 200 },
            kafka: vec![AdvertisedListener { name: "public".into(), address: "kafka.example:9092".into() }],
            link_url: Some("https://edge.example".into()),
            node_url: None,
            rack: None,
            host: "vm-7".into(),
            data_dir: "/var/lib/t".into(),
            software: "0.1.0".into(),
            level: 1,
            state: NodePhase::Serving,
            shards: shards
                .iter()
                .map(|(number, epoch)| OwnedShard { number: *number, epoch: *epoch, claimed: true })
                .collect(),
        }
    }

    #[test]
    fn golden_heartbeat() {
        let bytes = heartbeat(1, &[(0, 3), (4, 200)]).encode();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, GOLDEN);
        assert_eq!(Heartbeat::decode(&bytes), Ok(heartbeat(1, &[(0, 3), (4, 200)])));
    }

    const GOLDEN: &str = "5452424e000100000000008926e549210201010101010101010101010101010101ac0281818181818181818181818181\
         8181810707070707070707070707070707070705c80101067075626c6963126b61666b612e6578616d706c653a393039320114687474\
         70733a2f2f656467652e6578616d706c65000004766d2d370a2f7661722f6c69622f7405302e312e3001000200030104c80101";

    #[test]
    fn a_heartbeat_of_another_version_is_refused() {
        let bytes = EnvelopeFormat { version: 2, ..FORMAT }.seal(&heartbeat(1, &[]).encode());
        let refused = EnvelopeError::Version { expected: 1, found: 2 };
        assert_eq!(Heartbeat::decode(&bytes), Err(ManifestError::Envelope(refused)));
    }

    #[test]
    fn a_person_reads_who_it_is() {
        let text = heartbeat(1, &[]).to_string();
        assert_eq!(text, "node 1 on host vm-7, Kafka at kafka.example:9092, data_dir /var/lib/t");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Heartbeat::decode(&bytes);
            let _ = Heartbeat::decode(&FORMAT.seal(&bytes));
        }
    }
}
