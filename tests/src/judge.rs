//! The judge: holds what Kafka clients read against what the wire saw and what the edge stored. Pure; it trusts neither broker.

use std::collections::{BTreeMap, BTreeSet};

use crate::message::{Id, Message, id_of};
use crate::wire::Fate;

/// A record as some Kafka client read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub partition: i32,
    pub offset: i64,
    pub timestamp: i64,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub headers: Vec<(String, Option<Vec<u8>>)>,
}

/// What is held against each other.
pub struct Case<'a> {
    pub edge: &'a str,
    pub messages: &'a BTreeMap<Id, Message>,
    pub fates: &'a BTreeMap<Id, Fate>,
    /// Sequence numbers of each device in the order in which its PUBLISHes passed, repetitions included.
    pub order: &'a BTreeMap<u32, Vec<u32>>,
    /// Devices whose session the edge never forgot: QoS 2 is exactly once for them.
    pub kept: &'a BTreeSet<u32>,
    /// In the order of partition and offset.
    pub records: &'a [Record],
}

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    pub problems: Vec<String>,
    pub records: usize,
    pub acked: usize,
    /// Second copies of QoS 1 messages, each explained by a second PUBLISH.
    pub repeated: usize,
    /// QoS 0 messages that never arrived, which their promise allows.
    pub lost_qos0: usize,
}

impl Verdict {
    fn problem(&mut self, text: String) {
        self.problems.push(text);
    }
}

/// Judges a whole run.
pub fn judge(case: &Case<'_>) -> Verdict {
    let mut verdict = Verdict { records: case.records.len(), ..Verdict::default() };
    let copies = read_log(case, &mut verdict);
    for (id, message) in case.messages {
        let fate = case.fates.get(id).cloned().unwrap_or_default();
        let stored = copies.get(id).map_or(&[][..], Vec::as_slice);
        judge_message(message, &fate, stored, case, &mut verdict);
    }
    verdict
}

/// Goes through the log once: order, offsets, contents.
fn read_log<'a>(case: &Case<'a>, verdict: &mut Verdict) -> BTreeMap<Id, Vec<&'a Record>> {
    let mut copies: BTreeMap<Id, Vec<&Record>> = BTreeMap::new();
    let mut passed: BTreeMap<u32, std::slice::Iter<'_, u32>> = case.order.iter().map(|(d, o)| (*d, o.iter())).collect();
    let mut before: Option<&Record> = None;
    for record in case.records {
        let place = format!("{}:{}", record.partition, record.offset);
        if let Some(before) = before {
            if record.partition != before.partition {
                verdict.problem(format!("{place}: the stream lies in partition {} too", before.partition));
            } else {
                if record.offset <= before.offset {
                    verdict.problem(format!("{place}: after offset {}", before.offset));
                }
                if record.timestamp < before.timestamp {
                    verdict.problem(format!("{place}: timestamp {} after {}", record.timestamp, before.timestamp));
                }
            }
        }
        before = Some(record);
        let id = record.value.as_deref().and_then(id_of);
        let Some((id, message)) = id.and_then(|id| Some((id, case.messages.get(&id)?))) else {
            verdict.problem(format!("{place}: holds what no device published"));
            continue;
        };
        judge_contents(&place, record, message, case.edge, verdict);
        copies.entry(id).or_default().push(record);
        // What is stored of a device is a part of what passed on its wire, in that order: each record is one PUBLISH.
        if !passed.get_mut(&id.0).is_some_and(|order| order.any(|seq| *seq == id.1)) {
            verdict.problem(format!("{place}: {id:?} stands where no PUBLISH of it is left on the wire"));
            passed.remove(&id.0);
        }
    }
    copies
}

fn judge_contents(place: &str, record: &Record, message: &Message, edge: &str, verdict: &mut Verdict) {
    let id = message.id;
    if record.value.as_deref() != Some(&message.payload) {
        verdict.problem(format!("{place}: payload of {id:?} is not what was published"));
    }
    if record.key.as_deref() != Some(message.topic.as_bytes()) {
        verdict.problem(format!("{place}: key of {id:?} is not its topic"));
    }
    let header = |name: &str, value: &str| (name.to_owned(), Some(value.as_bytes().to_vec()));
    let mut expected = vec![header("tributary.edge", edge)];
    expected.extend(message.user.iter().map(|(name, value)| header(&format!("mqtt.user.{name}"), value)));
    let mut found = record.headers.clone();
    // User properties keep their order among each other; the rest has none that is promised.
    expected.sort_by(|a, b| a.0.cmp(&b.0));
    found.sort_by(|a, b| a.0.cmp(&b.0));
    if found != expected {
        verdict.problem(format!("{place}: headers of {id:?} are {found:?}, not {expected:?}"));
    }
}

fn judge_message(message: &Message, fate: &Fate, stored: &[&Record], case: &Case<'_>, verdict: &mut Verdict) {
    let (id, qos) = (message.id, message.qos);
    verdict.acked += usize::from(fate.acked_ms.is_some());
    if fate.acked_ms.is_some() && stored.is_empty() {
        verdict.problem(format!("{id:?} QoS {qos}: was acknowledged and is not in the log"));
    }
    if qos == 0 {
        verdict.lost_qos0 += usize::from(stored.is_empty());
    } else if !fate.refused && fate.acked_ms.is_none() {
        verdict.problem(format!("{id:?} QoS {qos}: never acknowledged"));
    }
    let sends = fate.sent_ms.len();
    let once = sends.min(1 + fate.begun_anew);
    let allowed = if qos == 2 && case.kept.contains(&id.0) { once } else { sends };
    if stored.len() > allowed {
        let offsets: Vec<i64> = stored.iter().map(|r| r.offset).collect();
        verdict.problem(format!("{id:?} QoS {qos}: {} copies at {offsets:?}, PUBLISHed {sends} times", stored.len()));
    }
    verdict.repeated += stored.len().saturating_sub(1);
    for (copy, record) in stored.iter().enumerate() {
        // The n-th copy came of the n-th PUBLISH at the earliest.
        let earliest = fate.sent_ms.get(copy).copied().unwrap_or(i64::MAX);
        if record.timestamp < earliest {
            verdict.problem(format!("{id:?}: timestamp {} before its PUBLISH at {earliest}", record.timestamp));
        }
        if let (0, Some(acked)) = (copy, fate.acked_ms)
            && record.timestamp > acked
        {
            verdict.problem(format!("{id:?}: timestamp {} after its acknowledgement at {acked}", record.timestamp));
        }
    }
}

/// Whether two clients read the same; tells the first difference.
pub fn same(left: (&str, &[Record]), right: (&str, &[Record])) -> Result<(), String> {
    let ((left_name, left), (right_name, right)) = (left, right);
    if left.len() != right.len() {
        return Err(format!("{left_name} read {} records, {right_name} {}", left.len(), right.len()));
    }
    match left.iter().zip(right).find(|(l, r)| l != r) {
        Some((l, r)) => Err(format!("{left_name} read {l:?}, {right_name} {r:?}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Alphabet;

    struct World {
        messages: BTreeMap<Id, Message>,
        fates: BTreeMap<Id, Fate>,
        order: Vec<u32>,
        records: Vec<Record>,
    }

    /// Ten messages of one device, all well.
    fn world() -> World {
        let mut world =
            World { messages: BTreeMap::new(), fates: BTreeMap::new(), order: (0..10).collect(), records: Vec::new() };
        for seq in 0..10 {
            let message = Message::new((1, seq), Alphabet::Binary, Some((seq % 3) as u8), true);
            let at = 1_000 + i64::from(seq);
            let acked_ms = (message.qos > 0).then_some(at + 1);
            world.fates.insert(message.id, Fate { sent_ms: vec![at], acked_ms, ..Fate::default() });
            world.records.push(record(&message, i64::from(seq), at));
            world.messages.insert(message.id, message);
        }
        world
    }

    fn record(message: &Message, offset: i64, timestamp: i64) -> Record {
        let mut headers = vec![("tributary.edge".to_owned(), Some(b"gw-1".to_vec()))];
        headers.extend(message.user.iter().map(|(n, v)| (format!("mqtt.user.{n}"), Some(v.clone().into_bytes()))));
        let (key, value) = (Some(message.topic.clone().into_bytes()), Some(message.payload.clone()));
        Record { partition: 3, offset, timestamp, key, value, headers }
    }

    fn problems(world: &World) -> Vec<String> {
        let kept = BTreeSet::from([1]);
        let order = BTreeMap::from([(1, world.order.clone())]);
        let World { messages, fates, records, .. } = world;
        judge(&Case { edge: "gw-1", messages, fates, order: &order, kept: &kept, records }).problems
    }

    /// Each way to break the promise turns the judge red.
    fn check(break_it: impl FnOnce(&mut World), complaint: &str) {
        let mut world = world();
        break_it(&mut world);
        let problems = problems(&world);
        assert!(problems.iter().any(|p| p.contains(complaint)), "expected {complaint:?}, found {problems:?}");
    }

    #[test]
    fn a_run_in_which_all_went_well_is_accepted() {
        assert_eq!(problems(&world()), Vec::<String>::new());
    }

    #[test]
    fn an_acknowledged_message_that_is_missing_is_found() {
        check(|w| drop(w.records.remove(4)), "(1, 4) QoS 1: was acknowledged and is not in the log");
    }

    #[test]
    fn a_second_copy_without_a_second_publish_is_found() {
        check(|w| w.records.push(Record { offset: 10, timestamp: 1_010, ..w.records[4].clone() }), "2 copies");
    }

    #[test]
    fn a_second_copy_after_a_second_publish_is_allowed_at_qos_1_and_at_qos_2_only_after_a_pubrel() {
        let twice = |w: &mut World, seq: u32| {
            w.fates.get_mut(&(1, seq)).expect("there").sent_ms.push(1_009);
            w.order.push(seq);
            let offset = w.records.len() as i64;
            w.records.push(Record { offset, timestamp: 1_010, ..w.records[seq as usize].clone() });
        };
        let mut world = world();
        twice(&mut world, 4);
        assert_eq!(problems(&world), Vec::<String>::new());
        check(|w| twice(w, 5), "(1, 5) QoS 2: 2 copies");
        let anew = |w: &mut World| w.fates.get_mut(&(1, 5)).expect("there").begun_anew = 1;
        check(
            |w| {
                twice(w, 5);
                twice(w, 5);
                anew(w);
            },
            "(1, 5) QoS 2: 3 copies",
        );
        twice(&mut world, 5);
        anew(&mut world);
        assert_eq!(problems(&world), Vec::<String>::new());
    }

    #[test]
    fn changed_order_contents_and_times_are_found() {
        check(|w| w.records.swap(3, 4), "after offset");
        check(
            |w| {
                w.records.swap(3, 4);
                (w.records[3].offset, w.records[4].offset) = (3, 4);
            },
            "no PUBLISH of it is left",
        );
        check(|w| w.records[2].value.as_mut().expect("there").push(0), "payload");
        check(|w| w.records[2].key = None, "key");
        check(|w| drop(w.records[2].headers.pop()), "headers");
        check(|w| w.records[2].headers[0].1 = Some(b"gw-2".to_vec()), "headers");
        check(|w| w.records[2].timestamp = 990, "before its PUBLISH");
        check(|w| w.fates.get_mut(&(1, 4)).expect("there").acked_ms = None, "never acknowledged");
        check(|w| w.records[8].timestamp = 1_900, "after its acknowledgement");
        check(|w| w.records[9].partition = 4, "lies in partition");
        check(|w| w.records[9].value = Some(b"hello".to_vec()), "what no device published");
    }

    #[test]
    fn clients_that_read_different_things_are_found() {
        let world = world();
        assert!(same(("a", &world.records), ("b", &world.records)).is_ok());
        let mut other = world.records.clone();
        other[3].headers.clear();
        assert!(same(("a", &world.records), ("b", &other)).is_err());
        other.pop();
        assert!(same(("a", &world.records), ("b", &other)).is_err());
    }
}
