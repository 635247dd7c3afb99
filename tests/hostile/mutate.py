"""Changes that know a file's structure: JSON trees, safetensors files, lines of text, bytes."""

from __future__ import annotations

import json
import math
import struct
from random import Random
from typing import Any

DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**10, 10**30, -(10**30), 0.5, -0.0, 1e308,
    5e-324, math.nan, math.inf, "", " ", "\x00", "é\u202e", "8", "1e-4", "no", "x" * 5000, "*",
    "*" * 300, "[", "[!", "?" * 300, "*a" * 200, "all-linear", "lora", "train", "0.q_proj",
    "../../etc/passwd", "([a-z_]+)+!", "(?=q).*", "(a{1000}){1000}", "(.*)*" * 50, "\\", "last 1",
    "1-0", "{0.__class__}", "%s%n", "__import__('os').system('true')", "!!python/name:os.system",
    [], {}, [[]], {"": {}}, [None], ["0.q_proj", 3], ["q_proj", "v_proj"], {"q_proj": 4},
    {"q_proj": []}, {"a": [1]}, list(range(3000)), {str(i): i for i in range(3000)}, DEEP,
)  # fmt: skip
TOKENS = (
    b"{", b"}", b"[", b"]", b'"', b"'", b":", b",", b"\\", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf",
    b"\n", b"\r", b"\t", b"&a ", b"*a ", b"<<: *a\n", b"!!python/object/apply:os.system [x]\n",
    b"---\n", b"...\n", b"%YAML 1.1\n", b"? ", b"| ", b">-\n", b"- ", b"#", b"[[rules]]\n", b"'''",
    b'"""', b"\\u0000", b"\\ud800", b"1" * 400, b"1e999", b"-", b".", b"[" * 3000, b'{"a":' * 400,
    b"\x80\x04", b"PK\x03\x04", "é".encode(), b"\xc3",
)  # fmt: skip


def tree(random: Random, value: Any, keys: tuple[str, ...] = ()) -> Any:
    """A copy of a JSON value with one place changed. *keys* are names that mean something there."""
    places = list(_places(value))
    if not places:
        return random.choice(VALUES)
    at = random.choice(places)
    action = random.randrange(7)
    new = json.loads(json.dumps(value))
    holder = new
    for step in at[:-1]:
        holder = holder[step]
    last = at[-1]
    if action <= 2:
        holder[last] = random.choice(VALUES)
    elif action == 3:
        del holder[last]
    elif action == 4 and isinstance(holder, dict):
        name = random.choice(keys) if keys and random.random() < 0.7 else random.choice(TEXTS)
        holder[name] = holder.pop(last) if random.random() < 0.5 else random.choice(VALUES)
    elif action == 5:
        other = value
        for step in random.choice(places):
            other = other[step]
        holder[last] = other
    else:
        holder[last] = _near(random, holder[last])
    return new


TEXTS = tuple(v for v in VALUES if isinstance(v, str))


def _places(value: Any, path: tuple[Any, ...] = ()) -> Any:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield (*path, key)
        yield from _places(inner, (*path, key))


def _near(random: Random, value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + random.choice((-1, 1, 4, -4, 2**40))
    if isinstance(value, float):
        return value * random.choice((-1.0, 1.0001, 1e30))
    if isinstance(value, str):
        at = random.randrange(len(value) + 1)
        return value[:at] + random.choice((*TEXTS, ".", "x")) + value[at + random.randrange(2) :]
    return [value]


def raw(random: Random, data: bytes) -> bytes:
    """*data* with bytes flipped, cut, doubled or put in."""
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(data) + 1)
        end = min(len(data), at + random.choice((1, 1, 4, 30, 400)))
        data = random.choice(
            (
                data[:at] + bytes([random.randrange(256)]) + data[at + 1 :],
                data[:at] + data[end:],
                data[:at] + data[at:end] * 2 + data[end:],
                data[:at] + random.choice(TOKENS) + data[at:],
                data[:at],
            )
        )
    return data


def lines(random: Random, data: bytes) -> bytes:
    """Text with lines left out, doubled, moved, indented, or with another value."""
    found = data.split(b"\n")
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(found))
        action = random.randrange(6)
        if action == 0 and len(found) > 1:
            del found[at]
        elif action == 1:
            found.insert(random.randrange(len(found) + 1), found[at])
        elif action == 2:
            found[at] = random.choice((b" ", b"  ", b"\t", b"- ")) + found[at]
        elif action == 3:
            found[at] = found[at].lstrip()
        else:
            mark = b":" if b":" in found[at] else b"="
            name, _, _ = found[at].partition(mark)
            value = random.choice(VALUES)
            text = json.dumps(value) if random.random() < 0.7 else str(value)
            found[at] = name + mark + b" " + text.encode("utf-8", "surrogatepass")
    return b"\n".join(found)


def text(random: Random, data: bytes, keys: tuple[str, ...]) -> bytes:
    """A JSON file changed as a tree, or as bytes; keys may come to stand twice."""
    action = random.randrange(8)
    if action == 0:
        return raw(random, data)
    if action == 1:
        body = data.strip()
        key, value = random.choice(list(json.loads(data).items()))
        return body[:-1] + f", {json.dumps(key)}: {json.dumps(value)}}}".encode()
    value = json.loads(data)
    for _ in range(random.randint(1, 3)):
        value = tree(random, value, keys)
    return json.dumps(value).encode()


def safetensors(random: Random, data: bytes) -> bytes:
    """A safetensors file with another header, other bytes, or a length that lies."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    action = random.randrange(8)
    if action == 0:
        return raw(random, data)
    if action == 1:
        near = length + random.randint(-40, 40), random.getrandbits(random.randint(1, 64))
        wrong = random.choice((0, 1, *near, len(data), 2**24, 2**40, 2**64 - 1))
        return struct.pack("<Q", wrong) + data[8:]
    if action == 2:
        at = random.randrange(max(len(body) // 4, 1)) * 4
        value = struct.pack("<f", random.choice((math.nan, math.inf, -math.inf, 0.0, 3e38)))
        body = body[:at] + random.choice((value, random.randbytes(4))) + body[at + 4 :]
    elif action == 3:
        body = raw(random, body)
    elif action == 4:
        header += b" " * random.choice((1, 8, 5000))
    else:
        header = text(random, header, ("__metadata__", "dtype", "shape", "data_offsets"))
    return struct.pack("<Q", len(header)) + header + body
