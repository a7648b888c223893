//! A small Kafka client, as far as sending batches in order needs one: one connection, one request at a time.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kafka_wire::codec::Message;
use kafka_wire::fetch::{FetchPartition, FetchRequest, FetchResponse, FetchTopic};
use kafka_wire::init_producer_id::{InitProducerIdRequest, InitProducerIdResponse};
use kafka_wire::metadata::{MetadataRequest, MetadataResponse};
use kafka_wire::produce::{PartitionProduceData, ProduceRequest, ProduceResponse, TopicProduceData};
use kafka_wire::{ApiKey, Encoded, ErrorCode, Reader, RequestHeader, Writer, header};
use rustls_pki_types::ServerName;
use shared::name::Offset;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Largest answer that is read.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Most bytes of one Fetch.
const FETCH_BYTES: i32 = 4 << 20;

/// Where to connect to.
#[derive(Debug, Clone)]
pub struct KafkaTarget {
    /// `HOST:PORT`.
    pub address: String,
    /// Certificates to trust, in PEM; plain without.
    pub ca_file: Option<PathBuf>,
}

/// Why the new owner could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection, or it broke.
    #[error("{address}: {reason}")]
    Connection {
        /// Where to.
        address: String,
        /// What happened.
        reason: String,
    },
    /// It answered what it should not.
    #[error("{address} answered {api:?} with what is no answer: {reason}")]
    Answer {
        /// Who.
        address: String,
        /// What was asked.
        api: ApiKey,
        /// What is wrong.
        reason: String,
    },
    /// It refused.
    #[error("{address} answered {api:?} with {code}")]
    Refused {
        /// Who.
        address: String,
        /// What was asked.
        api: ApiKey,
        /// The error.
        code: ErrorCode,
    },
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// What a Fetch brought.
#[derive(Debug, Default)]
pub struct FetchedBatches {
    /// Batches, as stored.
    pub records: Bytes,
    /// The end of the partition.
    pub high_watermark: Offset,
    /// Its beginning.
    pub log_start: Offset,
    /// What was wrong.
    pub code: ErrorCode,
}

/// A client with at most one connection, which is made when it is needed.
pub struct KafkaClient {
    target: KafkaTarget,
    stream: Option<Box<dyn Stream>>,
    correlation: i32,
}

impl KafkaClient {
    /// Of the broker at `target`.
    pub fn new(target: KafkaTarget) -> Self {
        Self { target, stream: None, correlation: 0 }
    }

    fn broken(&self, reason: impl ToString) -> ClientError {
        ClientError::Connection { address: self.target.address.clone(), reason: reason.to_string() }
    }

    fn refused(&self, api: ApiKey, code: ErrorCode) -> ClientError {
        ClientError::Refused { address: self.target.address.clone(), api, code }
    }

    async fn connect(&self) -> Result<Box<dyn Stream>, ClientError> {
        let socket = TcpStream::connect(&self.target.address).await.map_err(|error| self.broken(error))?;
        socket.set_nodelay(true).map_err(|error| self.broken(error))?;
        let Some(ca_file) = &self.target.ca_file else { return Ok(Box::new(socket)) };
        let mut roots = rustls::RootCertStore::empty();
        for certificate in daemon::tls::certificates(ca_file).map_err(|error| self.broken(format!("{error:#}")))? {
            roots.add(certificate).map_err(|error| self.broken(error))?;
        }
        let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let host = self.target.address.rsplit_once(':').map_or(&self.target.address[..], |(host, _)| host);
        let name = ServerName::try_from(host.to_owned()).map_err(|error| self.broken(error))?;
        let stream = TlsConnector::from(Arc::new(config)).connect(name, socket).await;
        Ok(Box::new(stream.map_err(|error| self.broken(error))?))
    }

    async fn call<Q: Message, A: Message>(&mut self, version: i16, request: &Q) -> Result<A, ClientError> {
        let exchanged = tokio::time::timeout(PATIENCE, self.exchange::<Q>(version, request)).await;
        let answer = match exchanged {
            Ok(answer) => answer,
            Err(_) => Err(self.broken(format!("no answer within {PATIENCE:?}"))),
        };
        let decoded = answer.and_then(|bytes| {
            let wrong =
                |reason: String| ClientError::Answer { address: self.target.address.clone(), api: Q::KEY, reason };
            let mut reader = Reader::new(bytes, version, Q::KEY.is_flexible(version));
            let correlation = header::decode_response_header(Q::KEY, version, &mut reader);
            let correlation = correlation.map_err(|error| wrong(error.to_string()))?;
            if correlation != self.correlation {
                return Err(wrong("it is of another request".into()));
            }
            A::decode(reader.into_rest(), version).map_err(|error| wrong(error.to_string()))
        });
        if decoded.is_err() {
            // What comes next on it would be of this request.
            self.stream = None;
        }
        decoded
    }

    async fn exchange<Q: Message>(&mut self, version: i16, request: &Q) -> Result<Bytes, ClientError> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => self.connect().await?,
        };
        self.correlation = self.correlation.wrapping_add(1);
        let mut writer = Writer::frame(version, Q::KEY.is_flexible(version));
        let api_key = Q::KEY as i16;
        let client_id = Some("tributary-salvage".to_owned());
        RequestHeader { api_key, api_version: version, correlation_id: self.correlation, client_id }
            .encode(&mut writer);
        request.write(&mut writer);
        let Encoded { chunks, .. } = writer.finish_frame();
        for chunk in chunks {
            stream.write_all(&chunk).await.map_err(|error| self.broken(error))?;
        }
        stream.flush().await.map_err(|error| self.broken(error))?;
        let length = stream.read_u32().await.map_err(|error| self.broken(error))? as usize;
        if length > ANSWER_BYTES_MAX {
            return Err(self.broken(format!(
                "an answer of {length} bytes: is this a Kafka listener, and plain or TLS as expected?"
            )));
        }
        // Grows with what comes, and not on the word of a length.
        let mut answer = Vec::new();
        let read =
            (&mut stream).take(length as u64).read_to_end(&mut answer).await.map_err(|error| self.broken(error))?;
        if read < length {
            return Err(self.broken("the answer was cut"));
        }
        self.stream = Some(stream);
        Ok(answer.into())
    }

    /// The id of the system that the broker belongs to.
    pub async fn cluster_id(&mut self) -> Result<Option<String>, ClientError> {
        let request =
            MetadataRequest { topics: Some(Vec::new()), allow_auto_topic_creation: false, ..Default::default() };
        let answer: MetadataResponse = self.call(8, &request).await?;
        Ok(answer.cluster_id)
    }

    /// An identity, by which the broker tells a batch that is sent again.
    pub async fn producer_id(&mut self) -> Result<(i64, i16), ClientError> {
        let request = InitProducerIdRequest { transaction_timeout_ms: 60_000, ..Default::default() };
        let answer: InitProducerIdResponse = self.call(1, &request).await?;
        if answer.error_code.is_error() {
            return Err(self.refused(ApiKey::InitProducerId, answer.error_code));
        }
        Ok((answer.producer_id, answer.producer_epoch))
    }

    /// Sends one batch, and returns what the broker said of it: `NONE` if it is durable.
    pub async fn produce(
        &mut self,
        topic: &str,
        index: i32,
        batch: Bytes,
    ) -> Result<(ErrorCode, Option<String>), ClientError> {
        let data = PartitionProduceData { index, records: Some(batch) };
        let request = ProduceRequest {
            acks: -1,
            timeout_ms: 30_000,
            topic_data: vec![TopicProduceData { name: topic.to_owned(), partition_data: vec![data] }],
            ..Default::default()
        };
        let answer: ProduceResponse = self.call(8, &request).await?;
        let found = answer.responses.into_iter().flat_map(|topic| topic.partition_responses).next();
        let found = found.ok_or_else(|| ClientError::Answer {
            address: self.target.address.clone(),
            api: ApiKey::Produce,
            reason: "it names no partition".into(),
        })?;
        Ok((found.error_code, found.error_message))
    }

    /// Batches of a partition from an offset on.
    pub async fn fetch(&mut self, topic: &str, index: i32, from: Offset) -> Result<FetchedBatches, ClientError> {
        let partition = FetchPartition {
            partition: index,
            fetch_offset: from,
            partition_max_bytes: FETCH_BYTES,
            ..Default::default()
        };
        let request = FetchRequest {
            max_wait_ms: 0,
            min_bytes: 0,
            max_bytes: FETCH_BYTES,
            topics: vec![FetchTopic { topic: topic.to_owned(), partitions: vec![partition], ..Default::default() }],
            ..Default::default()
        };
        let answer: FetchResponse = self.call(10, &request).await?;
        if answer.error_code.is_error() {
            return Err(self.refused(ApiKey::Fetch, answer.error_code));
        }
        let found = answer.responses.into_iter().flat_map(|topic| topic.partitions).next().unwrap_or_default();
        Ok(FetchedBatches {
            records: found.records.unwrap_or_default().0.concat().into(),
            high_watermark: found.high_watermark,
            log_start: found.log_start_offset,
            code: found.error_code,
        })
    }
}
