//! A bare Kafka client for what libraries hide: raw record batches and their checksums, offsets without a group, and the
//! very moment of a producer's acknowledgement. Metadata v1, Produce v3, ListOffsets v1 and Fetch v4 are the oldest
//! versions that modern brokers still serve.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A batch's identity wherever it lies: its CRC-32C (which covers all but the 12 bytes that a log patches) and length.
pub type BatchId = (u32, u32);

/// Bytes of a batch before its records.
const HEADER: usize = 61;

/// One record batch as a Fetch returned it.
#[derive(Debug, Clone)]
pub struct RawBatch {
    pub base_offset: i64,
    pub last_offset: i64,
    pub leader_epoch: i32,
    pub id: BatchId,
}

/// A connection to one broker.
pub struct Client {
    socket: TcpStream,
    correlation: i32,
}

impl Client {
    pub async fn connect(address: SocketAddr) -> Result<Self> {
        let socket = TcpStream::connect(address).await?;
        socket.set_nodelay(true)?;
        Ok(Self { socket, correlation: 0 })
    }

    async fn call(&mut self, key: i16, version: i16, body: &[u8]) -> Result<Bytes> {
        self.correlation += 1;
        let mut request = BytesMut::new();
        request.put_i32(0);
        request.put_i16(key);
        request.put_i16(version);
        request.put_i32(self.correlation);
        put_string(&mut request, "system-tests");
        request.put_slice(body);
        let length = (request.len() - 4) as i32;
        request[..4].copy_from_slice(&length.to_be_bytes());
        let exchange = async {
            self.socket.write_all(&request).await?;
            let length = self.socket.read_i32().await?;
            let mut answer = vec![0; usize::try_from(length).context("negative length")?];
            self.socket.read_exact(&mut answer).await?;
            anyhow::Ok(Bytes::from(answer))
        };
        let mut answer =
            tokio::time::timeout(Duration::from_secs(60), exchange).await.context("broker is silent")??;
        if answer.len() < 4 || answer.get_i32() != self.correlation {
            bail!("answer to another request");
        }
        Ok(answer)
    }

    /// Number of partitions; `None` when there is no such topic.
    pub async fn partitions(&mut self, topic: &str) -> Result<Option<i32>> {
        // All topics: naming one would create it.
        let mut answer = self.call(3, 1, &(-1_i32).to_be_bytes()).await?;
        let brokers = i32_of(&mut answer)?;
        for _ in 0..brokers {
            i32_of(&mut answer)?;
            string_of(&mut answer)?;
            i32_of(&mut answer)?;
            string_of(&mut answer)?;
        }
        i32_of(&mut answer)?;
        let topics = i32_of(&mut answer)?;
        let mut found = None;
        for _ in 0..topics {
            let error = i16_of(&mut answer)?;
            let name = string_of(&mut answer)?;
            take(&mut answer, 1)?;
            let partitions = i32_of(&mut answer)?;
            for _ in 0..partitions {
                i16_of(&mut answer)?;
                i32_of(&mut answer)?;
                i32_of(&mut answer)?;
                for _ in 0..2 {
                    let nodes = i32_of(&mut answer)?;
                    take(&mut answer, usize::try_from(nodes)? * 4)?;
                }
            }
            if error == 0 && name.as_deref() == Some(topic) {
                found = Some(partitions);
            }
        }
        Ok(found)
    }

    /// Names a topic, which creates it where that is allowed.
    pub async fn touch(&mut self, topic: &str) -> Result<()> {
        let mut body = BytesMut::new();
        body.put_i32(1);
        put_string(&mut body, topic);
        self.call(3, 1, &body).await.map(drop)
    }

    /// Produces one record to partition 0 with `acks=all`; returns its offset. An error code is an error.
    pub async fn produce(&mut self, topic: &str, value: &[u8]) -> Result<i64> {
        match self.try_produce(topic, value, 30_000).await? {
            Ok(offset) => Ok(offset),
            Err(code) => bail!("Produce to {topic}: error {code}"),
        }
    }

    /// Produces one record to partition 0 with `acks=all`, to be answered within `timeout_ms`; returns its offset or the
    /// broker's error code.
    pub async fn try_produce(&mut self, topic: &str, value: &[u8], timeout_ms: i32) -> Result<Result<i64, i16>> {
        let batch = batch_of_one(value);
        let mut body = BytesMut::new();
        body.put_i16(-1); // no transaction
        body.put_i16(-1); // acks=all
        body.put_i32(timeout_ms);
        body.put_i32(1);
        put_string(&mut body, topic);
        body.put_i32(1);
        body.put_i32(0);
        body.put_i32(batch.len() as i32);
        body.put_slice(&batch);
        let mut answer = self.call(0, 3, &body).await?;
        i32_of(&mut answer)?;
        string_of(&mut answer)?;
        i32_of(&mut answer)?;
        i32_of(&mut answer)?;
        let error = i16_of(&mut answer)?;
        let offset = take(&mut answer, 8)?.get_i64();
        Ok(if error == 0 { Ok(offset) } else { Err(error) })
    }

    /// Offset at a time: -1 is the end (high watermark), -2 the log start.
    pub async fn list_offset(&mut self, topic: &str, partition: i32, at: i64) -> Result<i64> {
        let mut body = BytesMut::new();
        body.put_i32(-1);
        body.put_i32(1);
        put_string(&mut body, topic);
        body.put_i32(1);
        body.put_i32(partition);
        body.put_i64(at);
        let mut answer = self.call(2, 1, &body).await?;
        i32_of(&mut answer)?;
        string_of(&mut answer)?;
        i32_of(&mut answer)?;
        i32_of(&mut answer)?;
        let error = i16_of(&mut answer)?;
        if error != 0 {
            bail!("ListOffsets of {topic}-{partition}: error {error}");
        }
        take(&mut answer, 8)?;
        Ok(take(&mut answer, 8)?.get_i64())
    }

    /// Sum over partitions of (end - start).
    pub async fn records(&mut self, topic: &str) -> Result<i64> {
        let mut sum = 0;
        for partition in 0..self.partitions(topic).await?.unwrap_or(0) {
            sum += self.list_offset(topic, partition, -1).await? - self.list_offset(topic, partition, -2).await?;
        }
        Ok(sum)
    }

    /// Every batch of a topic, from the log start to the end at the time of the call. Checks each CRC and that offsets
    /// go on without a hole unless the leader epoch rises.
    pub async fn batches(&mut self, topic: &str) -> Result<Vec<RawBatch>> {
        let mut all = Vec::new();
        for partition in 0..self.partitions(topic).await?.unwrap_or(0) {
            let end = self.list_offset(topic, partition, -1).await?;
            let mut next = self.list_offset(topic, partition, -2).await?;
            let mut epoch = 0;
            while next < end {
                let bytes = self.fetch(topic, partition, next).await?;
                let batches = parse_batches(&bytes).with_context(|| format!("{topic}-{partition} from {next}"))?;
                if batches.is_empty() {
                    bail!("Fetch of {topic}-{partition} at {next} below the end {end} returned nothing");
                }
                for batch in batches {
                    if batch.last_offset < next {
                        continue;
                    }
                    if batch.base_offset != next && epoch >= batch.leader_epoch {
                        bail!("{topic}-{partition}: a batch begins at {} where {next} was expected", batch.base_offset);
                    }
                    next = batch.last_offset + 1;
                    epoch = batch.leader_epoch;
                    all.push(batch);
                }
            }
        }
        Ok(all)
    }

    async fn fetch(&mut self, topic: &str, partition: i32, from: i64) -> Result<Bytes> {
        let mut body = BytesMut::new();
        body.put_i32(-1); // replica
        body.put_i32(1_000); // max wait
        body.put_i32(1); // min bytes
        body.put_i32(16 << 20);
        body.put_i8(0); // read uncommitted
        body.put_i32(1);
        put_string(&mut body, topic);
        body.put_i32(1);
        body.put_i32(partition);
        body.put_i64(from);
        body.put_i32(8 << 20);
        let mut answer = self.call(1, 4, &body).await?;
        i32_of(&mut answer)?; // throttle
        i32_of(&mut answer)?; // topics
        string_of(&mut answer)?;
        i32_of(&mut answer)?; // partitions
        i32_of(&mut answer)?;
        let error = i16_of(&mut answer)?;
        if error != 0 {
            bail!("Fetch of {topic}-{partition} at {from}: error {error}");
        }
        take(&mut answer, 16)?; // high watermark, last stable offset
        let aborted = i32_of(&mut answer)?;
        take(&mut answer, usize::try_from(aborted.max(0))? * 16)?;
        let length = i32_of(&mut answer)?;
        take(&mut answer, usize::try_from(length.max(0))?)
    }
}

/// A record batch that holds one record without key and headers, of no idempotent producer.
fn batch_of_one(value: &[u8]) -> Vec<u8> {
    // Attributes, timestamp delta and offset delta are 0, the key's length is -1.
    let mut record = vec![0, 0, 0, 1];
    put_varint(&mut record, value.len());
    record.extend_from_slice(value);
    record.push(0);
    let now_ms = crate::lab::now_ms();
    let mut covered = Vec::new();
    covered.put_i16(0); // attributes
    covered.put_i32(0); // last offset delta
    covered.put_i64(now_ms);
    covered.put_i64(now_ms);
    covered.put_i64(-1); // producer id
    covered.put_i16(-1);
    covered.put_i32(-1);
    covered.put_i32(1);
    put_varint(&mut covered, record.len());
    covered.extend_from_slice(&record);
    let mut batch = Vec::new();
    batch.put_i64(0);
    batch.put_i32((covered.len() + 9) as i32);
    batch.put_i32(-1);
    batch.put_i8(2);
    batch.put_u32(crc32c::crc32c(&covered));
    batch.extend_from_slice(&covered);
    batch
}

/// A length as a zigzag varint, as records have them.
fn put_varint(out: &mut Vec<u8>, length: usize) {
    let mut rest = length << 1;
    while rest >= 128 {
        out.push(rest as u8 | 128);
        rest >>= 7;
    }
    out.push(rest as u8);
}

/// All whole batches of a record set; a cut one at the end is legal and left out. Wrong bytes are an error.
fn parse_batches(bytes: &[u8]) -> Result<Vec<RawBatch>> {
    let mut batches = Vec::new();
    let mut rest = bytes;
    while rest.len() >= HEADER {
        let Some(length) = whole_length(rest) else {
            let claimed = i32::from_be_bytes([rest[8], rest[9], rest[10], rest[11]]);
            if claimed >= 0 && 12 + claimed as usize > rest.len() {
                break;
            }
            bail!("no valid batch of magic 2 with a right CRC");
        };
        let mut at = rest;
        let base_offset = at.get_i64();
        at.advance(4);
        let leader_epoch = at.get_i32();
        at.advance(1);
        let crc = at.get_u32();
        at.advance(2);
        let last_delta = at.get_i32();
        let id = (crc, length as u32);
        batches.push(RawBatch { base_offset, last_offset: base_offset + i64::from(last_delta), leader_epoch, id });
        rest = &rest[length..];
    }
    Ok(batches)
}

/// Length of the batch at the front of `bytes` if it is whole and its CRC is right.
fn whole_length(bytes: &[u8]) -> Option<usize> {
    let head = bytes.get(..HEADER)?;
    let length = 12 + usize::try_from(i32::from_be_bytes([head[8], head[9], head[10], head[11]])).ok()?;
    if head[16] != 2 || length < HEADER || length > bytes.len() {
        return None;
    }
    let crc = u32::from_be_bytes([head[17], head[18], head[19], head[20]]);
    (crc32c::crc32c(&bytes[21..length]) == crc).then_some(length)
}

/// Every batch that lies somewhere in `bytes`, whatever surrounds it: found by its shape and proven by its CRC.
pub fn batches_within(bytes: &[u8]) -> HashSet<BatchId> {
    let mut found = HashSet::new();
    let mut at = 0;
    while at + HEADER <= bytes.len() {
        // Length below 16 MiB, magic 2, attributes below 256: cheap tests before the checksum.
        let plausible = bytes[at + 16] == 2 && bytes[at + 8] == 0 && bytes[at + 21] == 0;
        if let (true, Some(length)) = (plausible, whole_length(&bytes[at..])) {
            let crc = u32::from_be_bytes([bytes[at + 17], bytes[at + 18], bytes[at + 19], bytes[at + 20]]);
            found.insert((crc, length as u32));
            at += length;
        } else {
            at += 1;
        }
    }
    found
}

fn put_string(out: &mut BytesMut, text: &str) {
    out.put_i16(text.len() as i16);
    out.put_slice(text.as_bytes());
}

fn take(from: &mut Bytes, n: usize) -> Result<Bytes> {
    if from.len() < n {
        bail!("answer is cut");
    }
    Ok(from.split_to(n))
}

fn i16_of(from: &mut Bytes) -> Result<i16> {
    Ok(take(from, 2)?.get_i16())
}

fn i32_of(from: &mut Bytes) -> Result<i32> {
    Ok(take(from, 4)?.get_i32())
}

fn string_of(from: &mut Bytes) -> Result<Option<String>> {
    let length = i16_of(from)?;
    if length < 0 {
        return Ok(None);
    }
    Ok(Some(String::from_utf8_lossy(&take(from, length as usize)?).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(records: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        bytes[8..12].copy_from_slice(&((HEADER - 12 + records.len()) as i32).to_be_bytes());
        bytes[16] = 2;
        bytes.extend_from_slice(records);
        let crc = crc32c::crc32c(&bytes[21..]);
        bytes[17..21].copy_from_slice(&crc.to_be_bytes());
        bytes
    }

    #[test]
    fn batches_are_found_between_other_bytes_and_after_patching() {
        let (a, mut b) = (batch(b"first"), batch(b"second"));
        let mut noise = b"POST / HTTP/1.1\r\n\r\n\x01\x02\x02".to_vec();
        noise.extend_from_slice(&a);
        noise.extend_from_slice(&[2; 70]);
        noise.extend_from_slice(&b);
        let found = batches_within(&noise);
        assert_eq!(found.len(), 2);
        b[..8].copy_from_slice(&77_i64.to_be_bytes());
        b[12..16].copy_from_slice(&3_i32.to_be_bytes());
        let parsed = parse_batches(&b).expect("patched outside the CRC");
        assert_eq!(parsed[0].base_offset, 77);
        assert!(found.contains(&parsed[0].id));
        b[30] ^= 1;
        assert!(parse_batches(&b).is_err());
    }
}
