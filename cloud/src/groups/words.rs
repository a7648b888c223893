//! What members and tools ask of a group and what they are told, without the wire around it.

use bytes::Bytes;

/// Why a group refused. Each is one of Kafka's error codes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GroupError {
    /// INVALID_GROUP_ID (24).
    #[error("a group id must not be empty")]
    InvalidGroupId,
    /// INVALID_SESSION_TIMEOUT (26).
    #[error("session timeout {found} ms is outside {min} to {max} ms")]
    InvalidSessionTimeout {
        /// What came.
        found: i32,
        /// Least taken.
        min: i32,
        /// Greatest taken.
        max: i32,
    },
    /// INCONSISTENT_GROUP_PROTOCOL (23).
    #[error("the protocols are none, of another type, or share none with the group's other members")]
    InconsistentGroupProtocol,
    /// MEMBER_ID_REQUIRED (79): join again with this id (KIP-394).
    #[error("join again with member id {0}")]
    MemberIdRequired(String),
    /// UNKNOWN_MEMBER_ID (25).
    #[error("the group has no such member")]
    UnknownMemberId,
    /// FENCED_INSTANCE_ID (82): a newer process has taken this instance id over (KIP-345).
    #[error("another member has taken over this group instance id")]
    FencedInstanceId,
    /// ILLEGAL_GENERATION (22).
    #[error("another generation is in force")]
    IllegalGeneration,
    /// REBALANCE_IN_PROGRESS (27).
    #[error("the group is rebalancing: join again")]
    RebalanceInProgress,
    /// GROUP_MAX_SIZE_REACHED (81).
    #[error("the group has its greatest number of members, {0}")]
    GroupMaxSizeReached(usize),
    /// POLICY_VIOLATION (44): a bound of this broker, not of the protocol.
    #[error("{0}")]
    Bound(String),
    /// NON_EMPTY_GROUP (68).
    #[error("the group has members")]
    NonEmptyGroup,
    /// GROUP_SUBSCRIBED_TO_TOPIC (86).
    #[error("the group has members, which may read this topic")]
    SubscribedToTopic,
    /// GROUP_ID_NOT_FOUND (69).
    #[error("there is no such group")]
    GroupIdNotFound,
    /// COORDINATOR_NOT_AVAILABLE (15): the log did not take what had to be durable; retry.
    #[error("the coordinator could not store this: {0}")]
    NotStored(String),
}

impl GroupError {
    /// Kafka's number for it.
    pub fn code(&self) -> i16 {
        match self {
            Self::NotStored(_) => 15,
            Self::IllegalGeneration => 22,
            Self::InconsistentGroupProtocol => 23,
            Self::InvalidGroupId => 24,
            Self::UnknownMemberId => 25,
            Self::InvalidSessionTimeout { .. } => 26,
            Self::RebalanceInProgress => 27,
            Self::Bound(_) => 44,
            Self::NonEmptyGroup => 68,
            Self::GroupIdNotFound => 69,
            Self::MemberIdRequired(_) => 79,
            Self::GroupMaxSizeReached(_) => 81,
            Self::FencedInstanceId => 82,
            Self::SubscribedToTopic => 86,
        }
    }
}

/// What a JoinGroup asks.
#[derive(Debug, Clone, Default)]
pub struct JoinRequest {
    /// Empty at first; then what the group gave.
    pub member_id: String,
    /// The name of a static member (KIP-345).
    pub instance_id: Option<String>,
    /// The client's name for itself.
    pub client_id: String,
    /// Where it connects from, as DescribeGroups shows it.
    pub client_host: String,
    /// Without a heartbeat for so long the member is out.
    pub session_timeout_ms: i32,
    /// How long a rebalance waits for this member.
    pub rebalance_timeout_ms: i32,
    /// `consumer`, `connect`, `sr` or another.
    pub protocol_type: String,
    /// Name and metadata, the preferred one first.
    pub protocols: Vec<(String, Bytes)>,
    /// The client knows MEMBER_ID_REQUIRED (v4).
    pub two_steps: bool,
    /// The client knows `skip_assignment` (v9).
    pub may_skip_assignment: bool,
}

/// The answer to a JoinGroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joined {
    /// The generation that begins.
    pub generation: i32,
    /// The group's protocol type.
    pub protocol_type: String,
    /// The protocol all members know.
    pub protocol: String,
    /// The member that assigns.
    pub leader: String,
    /// The member this is the answer to.
    pub member_id: String,
    /// The leader must not assign: the group is stable and its assignment stays.
    pub skip_assignment: bool,
    /// All members with their metadata, for the leader; empty for the others.
    pub members: Vec<JoinedMember>,
}

/// One member as the leader sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinedMember {
    /// Its id.
    pub member_id: String,
    /// Its static name.
    pub instance_id: Option<String>,
    /// Its metadata for the chosen protocol, as it sent it.
    pub metadata: Bytes,
}

/// What a SyncGroup asks.
#[derive(Debug, Clone, Default)]
pub struct SyncRequest {
    /// Who.
    pub member_id: String,
    /// Its static name.
    pub instance_id: Option<String>,
    /// The generation of its JoinGroup answer.
    pub generation: i32,
    /// v5: must be the group's.
    pub protocol_type: Option<String>,
    /// v5: must be the group's.
    pub protocol: Option<String>,
    /// Each member's assignment, from the leader.
    pub assignments: Vec<(String, Bytes)>,
}

/// The answer to a SyncGroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Synced {
    /// The group's protocol type.
    pub protocol_type: String,
    /// The protocol in force.
    pub protocol: String,
    /// What the leader gave this member.
    pub assignment: Bytes,
}

/// What DescribeGroups says of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// The state's name.
    pub state: &'static str,
    /// The protocol type, empty if offsets were only ever committed without membership.
    pub protocol_type: String,
    /// The protocol in force; empty unless stable.
    pub protocol: String,
    /// The members.
    pub members: Vec<DescribedMember>,
}

/// What DescribeGroups says of a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DescribedMember {
    /// Its id.
    pub member_id: String,
    /// Its static name.
    pub instance_id: Option<String>,
    /// The client's name for itself.
    pub client_id: String,
    /// Where it connects from.
    pub client_host: String,
    /// Its metadata for the protocol in force; empty unless stable.
    pub metadata: Bytes,
    /// Its assignment; empty unless stable.
    pub assignment: Bytes,
}
