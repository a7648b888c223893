"""Committed offsets of several groups, without members: partition 0 of TOPIC.

Usage: commits.py BOOTSTRAP TOPIC commit GROUP...   commits 1, 2, 3, ... in each group in turn until it is ended, and prints
                                                    one JSON line per commit that was acknowledged: [group, offset]
       commits.py BOOTSTRAP TOPIC show GROUP...     prints {"committed": {group: offset}, "listed": [group, ...]}
"""
import json
import sys

from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient

bootstrap, topic, what, *groups = sys.argv[1:]
consumers = {
    group: Consumer({"bootstrap.servers": bootstrap, "group.id": group, "enable.auto.commit": False}) for group in groups
}
if what == "commit":
    offset = 0
    while True:
        offset += 1
        for group, consumer in consumers.items():
            consumer.commit(offsets=[TopicPartition(topic, 0, offset)], asynchronous=False)
            print(json.dumps([group, offset]))
committed = {group: consumer.committed([TopicPartition(topic, 0)], 60)[0].offset for group, consumer in consumers.items()}
admin = AdminClient({"bootstrap.servers": bootstrap})
listed = admin.list_consumer_groups().result(60)
print(json.dumps({"committed": committed, "listed": sorted(group.group_id for group in listed.valid)}))
for consumer in consumers.values():
    consumer.close()
