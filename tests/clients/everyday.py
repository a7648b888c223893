"""What a program on librdkafka does on an ordinary day: create a topic, produce, consume in a group by two members, commit,
come back, seek by time, alter settings, delete.

Usage: everyday.py BOOTSTRAP
"""
import sys
import time

from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic

bootstrap = sys.argv[1]
topic = f"everyday-{time.time_ns()}"
COUNT = 3000
DEADLINE = time.monotonic() + 240


def check(holds, what):
    if not holds:
        sys.exit(f"failed: {what}")


admin = AdminClient({"bootstrap.servers": bootstrap})
admin.create_topics([NewTopic(topic, num_partitions=4, replication_factor=1)])[topic].result(60)
producer = Producer({"bootstrap.servers": bootstrap, "enable.idempotence": True, "compression.type": "lz4", "linger.ms": 5})
failures = []
middle = None
for n in range(COUNT):
    producer.produce(topic, key=f"k{n % 11}", value=f"v{n}", headers=[("n", str(n).encode())],
                     on_delivery=lambda error, _m: failures.append(error) if error else None)
    if n == COUNT // 2:
        producer.flush(120)
        time.sleep(0.005)  # the clock of the records moves on by some milliseconds; nothing waits for it
        middle = int(time.time() * 1000)
check(producer.flush(120) == 0 and not failures, f"produce: {failures[:3]}")

settings = {"bootstrap.servers": bootstrap, "group.id": f"g-{topic}", "auto.offset.reset": "earliest",
            "enable.auto.commit": False, "session.timeout.ms": 120000}
members = [Consumer(settings), Consumer(settings)]
for member in members:
    member.subscribe([topic])
seen = {}
shared = False
while (len(seen) < COUNT or not shared) and time.monotonic() < DEADLINE:
    for member in members:
        for message in member.consume(500, timeout=0.2):
            check(message.error() is None, message.error())
            seen[(message.partition(), message.offset())] = message.value()
            check(message.headers()[0][0] == "n" and message.value() == b"v" + message.headers()[0][1], "header")
    shared = all(len(member.assignment()) == 2 for member in members)
check(len(set(seen.values())) == COUNT, f"read {len(set(seen.values()))} of {COUNT}")
check(shared, "two members share four partitions")
highest = {}
for (partition, offset) in seen:
    highest[partition] = max(offset + 1, highest.get(partition, 0))
for member in members:
    mine = [TopicPartition(topic, p.partition, highest[p.partition]) for p in member.assignment() if p.partition in highest]
    member.commit(offsets=mine, asynchronous=False)
for member in members:
    member.close()

again = Consumer(settings)
committed = again.committed([TopicPartition(topic, p) for p in highest], timeout=60)
check({p.partition: p.offset for p in committed} == highest, f"committed {committed}")
at = again.offsets_for_times([TopicPartition(topic, p, middle) for p in range(4)], timeout=60)
later = sum(highest[p.partition] - p.offset for p in at if p.offset >= 0)
check(later == COUNT - COUNT // 2 - 1, f"{later} records are later than the middle")
again.close()
# One setting changes, the others stay; a topic's engine cannot.
def altered(**settings):
    entries = [ConfigEntry(name.replace("_", "."), value, incremental_operation=AlterConfigOpType.SET)
               for name, value in settings.items()]
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=entries)
    return admin.incremental_alter_configs([resource])[resource].result(60)


altered(retention_ms="3600000", max_message_bytes="500000")
described = ConfigResource(ConfigResource.Type.TOPIC, topic)
entries = admin.describe_configs([described])[described].result(60)
check(entries["retention.ms"].value == "3600000" and not entries["retention.ms"].is_default, entries["retention.ms"])
try:
    altered(tributary_engine="memory")
    check(False, "the engine was changed")
except KafkaException as refused:
    check("stays" in refused.args[0].str(), refused)
admin.delete_topics([topic])[topic].result(60)
print("ok")
