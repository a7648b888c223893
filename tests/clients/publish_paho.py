"""A device on paho-mqtt: reads {topic, qos, payload, user} as JSON lines, publishes them on a kept session, and ends
once all of QoS 1 and 2 are acknowledged and the input has ended. paho itself comes back after a broken connection and
repeats what was not answered.

Usage: publish_paho.py HOST PORT CLIENT_ID 4|5
"""
import base64
import json
import sys
import threading

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

host, port, client_id, version = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
WINDOW = 20
room = threading.Semaphore(WINDOW)
lock = threading.Lock()
under_way = set()
done_early = set()


def acknowledged(_client, _userdata, mid, *_more):
    with lock:
        if mid in under_way:
            under_way.remove(mid)
            room.release()
        else:
            done_early.add(mid)  # publish() has not returned its number yet, or it is of QoS 0


connected = threading.Event()
if version == 5:
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=client_id, protocol=mqtt.MQTTv5)
    session = Properties(PacketTypes.CONNECT)
    session.SessionExpiryInterval = 0xFFFFFFFF
    options = {"clean_start": False, "properties": session}
else:
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=client_id, protocol=mqtt.MQTTv311, clean_session=False)
    options = {}
client.on_publish = acknowledged
client.on_connect = lambda *_: connected.set()
client.max_inflight_messages_set(WINDOW)
client.max_queued_messages_set(0)
client.reconnect_delay_set(min_delay=0.05, max_delay=0.2)
client.connect_async(host, port, keepalive=60, **options)
client.loop_start()
connected.wait()

for line in sys.stdin:
    message = json.loads(line)
    properties = None
    if version == 5:
        properties = Properties(PacketTypes.PUBLISH)
        properties.UserProperty = [tuple(pair) for pair in message["user"]]
    if message["qos"] > 0:
        room.acquire()
    info = client.publish(message["topic"], base64.b64decode(message["payload"]), message["qos"], properties=properties)
    # QoS 0 is not waited for: what is under way when the connection breaks is never reported as published.
    if message["qos"] > 0:
        with lock:
            if info.mid in done_early:
                done_early.remove(info.mid)
                room.release()
            else:
                under_way.add(info.mid)

# All permits back: everything was answered.
for _ in range(WINDOW):
    room.acquire()
client.disconnect()
client.loop_stop()
