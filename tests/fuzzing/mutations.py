"""Changes to files: of bytes, of text, of JSON trees, of archives. Each is a function of a seed."""

from __future__ import annotations

import copy
import io
import json
import random
import re
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator

import pyarrow as pa
from pyarrow import parquet

Mutate = Callable[[bytes, random.Random], bytes]

_EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_NUMBERS = ("0", "-1", "1e400", "-1e400", "nan", "inf", "1e308", str(2**31), str(2**63), "9" * 400)
_TEXTS = (
    "",
    " ",
    "\0",
    "../../../../etc/passwd",
    "/dev/zero",
    "/vsizip//dev/null/x",
    "\u202e\ud7ff\ue000",
    "x" * 70_000,
    "!!python/object/apply:os.mkdir [executed]",
    "__import__('os').mkdir('executed')",
    "${HOME}",
    "*hm",
    "&amp;&x;",
)
_VALUES = (None, True, -1, 0, 1e308, float("nan"), 2**70, "", [], {}, [[]], {"a": {}}, [None] * 50)


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut, repeated, zeroed; more often where headers lie."""
    data = bytearray(content or b"\0")
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not data:
            break
        end = rng.choice((16, 512, len(data), len(data)))
        at = rng.randrange(min(end, len(data)))
        match rng.randrange(7):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.randrange(256)
            case 2:
                size = rng.choice((1, 2, 4, 8))
                order = rng.choice(("little", "big"))
                value = rng.choice(_EXTREMES) & (256**size - 1)
                data[at : at + size] = value.to_bytes(size, order)
            case 3:
                del data[at:]
            case 4:
                del data[at : at + rng.randrange(1, 64)]
            case 5:
                data[at:at] = data[at : at + rng.randrange(1, 256)]
            case _:
                size = min(rng.randrange(1, 64), len(data) - at)
                data[at : at + size] = bytes(size)
    return bytes(data)


def change_text(content: bytes, rng: random.Random) -> bytes:
    """Numbers, names, lines and marks of a text replaced, removed or doubled."""
    if rng.random() < 0.2:
        return change_bytes(content, rng)
    text = content.decode("utf-8", "replace")
    for _ in range(rng.choice((1, 1, 2, 4))):
        match rng.randrange(6):
            case 0:
                text = _replace(r"-?\d+(\.\d+)?", rng.choice(_NUMBERS), text, rng)
            case 1:
                text = _replace(r"[A-Za-z_]{2,}", rng.choice(_TEXTS), text, rng)
            case 2:
                text = _replace(r'"[^"]*"', json.dumps(rng.choice(_TEXTS)), text, rng)
            case 3:
                lines = text.split("\n")
                at = rng.randrange(len(lines))
                lines[at : at + 1] = [lines[at]] * rng.choice((0, 0, 2, 3))
                text = "\n".join(lines)
            case 4:
                text = _replace(
                    r"[][{}<>:=,/\"']", rng.choice(("", "{", "<", ":", "[[")), text, rng
                )
            case _:
                at = rng.randrange(len(text) + 1)
                text = text[:at] + rng.choice(("[" * 5000, "<a>" * 3000, "{a: " * 900, "\ufeff"))
    return text.encode("utf-8", "surrogatepass")


def _replace(pattern: str, new: str, text: str, rng: random.Random) -> str:
    found = list(re.finditer(pattern, text))
    if not found:
        return text
    one = rng.choice(found)
    return text[: one.start()] + new + text[one.end() :]


def change_json(content: bytes, rng: random.Random) -> bytes:
    """A value of a tree replaced, a key removed or renamed; sometimes the text itself."""
    if rng.random() < 0.3:
        return change_text(content, rng)
    tree = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            break
        holder, key = rng.choice(places)
        match rng.randrange(4):
            case 0:
                del holder[key]
            case 1:
                holder[key] = rng.choice(_TEXTS)
            case 2 if isinstance(holder, dict):
                holder[rng.choice(_TEXTS)] = holder.pop(key)
            case _:
                holder[key] = copy.deepcopy(rng.choice(_VALUES))
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def _places(tree: object) -> Iterator[tuple]:
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in items:
        yield tree, key
        yield from _places(value)


def change_parquet(content: bytes, rng: random.Random) -> bytes:
    """Texts that are not UTF-8, columns of other types, what pandas noted; or bytes."""
    if rng.random() < 0.3:
        return change_bytes(content, rng)
    table = parquet.read_table(io.BytesIO(content))
    notes = dict(table.schema.metadata)
    told = notes[b"pandas"]
    for _ in range(rng.choice((1, 1, 2))):
        column = rng.randrange(table.num_columns)
        name, size = table.column_names[column], table.num_rows
        match rng.randrange(4):
            case 0:
                texts = [change_bytes(rng.choice(_TEXTS).encode("utf-8", "replace"), rng)] * size
                held = pa.array(texts, pa.binary())
                if rng.random() < 0.8:
                    held = pa.StringArray.from_buffers(size, *held.buffers()[1:])
                table = table.set_column(column, name, held)
            case 1:
                table = table.set_column(column, name, rng.choice(_columns(size)))
            case 2:
                table = table.rename_columns(
                    [
                        rng.choice(table.column_names) if old == name else old
                        for old in table.column_names
                    ]
                )
            case _:
                notes[b"pandas"] = change_json(told, rng)
    out = io.BytesIO()
    parquet.write_table(table.replace_schema_metadata(notes), out)
    return out.getvalue()


def _columns(size: int) -> list[pa.Array]:
    """Columns of types that kelp does not write."""
    values = ([["a"]], {"a": 1}, b"a", None, True, -(2**63), 1e308, "x" * 300)
    return [pa.array([value] * size) for value in values]


def change_zip(content: bytes, rng: random.Random) -> bytes:
    """A member of a zip changed, missing, doubled, or of enormous size when unpacked."""
    if rng.random() < 0.4:
        return change_bytes(content, rng)
    out = io.BytesIO()
    with (
        warnings.catch_warnings(action="ignore"),  # of members with one name
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(out, "w") as new,
    ):
        names = old.namelist()
        chosen = rng.choice(names)
        for name in names:
            data = old.read(name)
            if name != chosen:
                new.writestr(name, data)
                continue
            match rng.randrange(4):
                case 0:
                    new.writestr(name, change_bytes(data, rng))
                case 1:
                    new.writestr(rng.choice(("x.npy", "../x.npy", "header.npy")), data)
                case 2:
                    bomb = zipfile.ZipInfo(name)
                    bomb.compress_type = zipfile.ZIP_DEFLATED
                    new.writestr(bomb, data + bytes(1 << 22))
                case _:
                    # A header of an array of 2^40 numbers; the numbers are not there.
                    header = (
                        b"{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,)}\n"
                    )
                    new.writestr(
                        name, b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header
                    )
    return out.getvalue()


def change_tar(content: bytes, rng: random.Random) -> bytes:
    """Members that climb out, links, devices, lies about sizes; or bytes."""
    if rng.random() < 0.4:
        return change_bytes(content, rng)
    out = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(content)) as old,
        tarfile.open(fileobj=out, mode="w") as new,
    ):
        for member in old.getmembers():
            file = old.extractfile(member)
            data = file.read() if file else b""
            if rng.random() < 0.2:
                match rng.randrange(6):
                    case 0:
                        member.name = f"../../{member.name}"
                    case 1:
                        member.name = f"/tmp/{member.name}"
                    case 2:
                        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                        data = b""
                    case 3:
                        member.type, member.linkname = tarfile.LNKTYPE, "../outside"
                        data = b""
                    case 4:
                        member.type, data = tarfile.CHRTYPE, b""
                    case _:
                        data = change_bytes(data[:4096], rng)
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    return out.getvalue()
