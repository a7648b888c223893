"""Reads records of a topic from an archive in a directory, by docs/formats.md alone and with nothing but the standard library.

Usage: read_archive.py DIRECTORY TOPIC PARTITION [FROM_OFFSET]

Prints one JSON line per record. A batch that is compressed is not opened: one line says which offsets it holds and how it
is compressed. Every checksum on the way is checked.
"""
import json
import os
import sys

TABLE = []
for byte in range(256):
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    TABLE.append(byte)


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def big(data, at, size, signed=False):
    assert len(data) >= at + size, "cut"
    return int.from_bytes(data[at:at + size], "big", signed=signed)


def envelope(data, magic, kind=0):
    """The payload of the envelope that the data begins with, and what follows."""
    assert data[:4] == magic and big(data, 4, 2) == 1, f"not {magic} of version 1"
    end = 16 + big(data, 8, 4)
    assert len(data) >= end and big(data, 12, 4) == crc32c(data[:12] + data[16:end]), f"checksum of {magic}"
    assert big(data, 6, 2) == kind, f"{magic} of another kind"
    return data[16:end], data[end:]


class Postcard:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, size):
        assert len(self.data) >= self.at + size, "cut"
        self.at += size
        return self.data[self.at - size:self.at]

    def u(self):
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def i(self):
        value = self.u()
        return value >> 1 ^ -(value & 1)

    def text(self):
        return self.take(self.u()).decode()

    def option(self, read):
        return read() if self.take(1)[0] else None

    def list(self, read):
        return [read() for _ in range(self.u())]


def file(*parts):
    with open(os.path.join(*parts), "rb") as opened:
        return opened.read()


def payload(data, magic, kind=0):
    """The payload of the envelope that the data is."""
    inner, rest = envelope(data, magic, kind)
    assert not rest, "more than the head says"
    return inner


def read_root(shard):
    """The root in force: of all, the one with the greatest number."""
    newest = max(os.listdir(f"{shard}/manifest"))
    r = Postcard(payload(file(shard, "manifest", newest), b"TRBR"))
    names = ["cluster_id", "shard", "epoch", "seq", "nonce", "trim", "wal"]
    root = {name: r.text() if name == "cluster_id" else r.u() for name in names}
    root["trim_crc"] = r.option(r.u)

    def page():
        name = "{:020}-{:04}-{:016x}".format(r.u(), r.u(), r.u())
        r.u(), r.u()  # size and checksum, which the object has too
        return name

    root["snapshot"] = r.option(page)
    root["pages"] = r.list(page)
    return root


def read_page(shard, name, kind):
    return Postcard(payload(file(shard, "pages", name), b"TRBP", kind))


def read_topics(shard, root):
    """Names and ids, which the section of topics begins with."""
    if root["snapshot"] is None:
        return {}
    r = read_page(shard, root["snapshot"], 2)
    assert r.take(1) == b"\x06", "the snapshot has another form"
    sections = {}
    for _ in range(r.u()):
        tag, version = r.take(2)
        sections[tag] = version, r.take(r.u())
    version, topics_section = sections[1]
    assert version == 1, "the section of topics has another form"
    r = Postcard(topics_section)
    topics = {}
    for _ in range(r.u()):
        r.take(16)  # the key of the map is the id once more
        topic = r.take(16)
        topics[r.text()] = topic
        r.u(), r.list(lambda: (r.text(), r.text())), r.i()  # partitions, settings, created
    return topics


def read_runs(shard, root, topic, partition):
    """Where the partition's runs lie, ascending in offset."""
    runs = []
    for name in root["pages"]:
        r = read_page(shard, name, 1)
        segment = lambda: "{:020}-{:08}-{:04}-{:016x}".format(r.u(), r.u(), r.u(), r.u())
        objects = [name for name, _size in r.list(lambda: (segment(), r.u()))]
        for _ in range(r.u()):
            ours = (r.take(16), r.u()) == (topic, partition)
            for _ in range(r.u()):
                run = {"object": objects[r.u()]}
                for field in ["position", "length", "index_position", "index_length"]:
                    run[field] = r.u()
                for field in ["base", "next", "max_timestamp", "appended_ms"]:
                    run[field] = r.i()
                if ours:
                    runs.append(run)
    return sorted(runs, key=lambda run: run["base"])


def seek(opened, run, offset):
    """Position within the run of the batch that holds an offset, or of one shortly before it, from the sparse index."""
    opened.seek(run["index_position"])
    index = payload(opened.read(run["index_length"]), b"TRBI")
    at = found = 0
    while at < len(index):
        kind, length = big(index, at, 2), big(index, at + 2, 4)
        section = index[at + 6:at + 6 + length]
        at += 6 + length
        if kind == 1:
            for entry in range(0, length, 16):
                if big(section, entry, 8, True) <= offset:
                    found = big(section, entry + 8, 8)
    return found


def varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value >> 1 ^ -(value & 1), at


def nullable(data, at):
    size, at = varint(data, at)
    return (None, at) if size < 0 else (data[at:at + size], at + size)


def text(data):
    return None if data is None else data.decode("utf-8", "backslashreplace")


def show(data, offset):
    """Prints the records from `offset` on of batches that lie one after the other."""
    at = 0
    while at < len(data):
        size = 12 + big(data, at + 8, 4)
        batch = data[at:at + size]
        at += size
        base, last = big(batch, 0, 8), big(batch, 0, 8) + big(batch, 23, 4)
        assert batch[16] == 2 and big(batch, 17, 4) == crc32c(batch[21:]), f"batch at offset {base}"
        attributes = big(batch, 21, 2)
        if last < offset or attributes & 0x20:  # control batches are the log's own
            continue
        if attributes & 7:
            print(json.dumps({"base": base, "last": last, "codec": attributes & 7}))
            continue
        p, base_timestamp = 61, big(batch, 27, 8, True)
        for _ in range(big(batch, 57, 4)):
            length, p = varint(batch, p)
            end, p = p + length, p + 1
            time, p = varint(batch, p)
            delta, p = varint(batch, p)
            key, p = nullable(batch, p)
            value, p = nullable(batch, p)
            p = end
            if base + delta >= offset:
                record = {"offset": base + delta, "timestamp": base_timestamp + time}
                print(json.dumps({**record, "key": text(key), "value": text(value)}))


def show_log(shard, root, topic, partition, offset):
    """What is shipped and not in segments yet: blocks from `trim` on, in objects named by their first block."""
    at, directory = root["wal"], f"{shard}/wal"
    while os.path.exists(f"{directory}/{at:020}"):
        data = file(directory, f"{at:020}")
        while data and data[:4] != b"TRBM":  # a claim mark may end the object
            header, _ = envelope(data, b"TRBK")
            sizes = [big(header, 32 + 4 * n, 4) for n in range(3)]
            end = 60 + sizes[0] + sizes[1] + sizes[2] * 60
            assert big(data, end, 4) == crc32c(data[:end]) and big(header, 16, 8) == at, "not the block that was expected"
            block, data = data[:end], data[end + 4:]
            for entry in range(len(block) - 60 * sizes[2], len(block), 60):
                place = big(block, entry + 48, 4)
                if at >= root["trim"] and (block[entry:entry + 16], big(block, entry + 16, 4)) == (topic, partition):
                    show(block[place:place + big(block, entry + 52, 4)], offset)
            at += 1


def main(directory, name, partition, offset="0"):
    partition, offset = int(partition), int(offset)
    for number in sorted(os.listdir(f"{directory}/shards")):
        shard = f"{directory}/shards/{number}"
        root = read_root(shard)
        topic = read_topics(shard, root).get(name)
        if topic is None:
            continue
        for run in read_runs(shard, root, topic, partition):
            if run["next"] > offset:
                with open(f"{shard}/segments/{run['object']}", "rb") as opened:
                    start = seek(opened, run, offset)
                    opened.seek(run["position"] + start)
                    show(opened.read(run["length"] - start), offset)
        show_log(shard, root, topic, partition, offset)


main(*sys.argv[1:])
