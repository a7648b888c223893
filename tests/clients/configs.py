"""Prints a topic's settings as one JSON object. Usage: configs.py BOOTSTRAP TOPIC"""
import json
import sys

from confluent_kafka.admin import AdminClient, ConfigResource

bootstrap, topic = sys.argv[1:3]
resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
admin = AdminClient({"bootstrap.servers": bootstrap})
entries = admin.describe_configs([resource])[resource].result(60)
print(json.dumps({name: entry.value for name, entry in entries.items()}))
