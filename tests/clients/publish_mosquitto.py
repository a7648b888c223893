"""A device made of mosquitto_pub: reads {topic, qos, payload} as JSON lines (payloads of one line), and hands neighbouring
ones of one QoS to a mosquitto_pub process each; a process that does not end well is run again with the same lines, as a
shell script on a gateway would do it. QoS 0 is tried once.

Usage: publish_mosquitto.py HOST PORT CLIENT_ID
"""
import base64
import json
import queue
import subprocess
import sys
import threading
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


def read(into):
    for line in sys.stdin:
        into.put(json.loads(line))
    into.put(None)


messages = queue.Queue()
threading.Thread(target=read, args=(messages,), daemon=True).start()
following = messages.get()
while following is not None:
    # What has come by now of one topic and QoS, at most 20; never waits for more.
    topic, qos = following["topic"], following["qos"]
    payloads = []
    while following is not None and (following["topic"], following["qos"]) == (topic, qos) and len(payloads) < 20:
        payloads.append(base64.b64decode(following["payload"]))
        following = None
        try:
            following = messages.get_nowait()
        except queue.Empty:
            break
        if following is None:
            messages.put(None)
            break
    publish(topic, qos, payloads)
    if following is None:
        following = messages.get()
