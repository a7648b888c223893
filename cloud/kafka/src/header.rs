//! Request and response headers, and which API is which number.
//!
//! ```text
//! request   v1: api_key i16, api_version i16, correlation_id i32, client_id nullable string (i16 length)
//!           v2: the same, then tagged fields           - with flexible versions of an API
//! response  v0: correlation_id i32
//!           v1: the same, then tagged fields           - with flexible versions, except ApiVersions (KIP-511)
//! ```
//! The client id keeps its i16 length in v2 (KIP-482): a broker must be able to read it without knowing the version.

use bytes::Bytes;

use crate::codec::{Field, Reader, WireError, Writer};

macro_rules! api_keys {
    ($($name:ident = $key:literal, flexible $flexible:literal..;)*) => {
        /// The APIs this crate knows.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[allow(missing_docs, reason = "the names are Kafka's")]
        #[repr(i16)]
        pub enum ApiKey {
            $( $name = $key, )*
        }

        impl ApiKey {
            /// All of them.
            pub const ALL: &[Self] = &[$( Self::$name, )*];

            /// The API with this number.
            pub fn from_number(key: i16) -> Option<Self> {
                match key {
                    $( $key => Some(Self::$name), )*
                    _ => None,
                }
            }

            /// The first flexible version (KIP-482).
            pub fn flexible_from(self) -> i16 {
                match self {
                    $( Self::$name => $flexible, )*
                }
            }
        }
    };
}

api_keys! {
    Produce = 0, flexible 9..;
    Fetch = 1, flexible 12..;
    ListOffsets = 2, flexible 6..;
    Metadata = 3, flexible 9..;
    OffsetCommit = 8, flexible 8..;
    OffsetFetch = 9, flexible 6..;
    FindCoordinator = 10, flexible 3..;
    JoinGroup = 11, flexible 6..;
    Heartbeat = 12, flexible 4..;
    LeaveGroup = 13, flexible 4..;
    SyncGroup = 14, flexible 4..;
    DescribeGroups = 15, flexible 5..;
    ListGroups = 16, flexible 3..;
    ApiVersions = 18, flexible 3..;
    CreateTopics = 19, flexible 5..;
    DeleteTopics = 20, flexible 4..;
    DeleteRecords = 21, flexible 2..;
    InitProducerId = 22, flexible 2..;
    OffsetForLeaderEpoch = 23, flexible 4..;
    DescribeConfigs = 32, flexible 4..;
    AlterConfigs = 33, flexible 2..;
    CreatePartitions = 37, flexible 2..;
    DeleteGroups = 42, flexible 2..;
    IncrementalAlterConfigs = 44, flexible 1..;
    OffsetDelete = 47, flexible 32767..;
    DescribeCluster = 60, flexible 0..;
}

impl ApiKey {
    /// Whether requests of this version have tagged fields in their header and compact lengths in their body.
    pub fn is_flexible(self, version: i16) -> bool {
        version >= self.flexible_from()
    }
}

/// What stands before every request's body.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RequestHeader {
    /// The API's number, known to us or not.
    pub api_key: i16,
    /// The version the rest is written in.
    pub api_version: i16,
    /// Returned in the response's header.
    pub correlation_id: i32,
    /// What the client calls itself.
    pub client_id: Option<String>,
}

impl RequestHeader {
    /// Takes the header off the front of a frame and leaves the body. Of an API or version we do not know, only the
    /// first eight bytes are read, which never change.
    pub fn decode(frame: Bytes) -> Result<(Self, Bytes), WireError> {
        let mut reader = Reader::new(frame, 0, false);
        let mut header = Self {
            api_key: Field::read(&mut reader)?,
            api_version: Field::read(&mut reader)?,
            correlation_id: Field::read(&mut reader)?,
            client_id: None,
        };
        if let Some(key) = ApiKey::from_number(header.api_key) {
            header.client_id = Field::read(&mut reader)?;
            if key.is_flexible(header.api_version) {
                reader.tagged(|_, _| Ok(()))?;
            }
        }
        Ok((header, reader.into_rest()))
    }

    /// Writes the header: what clients need.
    pub fn encode(&self, writer: &mut Writer) {
        self.api_key.write(writer);
        self.api_version.write(writer);
        self.correlation_id.write(writer);
        writer.put_classic_string(self.client_id.as_deref());
        if ApiKey::from_number(self.api_key).is_some_and(|key| key.is_flexible(self.api_version)) {
            writer.tagged(&[]);
        }
    }
}

/// Writes a response's header.
pub fn encode_response_header(key: ApiKey, version: i16, correlation_id: i32, writer: &mut Writer) {
    correlation_id.write(writer);
    if key.is_flexible(version) && key != ApiKey::ApiVersions {
        writer.tagged(&[]);
    }
}

/// Reads a response's header and returns its correlation id: what clients need.
pub fn decode_response_header(key: ApiKey, version: i16, reader: &mut Reader) -> Result<i32, WireError> {
    let correlation_id = Field::read(reader)?;
    if key.is_flexible(version) && key != ApiKey::ApiVersions {
        reader.tagged(|_, _| Ok(()))?;
    }
    Ok(correlation_id)
}
