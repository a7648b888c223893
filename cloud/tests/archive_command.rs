//! `tributary-cloud archive` as a process: exit codes, where it looks, and a reader that goes away.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use cloud::archive::{Archive, ArchiveSettings};
use cloud::shard::{LocalWal, Shard, ShardSettings};
use cloud::state::{Change, StateLog, Topic};
use cloud::wal::memory::MemoryWal;
use shared::log::Log;
use shared::log::conformance::{from_producer, sized};
use shared::name::{Partition, TopicId, TopicName};
use tokio::sync::oneshot;

const RECORDS: usize = 400;

/// Makes an archive where a node with this data directory has it, all of it in the shipped log and in segments.
fn make_archive(data_dir: &Path) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let settings = ArchiveSettings {
            url: Some(format!("file://{}/archive", data_dir.display())),
            data_dir: data_dir.to_owned(),
            max_lag: Duration::from_millis(4),
            segment_age: Duration::from_secs(3600),
            ..ArchiveSettings::default()
        };
        let archive = Archive::open(settings).await.unwrap();
        let wal = MemoryWal::new(64 << 20);
        let recovered = archive.recover(&LocalWal(&wal)).await.unwrap();
        let (cold, clock) = (Some(archive.cold()), Arc::new(|| 1));
        let shard = Shard::open(ShardSettings::default(), Box::new(wal), recovered, cold, clock).unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(archive.clone().run(shard.clone(), async {
            let _ = stopped.await;
        }));
        let id = TopicId([1; 16]);
        let name = TopicName::parse("letters").unwrap();
        let topic = Topic { id, name, partitions: 1, configs: Default::default(), created_ms: 0 };
        shard.commit(vec![Change::created(topic)]).await.unwrap();
        for _ in 0..RECORDS {
            shard.append(from_producer(Partition { topic: id, index: 0 }, sized(10_000))).await.unwrap();
        }
        archive.roll_now();
        while archive.status().split_seq == 0 {
            tokio::task::yield_now().await;
        }
        // Stopping ships what is left.
        drop(stop);
        task.await.unwrap();
        shard.close();
    });
}

fn archive(arguments: &[&str], data_dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tributary-cloud"));
    command.arg("archive").args(arguments).arg("--data-dir").arg(data_dir);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn said(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn exit_codes_tell_clean_from_damaged_from_not_checked() {
    let dir = tempfile::tempdir().unwrap();
    make_archive(dir.path());
    let (code, out, err) = said(&archive(&["verify"], dir.path()).output().unwrap());
    assert_eq!((code, out.as_str()), (Some(0), ""), "{err}");
    assert!(err.contains(" objects, ") && err.contains("0 findings"), "{err}");
    let (code, out, err) = said(&archive(&["ls"], dir.path()).output().unwrap());
    assert_eq!(code, Some(0), "{err}");
    assert!(out.lines().any(|line| line.starts_with("letters  0  ") && line.contains("  400  ")), "{out}");

    let segments = dir.path().join("archive/shards/0/segments");
    let segment = std::fs::read_dir(&segments).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    let (code, out, err) = said(&archive(&["verify"], dir.path()).output().unwrap());
    assert_eq!(code, Some(1), "{err}");
    assert!(out.contains(segment.file_name().unwrap().to_str().unwrap()) && out.contains("at byte 0"), "{out}");

    let nowhere = dir.path().join("nowhere");
    let (code, _, err) = said(&archive(&["verify"], &nowhere).output().unwrap());
    assert_eq!(code, Some(2), "{err}");
    assert!(!nowhere.exists(), "looking makes nothing");
}

#[test]
fn a_reader_that_goes_away_ends_cat_cleanly() {
    let dir = tempfile::tempdir().unwrap();
    make_archive(dir.path());
    let mut child = archive(&["cat", "letters"], dir.path()).spawn().unwrap();
    let mut reader = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(line.contains("\"offset\":0"), "{}", &line[..80]);
    drop(reader);
    let (code, _, err) = said(&child.wait_with_output().unwrap());
    assert_eq!((code, err.as_str()), (Some(0), ""));
    // All of it, for one who stays: four megabytes.
    let (code, out, _) = said(&archive(&["cat", "letters", "--format", "value"], dir.path()).output().unwrap());
    assert_eq!((code, out.lines().count()), (Some(0), RECORDS));
}
