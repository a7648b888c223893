//! Connections: order, bounds, and what comes from people who do not speak Kafka.

use kafka_wire::ErrorCode;
use kafka_wire::api_versions::{ApiVersionsRequest, ApiVersionsResponse};
use kafka_wire::fetch::{FetchPartition, FetchRequest, FetchResponse, FetchTopic};
use kafka_wire::metadata::{MetadataRequest, MetadataResponse};
use kafka_wire::produce::ProduceResponse;
use shared::log::Log as _;

use super::*;

fn nobody() -> ApiVersionsRequest {
    ApiVersionsRequest::default()
}

fn waiting_fetch(topic: &str, wait_ms: i32) -> FetchRequest {
    let partition = FetchPartition { partition_max_bytes: 1000, ..Default::default() };
    let topic = FetchTopic { topic: topic.into(), partitions: vec![partition], ..Default::default() };
    FetchRequest { max_wait_ms: wait_ms, min_bytes: 1, max_bytes: 1000, topics: vec![topic], ..Default::default() }
}

#[tokio::test]
async fn answers_come_in_the_order_of_the_questions() {
    let running = start().await;
    let id = running.topic("t", 1).await;
    running.topic("quiet", 1).await;
    let mut client = running.client().await;
    // Three appends, a wait, two more appends and a question, all sent before anything is read.
    let append = super::produce::request("t", -1, &[(0, batch(&[b"value"]).into_bytes())]);
    for _ in 0..3 {
        client.send(9, &append).await;
    }
    client.send(12, &waiting_fetch("quiet", 200)).await;
    client.send(9, &append).await;
    client.send(9, &append).await;
    client.send(9, &MetadataRequest { topics: Some(Vec::new()), ..Default::default() }).await;
    for expected in 0..3 {
        let (correlation_id, response): (_, ProduceResponse) = client.receive(9).await;
        assert_eq!(correlation_id, expected + 1);
        assert_eq!(response.responses[0].partition_responses[0].base_offset, expected as i64);
    }
    let partition = Partition { topic: id, index: 0 };
    assert_eq!(running.log.bounds(partition).unwrap().high_watermark, 3, "what is behind a Fetch waits with it");
    let (correlation_id, _): (_, FetchResponse) = client.receive(12).await;
    assert_eq!(correlation_id, 4);
    for expected in 5..7 {
        let (correlation_id, _): (_, ProduceResponse) = client.receive(9).await;
        assert_eq!(correlation_id, expected);
    }
    let (correlation_id, _): (_, MetadataResponse) = client.receive(9).await;
    assert_eq!(correlation_id, 7);
}

#[tokio::test]
async fn requests_may_come_byte_by_byte_or_many_at_once() {
    let running = start().await;
    let mut client = running.client().await;
    let frame = request_frame(1, 0, &nobody());
    for byte in &frame {
        client.stream.write_all(&[*byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    let (correlation_id, _): (_, ApiVersionsResponse) = client.receive(0).await;
    assert_eq!(correlation_id, 1);
    let many: Vec<u8> = (2..202).flat_map(|id| request_frame(id, 0, &nobody())).collect();
    client.stream.write_all(&many).await.unwrap();
    for expected in 2..202 {
        let (correlation_id, _): (_, ApiVersionsResponse) = client.receive(0).await;
        assert_eq!(correlation_id, expected);
    }
}

#[tokio::test]
async fn what_is_not_a_request_closes_the_connection_and_nothing_else() {
    let running = start().await;
    let mut good = running.client().await;
    let sized = |bytes: &[u8]| [&(bytes.len() as u32).to_be_bytes()[..], bytes].concat();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("http", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("tls", vec![0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]),
        ("negative size", vec![0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]),
        ("no size", vec![0; 64]),
        ("size of less than a header", sized(&[0, 18, 0, 0, 0, 0, 0])),
        ("more than is taken", vec![0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0]),
        ("more than is taken but for produce", vec![0x01, 0, 0, 0, 0, 3, 0, 0]),
        ("unknown key", sized(&[0, 99, 0, 0, 0, 0, 0, 1, 0xff, 0xff])),
        ("negative key", sized(&[0xff, 0xff, 0, 0, 0, 0, 0, 1, 0xff, 0xff])),
        ("unknown version", sized(&[0, 3, 0, 99, 0, 0, 0, 1, 0xff, 0xff, 0])),
        ("negative version", sized(&[0, 3, 0xff, 0xff, 0, 0, 0, 1, 0xff, 0xff])),
        ("header cut", sized(&[0, 3, 0, 1, 0, 0, 0, 1])),
        ("client id cut", sized(&[0, 3, 0, 1, 0, 0, 0, 1, 0, 9, b'x'])),
        ("body cut", sized(&[0, 3, 0, 1, 0, 0, 0, 1, 0xff, 0xff, 0, 0])),
        ("two billion topics", sized(&[0, 3, 0, 8, 0, 0, 0, 1, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff, 0])),
        ("name that is not text", sized(&[0, 3, 0, 1, 0, 0, 0, 1, 0xff, 0xff, 0, 0, 0, 1, 0, 1, 0xff])),
    ];
    for (what, bytes) in cases {
        let mut client = running.client().await;
        client.stream.write_all(&bytes).await.unwrap();
        assert!(client.is_closed().await, "{what}");
        let answer: ApiVersionsResponse = good.call(0, &nobody()).await;
        assert_eq!(answer.error_code, ErrorCode::NONE, "others go on after {what}");
    }
    assert_eq!(running.broker.status().request_memory_free_bytes, free_memory(&running));
}

fn free_memory(running: &Running) -> u64 {
    let settings = &running.broker.settings;
    let quarter = settings.memory_bytes_max / 4;
    (quarter + quarter.max(settings.request_bytes_max)) as u64
}

#[tokio::test]
async fn any_bytes_leave_the_broker_alive() {
    let running = start().await;
    running.topic("t", 1).await;
    let mut seed = 1u64;
    let mut number = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        seed >> 33
    };
    for _ in 0..300 {
        // A plausible header with noise behind it, so that the noise reaches the decoders.
        let (key, version) = (number() % 61, number() % 18);
        let mut body: Vec<u8> = vec![0, key as u8, 0, version as u8, 0, 0, 0, 1, 0xff, 0xff];
        body.extend((0..number() % 60).map(|_| if number() % 2 == 0 { 0 } else { number() as u8 }));
        let mut client = running.client().await;
        client.stream.write_u32(body.len() as u32).await.unwrap();
        client.stream.write_all(&body).await.unwrap();
    }
    let answer: ApiVersionsResponse = running.client().await.call(0, &nobody()).await;
    assert_eq!(answer.error_code, ErrorCode::NONE);
}

#[tokio::test]
async fn who_begins_a_request_must_finish_it() {
    let hurried = FrontSettings {
        transfer_timeout: Duration::from_millis(50),
        idle_timeout: Duration::from_secs(600),
        ..FrontSettings::default()
    };
    let running = start_with(hurried, MemoryLog::new(1000)).await;
    for part in [1, 3, 7, 20] {
        let mut client = running.client().await;
        let frame = request_frame(1, 0, &MetadataRequest { topics: Some(vec![]), ..Default::default() });
        client.stream.write_all(&frame[..part.min(frame.len() - 1)]).await.unwrap();
        assert!(client.is_closed().await, "{part} bytes");
    }
    assert_eq!(running.broker.status().request_memory_free_bytes, free_memory(&running));
}

#[tokio::test]
async fn who_says_nothing_is_dropped_after_the_idle_time_and_who_waits_is_not() {
    let hasty = FrontSettings { idle_timeout: Duration::from_millis(50), ..settings() };
    let running = start_with(hasty, MemoryLog::new(1000)).await;
    running.topic("t", 1).await;
    let mut waiting = running.client().await;
    waiting.send(12, &waiting_fetch("t", 400)).await;
    let mut silent = running.client().await;
    assert!(silent.is_closed().await);
    let (_, response): (_, FetchResponse) = waiting.receive(12).await;
    assert_eq!(response.error_code, ErrorCode::NONE);
}

#[tokio::test]
async fn more_connections_than_allowed_are_refused_until_one_ends() {
    let few = FrontSettings { connections_max: 2, ..settings() };
    let running = start_with(few, MemoryLog::new(1000)).await;
    let (mut one, mut two) = (running.client().await, running.client().await);
    let _: ApiVersionsResponse = one.call(0, &nobody()).await;
    let _: ApiVersionsResponse = two.call(0, &nobody()).await;
    assert!(running.client().await.is_closed().await);
    assert_eq!(running.broker.status().connections_refused, 1);
    drop(one);
    loop {
        let mut client = running.client().await;
        client.stream.write_all(&request_frame(1, 0, &nobody())).await.unwrap();
        if client.stream.read_u32().await.is_ok() {
            break;
        }
    }
}

#[tokio::test]
async fn the_longest_silent_connection_leaves_for_a_new_one() {
    let few = FrontSettings { connections_max: 3, ..settings() };
    let running = start_with(few, MemoryLog::new(1000)).await;
    let mut known = running.client().await;
    let _: ApiVersionsResponse = known.call(0, &nobody()).await;
    let (mut silent, mut half) = (running.client().await, running.client().await);
    half.stream.write_all(&[0, 0, 0, 9, 0]).await.unwrap();
    let mut new = running.client().await;
    let _: ApiVersionsResponse = new.call(0, &nobody()).await;
    assert!(silent.is_closed().await, "it was there first and said nothing");
    let mut newer = running.client().await;
    let _: ApiVersionsResponse = newer.call(0, &nobody()).await;
    assert!(half.is_closed().await, "half of a request is none");
    let _: ApiVersionsResponse = known.call(0, &nobody()).await;
    let status = running.broker.status();
    assert_eq!((status.connections_evicted, status.connections_refused), (2, 0));
}

#[tokio::test]
async fn a_connection_without_a_first_request_is_closed() {
    let hurried = FrontSettings { first_request_timeout: Duration::from_millis(100), ..settings() };
    let running = start_with(hurried, MemoryLog::new(1000)).await;
    for bytes in [&[][..], &[0], &[0, 0, 0, 20, 0]] {
        let mut client = running.client().await;
        client.stream.write_all(bytes).await.unwrap();
        assert!(client.is_closed().await, "{bytes:?}");
    }
    let mut slow = running.client().await;
    let _: ApiVersionsResponse = slow.call(0, &nobody()).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let _: ApiVersionsResponse = slow.call(0, &nobody()).await;
}

#[tokio::test]
async fn a_broker_that_stops_answers_what_it_has_begun() {
    let running = start().await;
    running.topic("t", 1).await;
    let mut idle = running.client().await;
    let _: ApiVersionsResponse = idle.call(0, &nobody()).await;
    let mut waiting = running.client().await;
    waiting.send(12, &waiting_fetch("t", 300)).await;
    while running.broker.status().requests < 2 {
        tokio::task::yield_now().await;
    }
    running.stop.send(true).unwrap();
    assert!(idle.is_closed().await);
    let (_, response): (_, FetchResponse) = waiting.receive(12).await;
    assert_eq!(response.error_code, ErrorCode::NONE);
    assert!(waiting.is_closed().await);
    running.task.await.unwrap();
}

#[tokio::test]
async fn a_few_that_lie_about_a_large_request_hold_up_nobody_else() {
    let running = start().await;
    running.topic("t", 1).await;
    let mut liars = Vec::new();
    for _ in 0..20 {
        let mut liar = running.client().await;
        liar.stream.write_all(&[0x06, 0, 0, 0, 0, 0, 0, 9]).await.unwrap();
        liars.push(liar);
    }
    let large = running.broker.settings.request_bytes_max as u64;
    while running.broker.status().request_memory_free_bytes > free_memory(&running) - large / 2 {
        tokio::task::yield_now().await;
    }
    let mut client = running.client().await;
    let answer = super::produce::produce(&mut client, "t", 0, batch_of(1_000_000).into_bytes()).await;
    assert_eq!(answer.error_code, ErrorCode::NONE);
}

#[tokio::test]
async fn a_slow_reader_of_a_large_answer_is_waited_for() {
    let hurried = FrontSettings { transfer_timeout: Duration::from_millis(100), ..FrontSettings::default() };
    let running = start_with(hurried, MemoryLog::new(64 << 20)).await;
    running.topic("t", 1).await;
    let mut client = running.client().await;
    for _ in 0..7 {
        super::produce::produce(&mut client, "t", 0, batch_of(1_000_000).into_bytes()).await;
    }
    let mut request = waiting_fetch("t", 0);
    (request.max_bytes, request.topics[0].partitions[0].partition_max_bytes) = (i32::MAX, i32::MAX);
    client.send(12, &request).await;
    // Longer than the transfer timeout, far less than the slowest rate allows for seven megabytes.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let (_, response): (_, FetchResponse) = client.receive(12).await;
    let records = response.responses[0].partitions[0].records.as_ref().unwrap();
    assert!(records.bytes() > 7_000_000, "{}", records.bytes());
}

#[tokio::test]
async fn tls_carries_the_same_protocol_and_a_plain_client_is_turned_away() {
    use rustls_pki_types::pem::PemObject as _;
    use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
    let certificate = rustls_pki_types::CertificateDer::from_pem_slice(CERTIFICATE.as_bytes()).unwrap();
    let key = rustls_pki_types::PrivateKeyDer::from_pem_slice(KEY.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = || rustls::ALL_VERSIONS;
    let server = ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(versions()).unwrap();
    let server = server.with_no_client_auth().with_single_cert(vec![certificate.clone()], key).unwrap();
    let running = start_tls(settings(), Arc::new(server)).await;

    let mut plain = running.client().await;
    plain.stream.write_all(&request_frame(1, 0, &nobody())).await.unwrap();
    let mut answer = Vec::new();
    plain.stream.read_to_end(&mut answer).await.ok();
    assert!(answer.len() < 16, "an alert at most");

    let mut roots = RootCertStore::empty();
    roots.add(certificate).unwrap();
    let client = ClientConfig::builder_with_provider(provider).with_protocol_versions(versions()).unwrap();
    let client = client.with_root_certificates(roots).with_no_client_auth();
    let name = rustls_pki_types::ServerName::try_from("localhost").unwrap();
    let stream = TcpStream::connect(("127.0.0.1", running.port)).await.unwrap();
    let mut stream = tokio_rustls::TlsConnector::from(Arc::new(client)).connect(name, stream).await.unwrap();
    stream.write_all(&request_frame(7, 0, &nobody())).await.unwrap();
    let size = stream.read_u32().await.unwrap();
    assert_eq!((stream.read_i32().await.unwrap(), stream.read_i16().await.unwrap()), (7, 0));
    assert!(size > 10);
}

/// For `localhost`, of this test alone: `openssl req -x509 -newkey ec -days 36500`.
const CERTIFICATE: &str = "\
-----BEGIN CERTIFICATE-----
MIIBkTCCATigAwIBAgIUTRysffI4jLseH9yHosBQqdvRb4MwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMjAzMzIxOFoYDzIxMjYxMDI5
MDMzMjE4WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAQhduIKuPT+dF8jg8OlILRsBI+fzWqD8GswgjHsEo4RJgXANI0tzAKS
Mt9bTDY1y/lHimGktnOgRD9V+nsO972Lo2YwZDAdBgNVHQ4EFgQU+D1Az065Oqnb
73R+4wz1E0fRPR4wHwYDVR0jBBgwFoAU+D1Az065Oqnb73R+4wz1E0fRPR4wFAYD
VR0RBA0wC4IJbG9jYWxob3N0MAwGA1UdEwEB/wQCMAAwCgYIKoZIzj0EAwIDRwAw
RAIgRBzVTWf1OfAWtGoUsFrJXpGjLDFr70+2bXxXvgtvugECIAgfr0SwQfDvzpP+
ctCxqe60ZksaJskdO2t4uz/KG6Ez
-----END CERTIFICATE-----
";
const KEY: &str = "\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgqCZeliAwzVwRhPh5
93AnDBJ0XWbS2Y0M7bu/pUVzaKOhRANCAAQhduIKuPT+dF8jg8OlILRsBI+fzWqD
8GswgjHsEo4RJgXANI0tzAKSMt9bTDY1y/lHimGktnOgRD9V+nsO972L
-----END PRIVATE KEY-----
";
