"""Packets of a container's network, and what they say: TCP streams, TLS records, HTTP/2 frames, gRPC calls.

`Capture` sniffs into a pcap file (any packet analyser opens it) from inside the container's network namespace, by
this file run as a program: ``nsenter -t PID -n python capture.py PORT FILE``.
"""

from __future__ import annotations

import signal
import socket
import struct
import subprocess
import sys
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

SNAP = 1 << 18  # segments that the network card would cut are seen whole, up to 64 kB
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, CONTINUATION = 0, 1, 4, 9
ACK, END_HEADERS, PADDED, PRIORITY = 1, 4, 8, 32
STATIC = """:authority|:method GET|:method POST|:path /|:path /index.html|:scheme http|:scheme https|:status 200
:status 204|:status 206|:status 304|:status 400|:status 404|:status 500|accept-charset|accept-encoding gzip, deflate
accept-language|accept-ranges|accept|access-control-allow-origin|age|allow|authorization|cache-control
content-disposition|content-encoding|content-language|content-length|content-location|content-range|content-type
cookie|date|etag|expect|expires|from|host|if-match|if-modified-since|if-none-match|if-range|if-unmodified-since
last-modified|link|location|max-forwards|proxy-authenticate|proxy-authorization|range|referer|refresh|retry-after
server|set-cookie|strict-transport-security|transfer-encoding|user-agent|vary|via|www-authenticate"""  # RFC 7541, A
FIXED = [tuple(entry.encode().partition(b" ")[::2]) for line in STATIC.splitlines() for entry in line.split("|")]


class Capture:
    """All TCP payload at ``port`` of a container, from now until `stop`."""

    def __init__(self, pid, port, file):
        self.port, self.file = port, Path(file)
        command = "nsenter", "-t", pid, "-n", sys.executable, __file__, port, file
        self._child = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
        assert self._child.stdout.readline() == "ready\n"

    def stop(self):
        """End it; AssertionError when it lost packets."""
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
        told, _ = self._child.communicate(timeout=60)
        assert told.endswith("lost 0\n"), f"the capture is not whole: {told}"

    def streams(self):
        """(client's address, client's port) -> its two directions, of what is captured up to now."""
        found = defaultdict(lambda: (Stream(), Stream()))
        for time, segment in packets(self.file):
            parsed = parse(segment, self.port)
            if parsed is not None:
                client, down, flags, number, payload = parsed
                found[client][down].add(time, flags, number, payload)
        return dict(found)


def sniff(port, file):
    """Write packets until SIGTERM."""
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    tap.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE: a busy machine must not lose any
    tap.setsockopt(socket.SOL_SOCKET, 35, 1)  # SO_TIMESTAMPNS: when it came, not when we read it
    tap.settimeout(0.2)
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
    with Path(file).open("wb") as sink:
        sink.write(struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, SNAP, 1))  # pcap, nanoseconds, Ethernet
        print("ready", flush=True)
        while True:
            if ended:
                tap.setblocking(False)  # what already came, and no more
            try:
                packet, extra, _, address = tap.recvmsg(SNAP, 64)
            except (TimeoutError, BlockingIOError):
                if ended:
                    break
                continue
            # Over loopback come health checks, and each packet twice.
            if address[0] != "lo" and parse(packet, port) is not None:
                sink.write(struct.pack("<IIII", *struct.unpack("=qq", extra[0][2]), *[len(packet)] * 2) + packet)
                sink.flush()
    _, lost = struct.unpack("=II", tap.getsockopt(263, 6, 8))  # SOL_PACKET, PACKET_STATISTICS
    print(f"lost {lost}", flush=True)


def packets(file):
    """(seconds since the epoch, Ethernet frame) of a pcap file; its end may be half written."""
    data = file.read_bytes()
    at = 24
    while at + 16 <= len(data):
        seconds, nano, kept, _ = struct.unpack_from("<IIII", data, at)
        if at + 16 + kept > len(data):
            break
        yield seconds + nano / 1e9, data[at + 16 : at + 16 + kept]
        at += 16 + kept


def parse(packet, port):
    """(client, down or not, TCP flags, sequence number, payload) of a TCP segment at ``port``, else None."""
    if len(packet) < 54 or packet[12:14] != b"\x08\x00" or packet[23] != 6:
        return None
    size, head = struct.unpack_from(">H", packet, 16)[0], 14 + 4 * (packet[14] & 15)
    source, target, number = struct.unpack_from(">HHI", packet, head)
    if port not in (source, target):
        return None
    down = source == port
    begin = head + 4 * (packet[head + 12] >> 4)
    client = socket.inet_ntoa(packet[30:34] if down else packet[26:30]), target if down else source
    return client, down, packet[head + 13], number, packet[begin : 14 + size]


@dataclass
class Stream:
    """One direction of a TCP connection."""

    data: bytearray = field(default_factory=bytearray)
    starts: list[int] = field(default_factory=list)  # where in ``data`` each segment begins
    times: list[float] = field(default_factory=list)  # and when it came
    # When, and how many payload bytes: what was sent twice counts twice.
    wire: list[tuple[float, int]] = field(default_factory=list)
    whole: bool = False  # captured from the connection's beginning
    _due: int | None = None
    _early: dict[int, tuple[float, bytes]] = field(default_factory=dict)

    def add(self, time, flags, number, payload):
        if flags & 2:  # SYN
            self.whole, self._due = True, number + 1 & 0xFFFFFFFF
        if not payload:
            return
        self.wire.append((time, len(payload)))
        self._due = number if self._due is None else self._due
        self._early[number] = (time, payload)
        for number in sorted(self._early, key=self._ahead):
            ahead = self._ahead(number)
            if ahead > 0:
                break
            time, payload = self._early.pop(number)
            if fresh := payload[-ahead:] if ahead else payload:
                if -ahead >= len(payload):
                    continue
                self.starts.append(len(self.data))
                self.times.append(time)
                self.data += fresh
                self._due = self._due + len(fresh) & 0xFFFFFFFF

    def _ahead(self, number):
        return (number - self._due + 2**31) % 2**32 - 2**31

    def time(self, at):
        """When byte ``at`` came."""
        return self.times[bisect_right(self.starts, at) - 1]

    def sent(self, begin, end):
        """Payload bytes on the wire in that time."""
        return sum(size for time, size in self.wire if begin <= time < end)


def records(data):
    """(type, version, body) of each TLS record; ValueError where there is none. The last may lack its end."""
    at = 0
    while at + 5 <= len(data):
        kind, version, size = struct.unpack_from(">BHH", data, at)
        if not 20 <= kind <= 23 or version not in (0x0301, 0x0303) or size > 2**14 + 256:
            raise ValueError(f"no TLS record at byte {at}: {bytes(data[at : at + 16])!r}")
        yield kind, version, bytes(data[at + 5 : at + 5 + size])
        at += 5 + size


def frames(stream, down):
    """(begin, end, type, flags, HTTP/2 stream, body) of each frame; ValueError where there is none."""
    at = 0
    if not down:
        if not stream.data.startswith(PREFACE):
            raise ValueError(f"no HTTP/2 connection: it starts with {bytes(stream.data[:24])!r}")
        at = len(PREFACE)
    first = True
    while at + 9 <= len(stream.data):
        size, kind = int.from_bytes(stream.data[at : at + 3], "big"), stream.data[at + 3]
        flags, number = stream.data[at + 4], int.from_bytes(stream.data[at + 5 : at + 9], "big")
        if kind > 9 or size > 2**24 - 1 or (first and (kind != SETTINGS or number)):
            raise ValueError(f"no HTTP/2 frame at byte {at}: type {kind} of {size} bytes")
        end, first = at + 9 + size, False
        if end > len(stream.data):
            return
        yield at, end, kind, flags, number, bytes(stream.data[at + 9 : end])
        at = end


@dataclass
class Call:
    """A remote procedure call: its headers, and the bytes of its frames each way."""

    asked: dict[bytes, bytes] = field(default_factory=dict)
    answered: dict[bytes, bytes] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=lambda: [0, 0])  # up, down
    began: float = 0.0
    spoken: float = 0.0  # when the last byte of the request came
    ended: float = 0.0

    @property
    def method(self):
        return self.asked.get(b":path", b"").decode().rpartition("/")[2]


def calls(up, down):
    """Every call of a connection, and last what belongs to none (settings, pings)."""
    found = defaultdict(Call)
    for way, stream in enumerate((up, down)):
        tables, block = Table(), b""
        for begin, end, kind, flags, number, body in frames(stream, bool(way)):
            call = found[number]
            call.sizes[way] += end - begin
            if kind in (HEADERS, CONTINUATION):
                if kind == HEADERS:
                    tail = body[0] if flags & PADDED else 0
                    body = body[bool(flags & PADDED) + 5 * bool(flags & PRIORITY) : len(body) - tail]  # noqa: PLW2901
                block += body
                if flags & END_HEADERS:
                    (call.answered if way else call.asked).update(tables.read(block))
                    block = b""
            if kind in (HEADERS, DATA):
                if way:
                    call.ended = stream.time(end - 1)
                else:
                    call.began = call.began or stream.time(begin)
                    call.spoken = stream.time(end - 1)
    rest = found.pop(0, Call())
    return [*found.values(), rest]


class Table:
    """Header blocks of one direction (RFC 7541), without Huffman codes: gRPC's core writes none."""

    def __init__(self):
        self.entries, self.limit = [], 4096

    def read(self, block):
        at, found = 0, {}
        while at < len(block):
            kind = block[at]
            if kind & 0xE0 == 0x20:
                self.limit, at = number(block, at, 5)
                self._fit()
                continue
            keep = bool(kind & 0xC0)
            index, at = number(block, at, 7 if kind & 0x80 else 6 if keep else 4)
            if kind & 0x80:
                name, value = self._entry(index)
            else:
                name, at = (self._entry(index)[0], at) if index else text(block, at)
                value, at = text(block, at)
                if keep:
                    self.entries.insert(0, (name, value))
                    self._fit()
            found[name] = value
        return found

    def _entry(self, index):
        return FIXED[index - 1] if index <= len(FIXED) else self.entries[index - 1 - len(FIXED)]

    def _fit(self):
        while sum(len(name) + len(value) + 32 for name, value in self.entries) > self.limit:
            self.entries.pop()


def number(block, at, bits):
    value, most, shift = block[at] & (1 << bits) - 1, (1 << bits) - 1, 0
    at += 1
    if value == most:
        while True:
            value += (block[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if block[at - 1] < 128:
                break
    return value, at


def text(block, at):
    if block[at] & 0x80:
        raise ValueError("a header in Huffman code")
    size, at = number(block, at, 7)
    return block[at : at + size], at + size


if __name__ == "__main__":
    sniff(int(sys.argv[1]), sys.argv[2])
