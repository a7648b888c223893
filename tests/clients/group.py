"""A consumer group of one member that goes on where it was committed, or at the earliest offset: reads COUNT records of each
topic, commits behind them, and prints one JSON line per record: [topic, offset, value].

Usage: group.py BOOTSTRAP GROUP COUNT TOPIC...
"""
import json
import sys
import time

from confluent_kafka import Consumer, TopicPartition

bootstrap, group, count, *topics = sys.argv[1:]
consumer = Consumer({
    "bootstrap.servers": bootstrap,
    "group.id": group,
    "auto.offset.reset": "earliest",
    "enable.auto.commit": False,
    "check.crcs": True,
})
consumer.subscribe(topics)
seen = {topic: [] for topic in topics}
deadline = time.monotonic() + 120
while min(map(len, seen.values())) < int(count):
    if time.monotonic() > deadline:
        sys.exit(f"nothing more came: {seen}")
    for message in consumer.consume(100, timeout=0.2):
        if message.error() is not None:
            sys.exit(f"error: {message.error()}")
        if len(seen[message.topic()]) < int(count):
            seen[message.topic()].append((message.offset(), message.value().decode()))
behind = [TopicPartition(topic, 0, records[-1][0] + 1) for topic, records in seen.items()]
consumer.commit(offsets=behind, asynchronous=False)
consumer.close()
for topic, records in seen.items():
    for offset, value in records:
        print(json.dumps([topic, offset, value]))
