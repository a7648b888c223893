"""Reads a topic from the earliest offset to its end, by assignment, and prints one JSON line per record.

Usage: read.py BOOTSTRAP TOPIC
"""
import base64
import json
import sys

from confluent_kafka import Consumer, KafkaError, TopicPartition

bootstrap, topic = sys.argv[1:3]
consumer = Consumer({
    "bootstrap.servers": bootstrap,
    "group.id": "unused",  # the library wants one even where no group is joined
    "enable.auto.commit": False,
    "check.crcs": True,
    "enable.partition.eof": True,
})
partitions = consumer.list_topics(topic, timeout=60).topics[topic].partitions
ends = {}
for number in partitions:
    low, high = consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=60)
    if high > low:
        ends[number] = (low, high)


def text(data):
    return None if data is None else base64.b64encode(data).decode()


consumer.assign([TopicPartition(topic, number, low) for number, (low, _) in ends.items()])
open_partitions = set(ends)
quiet = 0
while open_partitions:
    # It waits as long as it may for so many messages, also when all are there.
    messages = consumer.consume(5000, timeout=0.2)
    quiet = 0 if messages else quiet + 1
    if quiet > 600:
        sys.exit(f"nothing came for 120 s; still waiting for partitions {sorted(open_partitions)}")
    for message in messages:
        error = message.error()
        if error is not None:
            if error.code() == KafkaError._PARTITION_EOF:
                open_partitions.discard(message.partition())
                continue
            sys.exit(f"error: {error}")
        print(json.dumps({
            "p": message.partition(), "o": message.offset(), "t": message.timestamp()[1],
            "k": text(message.key()), "v": text(message.value()),
            "h": [[name, text(value)] for name, value in message.headers() or []],
        }, separators=(",", ":")))
consumer.close()
