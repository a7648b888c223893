//! Which API and version is served, and by whom.
//!
//! [`SERVED`] is the one list: what ApiVersions advertises and what requests are routed by. A version is in it when it is
//! whole, for each is a promise. What is not in it closes the connection, as Kafka does: there is no answer that a
//! client who negotiated could expect.

use std::ops::RangeInclusive;
use std::sync::Arc;

use bytes::Bytes;
use kafka_wire::header::encode_response_header;
use kafka_wire::{ApiKey, Encoded, ErrorCode, Message, RequestHeader, WireError, Writer};
use shared::log::BoxFuture;
use tokio::sync::OwnedSemaphorePermit;

use super::{Broker, RequestContext};

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub enum Close {
    /// The client ended it between two requests.
    #[error("the client closed it")]
    Gone,
    /// The client ended it within a request.
    #[error("the client closed it in the middle of a request")]
    Cut,
    /// The socket or TLS failed.
    #[error("{0}")]
    Failed(std::io::Error),
    /// No request for `idle_timeout`.
    #[error("idle for too long")]
    Idle,
    /// No whole request in `first_request_timeout`.
    #[error("no request came in time")]
    Silent,
    /// It never made a request, and another client wanted its place.
    #[error("closed in favour of another: it never made a request")]
    Evicted,
    /// A request, a response or a handshake took longer than `transfer_timeout`.
    #[error("a transfer took too long")]
    Slow,
    /// The broker stops.
    #[error("the broker is stopping")]
    Shutdown,
    /// The first bytes cannot be a request's size.
    #[error("{0} is no size of a Kafka request: the client speaks something else (TLS on a plain listener, HTTP?)")]
    NotKafka(i32),
    /// More than this listener takes.
    #[error("a request of {size} bytes, at most {max} are taken")]
    TooLarge {
        /// What the client announced.
        size: usize,
        /// The bound.
        max: usize,
    },
    /// An API that is not served.
    #[error("API key {0} is not served")]
    UnknownApi(i16),
    /// A version that is not served.
    #[error("{key:?} version {version} is not served")]
    UnknownVersion {
        /// The API.
        key: ApiKey,
        /// The version asked for.
        version: i16,
    },
    /// Bytes that are not the request they claim to be.
    #[error("{key:?} version {version} is malformed: {error}")]
    Malformed {
        /// The API.
        key: ApiKey,
        /// The version claimed.
        version: i16,
        /// What is wrong.
        error: WireError,
    },
    /// The header itself is malformed.
    #[error("request header is malformed: {0}")]
    MalformedHeader(WireError),
    /// With acks=0 there is no answer that could say so (rule of the protocol: close instead).
    #[error("a Produce without acknowledgement failed with {0}")]
    SilentFailure(ErrorCode),
}

/// An answer, and the memory it holds until it is sent.
#[derive(Debug)]
pub struct Reply {
    /// The frame; `None` where the protocol has no answer (Produce with acks=0).
    pub encoded: Option<Encoded>,
    /// Released once the frame is sent.
    pub memory: Option<OwnedSemaphorePermit>,
}

/// Correlates an answer with its question.
#[derive(Debug, Clone, Copy)]
struct Envelope {
    key: ApiKey,
    version: i16,
    correlation_id: i32,
}

impl Envelope {
    fn seal<M: Message>(self, response: &M) -> Reply {
        let mut writer = Writer::frame(self.version, M::is_flexible(self.version));
        encode_response_header(self.key, self.version, self.correlation_id, &mut writer);
        response.write(&mut writer);
        Reply { encoded: Some(writer.finish_frame()), memory: None }
    }

    fn parse<M: Message>(self, body: Bytes) -> Result<M, Close> {
        M::decode(body, self.version).map_err(|error| Close::Malformed { key: self.key, version: self.version, error })
    }
}

/// Begins a request. What must happen in the order of requests (an append's place in the log) has happened when this
/// returns; the rest happens when the answer is awaited.
pub(super) fn begin(
    broker: &Arc<Broker>,
    mut context: RequestContext,
    frame: Bytes,
) -> Result<BoxFuture<'static, Result<Reply, Close>>, Close> {
    let (header, body) = RequestHeader::decode(frame).map_err(Close::MalformedHeader)?;
    let version = header.api_version;
    let key = ApiKey::from_number(header.api_key).ok_or(Close::UnknownApi(header.api_key))?;
    let envelope = Envelope { key, version, correlation_id: header.correlation_id };
    context.api_version = version;
    context.client_id = header.client_id;

    let served = SERVED.iter().find(|(served, _)| *served == key).map(|(_, versions)| versions);
    match served {
        None => return Err(Close::UnknownApi(header.api_key)),
        Some(versions) if versions.contains(&version) => {}
        // The client cannot know yet what we serve: told in the oldest form (KIP-511).
        Some(_) if key == ApiKey::ApiVersions => {
            let reply = Envelope { version: 0, ..envelope }.seal(&super::api_versions::unsupported_version());
            return Ok(Box::pin(std::future::ready(Ok(reply))));
        }
        Some(_) => return Err(Close::UnknownVersion { key, version }),
    }
    route(broker.clone(), context, envelope, body)
}

macro_rules! served {
    (
        $( $special:ident $special_versions:expr, by $route:ident; )*
        ---
        $( $key:ident $versions:expr, $module:ident :: $request:ident; )*
    ) => {
        /// What is served, by ascending key within each half.
        pub const SERVED: &[(ApiKey, RangeInclusive<i16>)] = &[
            $( (ApiKey::$special, $special_versions), )*
            $( (ApiKey::$key, $versions), )*
        ];

        fn route(
            broker: Arc<Broker>,
            context: RequestContext,
            envelope: Envelope,
            body: Bytes,
        ) -> Result<BoxFuture<'static, Result<Reply, Close>>, Close> {
            match envelope.key {
                $( ApiKey::$special => $route(broker, context, envelope, body), )*
                $(
                    ApiKey::$key => {
                        let request: kafka_wire::$module::$request = envelope.parse(body)?;
                        Ok(Box::pin(async move {
                            let response = super::$module::handle(&broker, &context, request).await;
                            Ok(envelope.seal(&response))
                        }))
                    }
                )*
                #[allow(unreachable_patterns, reason = "reachable as long as an API that is decoded is not served")]
                other => Err(Close::UnknownApi(other as i16)),
            }
        }
    };
}

// A new API gets a line here when its handler is whole.
served! {
    // Below v3 only to be advertised: librdkafka takes compression for unsupported otherwise (KAFKA-18659).
    Produce 0..=11, by produce;
    Fetch 4..=17, by fetch;
    ---
    ListOffsets 1..=10, list_offsets::ListOffsetsRequest;
    Metadata 0..=13, metadata::MetadataRequest;
    ApiVersions 0..=4, api_versions::ApiVersionsRequest;
    InitProducerId 0..=5, init_producer_id::InitProducerIdRequest;
    OffsetForLeaderEpoch 2..=4, offset_for_leader_epoch::OffsetForLeaderEpochRequest;
    // From 0 on where librdkafka's feature map looks for it.
    FindCoordinator 0..=4, find_coordinator::FindCoordinatorRequest;
    JoinGroup 0..=9, join_group::JoinGroupRequest;
    SyncGroup 0..=5, sync_group::SyncGroupRequest;
    Heartbeat 0..=4, heartbeat::HeartbeatRequest;
    LeaveGroup 0..=5, leave_group::LeaveGroupRequest;
    OffsetCommit 2..=9, offset_commit::OffsetCommitRequest;
    OffsetFetch 1..=9, offset_fetch::OffsetFetchRequest;
    OffsetDelete 0..=0, offset_delete::OffsetDeleteRequest;
    DescribeGroups 0..=6, describe_groups::DescribeGroupsRequest;
    ListGroups 0..=5, list_groups::ListGroupsRequest;
    DeleteGroups 0..=2, delete_groups::DeleteGroupsRequest;
    CreateTopics 2..=7, create_topics::CreateTopicsRequest;
    DeleteTopics 1..=6, delete_topics::DeleteTopicsRequest;
    CreatePartitions 0..=3, create_partitions::CreatePartitionsRequest;
    DeleteRecords 0..=2, delete_records::DeleteRecordsRequest;
    DescribeConfigs 1..=4, describe_configs::DescribeConfigsRequest;
    AlterConfigs 0..=2, alter_configs::AlterConfigsRequest;
    IncrementalAlterConfigs 0..=1, incremental_alter_configs::IncrementalAlterConfigsRequest;
    DescribeCluster 0..=2, describe_cluster::DescribeClusterRequest;
}

/// Appends are begun here and awaited in the answer.
fn produce(
    broker: Arc<Broker>,
    context: RequestContext,
    envelope: Envelope,
    body: Bytes,
) -> Result<BoxFuture<'static, Result<Reply, Close>>, Close> {
    let begun = super::produce::begin(&broker, &context, envelope.parse(body)?);
    Ok(Box::pin(async move {
        match begun.answer().await {
            Ok(Some(response)) => Ok(envelope.seal(&response)),
            Ok(None) => Ok(Reply { encoded: None, memory: None }),
            Err(error) => Err(Close::SilentFailure(error)),
        }
    }))
}

/// The answer holds memory until it is sent.
fn fetch(
    broker: Arc<Broker>,
    context: RequestContext,
    envelope: Envelope,
    body: Bytes,
) -> Result<BoxFuture<'static, Result<Reply, Close>>, Close> {
    let request = envelope.parse(body)?;
    Ok(Box::pin(async move {
        let fetched = super::fetch::handle(&broker, &context, request).await;
        Ok(Reply { memory: fetched.memory, ..envelope.seal(&fetched.response) })
    }))
}
