"""A device made of mosquitto_pub: reads {topic, qos, payload} as JSON lines (payloads of one line), and hands neighbouring
ones of one QoS to a mosquitto_pub process each; a process that does not end well is run again with the same lines, as a
shell script on a gateway would do it. QoS 0 is tried once.

Usage: publish_mosquitto.py HOST PORT CLIENT_ID
"""
import base64
import itertools
import json
import subprocess
import sys
import time

host, port, client_id = sys.argv[1:4]


def publish(topic, qos, payloads):
    command = ["mosquitto_pub", "-h", host, "-p", port, "-i", client_id, "-t", topic, "-q", str(qos), "-l"]
    while True:
        # A process that hangs on a broken connection is ended; the bound is generous because disks stall.
        try:
            done = subprocess.run(command, input=b"".join(p + b"\n" for p in payloads), timeout=30)
        except subprocess.TimeoutExpired:
            done = None
        if qos == 0 or (done is not None and done.returncode == 0):
            return
        time.sleep(0.05)


def batches():
    """Groups of at most 20 neighbouring messages of one topic and QoS, never waiting for more than has come."""
    for line in sys.stdin:
        message = json.loads(line)
        yield message


for (topic, qos), group in itertools.groupby(batches(), key=lambda m: (m["topic"], m["qos"])):
    payloads = []
    for message in group:
        payloads.append(base64.b64decode(message["payload"]))
        if len(payloads) == 20:
            publish(topic, qos, payloads)
            payloads = []
    if payloads:
        publish(topic, qos, payloads)
