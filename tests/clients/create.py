"""Creates topics with one partition. Usage: create.py BOOTSTRAP TOPIC[:SETTING=VALUE]..."""
import sys

from confluent_kafka.admin import AdminClient, NewTopic

topics = []
for argument in sys.argv[2:]:
    name, *settings = argument.split(":")
    topics.append(NewTopic(name, num_partitions=1, replication_factor=1, config=dict(s.split("=") for s in settings)))
admin = AdminClient({"bootstrap.servers": sys.argv[1]})
for made in admin.create_topics(topics).values():
    made.result(60)
