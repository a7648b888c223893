//! Clients that others wrote. kcat of Debian carries librdkafka 2.0.2: an old client on purpose.

use std::io::Write as _;
use std::process::{Command, Stdio};

use super::*;

/// Runs kcat against the broker and returns what it prints. `None` where it is not installed: the system tests, which
/// install what they need, run it always.
async fn kcat(port: u16, arguments: &[&str], input: &str) -> Option<String> {
    let mut command = Command::new("kcat");
    command.args(["-b", &format!("127.0.0.1:{port}")]).args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let input = input.to_owned();
    let run = move || {
        let mut child = command.spawn().ok()?;
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kcat failed: {errors}");
        Some(String::from_utf8(output.stdout).unwrap())
    };
    tokio::task::spawn_blocking(run).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kcat_produces_and_consumes_with_every_codec() {
    let running = start().await;
    let input: String = (0..500).map(|n| format!("value {n}\n")).collect();
    for codec in ["none", "gzip", "snappy", "lz4", "zstd"] {
        for idempotence in ["true", "false"] {
            let topic = format!("{codec}-{idempotence}");
            let option = format!("enable.idempotence={idempotence}");
            let produced = kcat(running.port, &["-P", "-t", &topic, "-z", codec, "-X", &option], &input).await;
            if produced.is_none() {
                return eprintln!("kcat is not installed");
            }
            let consumed = kcat(running.port, &["-C", "-t", &topic, "-o", "beginning", "-e", "-q"], "").await;
            assert_eq!(consumed.as_deref(), Some(&input[..]), "{topic}");
            let last = kcat(running.port, &["-C", "-t", &topic, "-o", "-1", "-e", "-q"], "").await;
            assert_eq!(last.as_deref(), Some("value 499\n"), "{topic}");
        }
    }
    let listed = kcat(running.port, &["-L"], "").await.unwrap_or_default();
    assert!(listed.contains("topic \"zstd-true\" with 1 partitions"), "{listed}");
    let found = kcat(running.port, &["-Q", "-t", "none-true:0:0"], "").await.unwrap_or_default();
    assert!(found.contains("none-true [0] offset 0"), "{found}");
}
