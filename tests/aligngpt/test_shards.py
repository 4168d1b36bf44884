"""aligngpt.data.shards and `aligngpt pack`: damage, attacks, interruptions, and tars that others made."""

import errno
import gc
import hashlib
import io
import json
import logging
import multiprocessing
import os
import pickle
import random
import re
import signal
import tarfile
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from aligngpt import pack
from aligngpt.cli import main
from aligngpt.data.llava_json import read_llava_json
from aligngpt.data.records import open_records
from aligngpt.data.shards import open_shards


def talk(*words):
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(words)]


def record(number, **change):
    return {
        "id": f"r{number}",
        "image": f"{number}.jpg",
        "conversations": talk("<image>\nWhat?", f"It {number}"),
    } | change


@pytest.fixture
def data(tmp_path):
    """11 records with an image each: data.json and images/."""
    (tmp_path / "images").mkdir()
    for number in range(11):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(random.Random(number).randbytes(500 + 100 * number))
    (tmp_path / "data.json").write_text(json.dumps([record(number) for number in range(11)]))
    return tmp_path


def packed(data, *options, out="packed", workers=0):
    """Pack 4 records to a shard by the command; returns the folder."""
    command = ["pack", str(data / "data.json"), "--image-folder", str(data / "images"), "--out", str(data / out)]
    assert main([*command, "--records-per-shard", "4", "--workers", str(workers), *options]) == 0
    return data / out


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def image(records, place, number=0):
    return records.image(records[place], number)


# ---------------------------------------------------------------------------------------------------- packing


def test_killed_at_every_step_packing_goes_on(data):
    """Killed with -9 before each file gets its name, then started again: the same bytes, no shard made twice."""
    expected = contents(packed(data, out="expected"))
    context = multiprocessing.get_context("fork")

    def pack_and_die(step):
        replace, rename, left = os.replace, os.rename, [step]

        def counted(call):
            def die_or_call(*args):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return call(*args)

            return die_or_call

        os.replace, os.rename = counted(replace), counted(rename)
        packed(data)

    for step in range(100):
        process = context.Process(target=pack_and_die, args=(step,))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert not (data / "packed").exists()
        shards = data / "packed.partial" / "shards"
        whole = {int(path.stem) for path in shards.parent.glob("00*.json")}
        made = {number: (shards / f"shard-{number:06d}.tar").stat().st_ino for number in whole}
        packed(data)
        for number, inode in made.items():
            assert (data / "packed" / f"shard-{number:06d}.tar").stat().st_ino == inode
        assert contents(data / "packed") == expected
        assert not (data / "packed.partial").exists()
        for path in (data / "packed").iterdir():
            path.unlink()
        (data / "packed").rmdir()
    assert step == 1 + 3 * 2 + 4 + 1  # plan, shards and their parts, index and manifest and sums, the folder


def test_the_command_killed_with_its_workers_at_work(data, monkeypatch):
    """A worker kills the command in the middle of a shard; the next one packs while orphans may still be there."""
    expected = contents(packed(data, out="expected"))

    def pack_and_die():
        read, command = pack.Source.image, os.getpid()

        def kill_and_read(source, sample, number):
            if sample.record == 6:
                os.kill(command, signal.SIGKILL)
            return read(source, sample, number)

        pack.Source.image = kill_and_read
        packed(data, workers=2)

    process = multiprocessing.get_context("fork").Process(target=pack_and_die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert contents(packed(data, workers=1)) == expected


def test_what_is_there_already(data, capsys):
    folder = packed(data)
    before = contents(folder)
    (data / "packed.partial").mkdir()  # left by a packing that was killed when all but its removal was done
    packed(data)
    assert not (data / "packed.partial").exists()
    assert "is finished; it holds these 11 records" in capsys.readouterr().out
    command = ["pack", str(data / "data.json"), "--image-folder", str(data / "images"), "--out"]
    assert main([*command, str(folder)]) == 2
    assert "holds a packing with another records_per_shard" in capsys.readouterr().err
    (data / "data.json").write_text(json.dumps([record(number, model="") for number in range(11)]))
    assert main([*command, str(folder), "--records-per-shard", "4"]) == 2
    assert "holds a packing with another records_sha256; needs a folder of its own" in capsys.readouterr().err
    assert contents(folder) == before
    assert main([*command, str(data / "images")]) == 2
    assert "images exists; packing needs a new or an empty folder" in capsys.readouterr().err
    assert main(["pack", str(folder), "--out", str(data / "again")]) == 2
    assert "is packed already" in capsys.readouterr().err


def test_the_beginning_of_another_packing_is_refused(data, capsys, monkeypatch):
    monkeypatch.setattr(pack, "_finish", lambda *_: (_ for _ in ()).throw(OSError("stopped")))
    command = ["pack", str(data / "data.json"), "--image-folder", str(data / "images"), "--out", str(data / "packed")]
    assert main([*command, "--workers", "0"]) == 2
    (data / "data.json").write_text(json.dumps([record(1)]))
    assert main([*command, "--workers", "0"]) == 2
    assert "packed.partial is the beginning of another packing" in capsys.readouterr().err


def test_packing_without_any_image(data, capsys):
    """With the wrong image folder: it says so each time. One image is enough, and data without any need none."""
    (data / "wrong").mkdir()
    command = ["pack", str(data / "data.json"), "--image-folder", str(data / "wrong"), "--workers", "0", "--out"]
    for _ in range(2):
        assert main([*command, str(data / "packed")]) == 1
        error = capsys.readouterr().err
        assert f"none of the 11 images is in {data / 'packed'}; remove it and pack with the --image-folder" in error
    (data / "wrong" / "3.jpg").write_bytes(b"3")
    assert main([*command, str(data / "again")]) == 0
    assert "10 images could not be packed" in capsys.readouterr().err


def test_packing_into_the_folder_where_we_are(data, capsys, monkeypatch):
    expected = contents(packed(data))
    (data / "here").mkdir()
    monkeypatch.chdir(data / "here")
    command = ["pack", str(data / "data.json"), "--image-folder", str(data / "images"), "--workers", "0", "--out", "."]
    assert main([*command, "--records-per-shard", "4"]) == 0
    assert contents(data / "here") == expected
    assert re.search(r"3 shards, \d\d\.\d+ kB$", capsys.readouterr().out)
    monkeypatch.chdir(data / "here")  # the new one
    assert main([*command, "--records-per-shard", "4"]) == 0
    assert f"{data / 'here'} is finished" in capsys.readouterr().out
    (data / "there").mkdir()
    monkeypatch.chdir(data / "there")
    pack.pack(pack.read_source(data / "data.json", data / "images"), ".", records_per_shard=4)
    assert contents(data / "there") == expected


def test_files_are_on_the_disk_before_they_get_their_names(data, monkeypatch):
    synced, named = set(), []
    sync, replace = os.fsync, os.replace

    def noted_sync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def noted_replace(source, target):
        assert os.stat(source).st_ino in synced
        named.append(os.path.basename(target))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    folder = packed(data)
    assert set(contents(folder)) < set(named)
    assert {folder.stat().st_ino, data.stat().st_ino} < synced


def test_two_packings_at_once(data, capsys):
    """The second is refused while the first runs."""
    source = pack.read_source(data / "data.json", data / "images")
    read = source.records.image
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

    def second():
        try:
            pack.pack(source, data / "packed", records_per_shard=4)
        except ValueError as error:
            sender.send(str(error))

    def read_and_pack(sample, number):
        if sample.record == 5:
            process = multiprocessing.get_context("fork").Process(target=second)
            process.start()
            process.join()
        return read(sample, number)

    source.records.image = read_and_pack
    pack.pack(source, data / "packed", records_per_shard=4)
    assert "packed.partial is in use by another process" in receiver.recv()


@pytest.mark.parametrize("workers", [0, 1])
def test_disk_full_leaves_nothing_half_written(data, capsys, monkeypatch, workers):
    """In the middle of the second shard; then there is space."""
    expected = contents(packed(data, out="expected"))
    monkeypatch.setattr(pack._Tar, "_write", full_after(8000, pack._Tar._write))
    command = ["pack", str(data / "data.json"), "--image-folder", str(data / "images"), "--out", str(data / "packed")]
    assert main([*command, "--records-per-shard", "4", "--workers", str(workers)]) == 2
    error = capsys.readouterr().err
    assert "no space is left for" in error
    assert "packing goes on from them" in error
    assert not (data / "packed").exists()
    names = {path.name for path in (data / "packed.partial").rglob("*") if path.is_file()}
    assert names <= {"lock", "plan.json", "shard-000000.tar", "000000.json"}
    monkeypatch.undo()
    assert contents(packed(data)) == expected


def full_after(num_bytes, write):
    def limited(tar, data):
        if tar.size > num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tar, data)

    return limited


def test_fault_13_fault_15_fault_16_fault_17_images_that_stay_outside(data, capsys):
    """They are listed, marked, and their bytes are nowhere in the shards; the records keep their places."""
    secret = b"a secret outside the folder"
    (data / "secret.jpg").write_bytes(secret)
    (data / "images" / "link.jpg").symlink_to(data / "secret.jpg")
    (data / "images" / "folder.jpg").mkdir()
    os.mkfifo(data / "images" / "pipe.jpg")
    (data / "images" / "loop.jpg").symlink_to("loop.jpg")
    (data / "images" / "huge.jpg").touch()
    os.truncate(data / "images" / "huge.jpg", pack.MAX_BYTES + 1)  # a hole
    names = ["../secret.jpg", str(data / "secret.jpg"), "link.jpg", "http://127.0.0.1:9/a.jpg", "file:///etc/passwd"]
    names += ["folder.jpg", "pipe.jpg", "huge.jpg", "loop.jpg", "0.jpg", *(f"no{number}.jpg" for number in range(5))]
    (data / "data.json").write_text(json.dumps([record(number, image=name) for number, name in enumerate(names)]))
    records = open_shards(packed(data))
    error = capsys.readouterr().err
    assert error.startswith("14 images could not be packed")
    for place, reason in enumerate(["leaves the image folder"] * 2 + ["is a link out of"] + ["is a URL"] * 2):
        assert f"record {place} (id r{place}): " in error
        assert reason in error.splitlines()[place + 1]
    assert [line.rpartition(": ")[2] for line in error.splitlines()[6:10]] == [
        "image name 'folder.jpg' is no plain file; it must not be a folder, a pipe or a device",
        "image name 'pipe.jpg' is no plain file; it must not be a folder, a pipe or a device",
        f"{pack.MAX_BYTES + 1} bytes; at most {pack.MAX_BYTES} are packed",
        "no such file",
    ]
    assert error.splitlines()[11:] == ["  …"]
    assert secret not in b"".join(contents(data / "packed").values())
    assert list(records) == read_llava_json(data / "data.json")
    for place, name in enumerate(names):
        if place == 9:
            assert image(records, place) == (data / "images" / "0.jpg").read_bytes()
        else:
            with pytest.raises(ValueError, match="was missing when the data were packed") as info:
                image(records, place)
            assert str(info.value).startswith(f"{name}: ")


def test_fault_21_malformed_records_stop_packing_before_anything_is_written(data, capsys):
    (data / "data.json").write_text(json.dumps([record(0), record(1, conversations=3)]))
    command = ["pack", str(data / "data.json"), "--image-folder", str(data / "images"), "--out", str(data / "packed")]
    assert main(command) == 2
    assert "data.json: record 1 (id 'r1'): 'conversations' is 3" in capsys.readouterr().err
    (data / "data.json").write_text(json.dumps([record(0)]))
    assert main(["pack", str(data / "data.json"), "--out", str(data / "packed")]) == 2
    assert "data.json: record 0 has an image; packing needs an image folder" in capsys.readouterr().err
    assert not list(data.glob("packed*"))


@pytest.fixture
def server():
    """http://127.0.0.1:port that behaves well and badly by path."""

    moved = {"/moved": "/good.jpg", "/file": "file:///etc/passwd", "/ftp": "ftp://127.0.0.1/a", "/round": "/round"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path in moved:
                self.send_response(302)
                self.send_header("Location", moved[self.path])
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif self.path in ("/good.jpg?size=1", "/good.jpg", "/short", "/large"):
                self.send_response(200)
                length = {"/short": 100, "/large": 5000}.get(self.path, 5)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(b"x" * length if self.path == "/large" else b"image")
            else:
                self.send_error(404)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_fault_17_urls_are_fetched_where_asked_for(data, server, capsys, monkeypatch):
    """Files beside them are packed as ever. Redirects lead to http alone; size and length are held to."""
    monkeypatch.setattr(pack, "MAX_BYTES", 2000)
    monkeypatch.setenv("no_proxy", "*")
    paths = ["/good.jpg?size=1", "/moved", "/file", "/ftp", "/round", "/short", "/large", "/none"]
    names = ["0.jpg", *(server + path for path in paths), "file:///etc/passwd", "http://[", "FTP://127.0.0.1/a.jpg"]
    (data / "data.json").write_text(json.dumps([record(number, image=name) for number, name in enumerate(names)]))
    records = open_shards(packed(data, "--download"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("9 images could not be packed")
    reasons = [
        "not allowed",
        "leads to ftp://127.0.0.1/a; only http",
        "infinite loop",
        "95 bytes too early",
        "more than 2000 bytes",
    ]
    reasons += ["404", "is a URL", "Invalid IPv6", "is a URL"]
    for line, reason in zip(lines[1:], reasons, strict=True):
        assert reason in line
    assert [image(records, place) for place in (1, 2)] == [b"image", b"image"]
    assert image(records, 0) == (data / "images" / "0.jpg").read_bytes()
    for place in range(3, len(names)):
        with pytest.raises(ValueError, match="was missing when the data were packed"):
            image(records, place)


# ---------------------------------------------------------------------------------------------------- damage


def test_fault_06_flipped_bits_are_found_at_each_access(data):
    """One bit of every record's JSON and of every image, one after the other; the others stay usable."""
    folder = packed(data)
    shard = folder / "shard-000001.tar"
    whole = shard.read_bytes()
    rows, images = np.load(folder / "records.npy"), np.load(folder / "images.npy")
    records = open_shards(folder)
    good = [(records[place], image(records, place)) for place in range(11)]
    for place in (4, 7):
        for offset, size, of_image in (
            (*rows[["offset", "size"]][place], False),
            (*images[["offset", "size"]][place], True),
        ):
            damaged = bytearray(whole)
            damaged[offset + size - 1] ^= 4
            shard.write_bytes(damaged)
            for number in range(11):
                if number != place:
                    assert (records[number], image(records, number)) == good[number]
            if of_image:
                assert records[place] == good[place][0]
                with pytest.raises(ValueError, match=rf"^{place}.jpg: its bytes in .*shard-000001.tar are not those"):
                    image(records, place)
            else:
                with pytest.raises(ValueError, match=rf"shard-000001.tar: record {place}: its bytes are not those"):
                    records[place]


@pytest.mark.parametrize("cut", ["in the JSON", "in the image", "gone"])
def test_fault_20_what_lies_before_the_cut_stays_usable(data, caplog, cut):
    folder = packed(data)
    shard = folder / "shard-000001.tar"
    rows, images = np.load(folder / "records.npy"), np.load(folder / "images.npy")
    if cut == "gone":
        shard.unlink()
    else:
        os.truncate(shard, (rows if cut == "in the JSON" else images)["offset"][6] + 10)
    with caplog.at_level(logging.WARNING):
        records = open_shards(folder)
    (message,) = caplog.messages
    assert f"{shard} has " in message
    expected = read_llava_json(data / "data.json")
    usable = [*range(4), *([4, 5] if cut != "gone" else []), *range(8, 11)]
    for place in range(11):
        if place in usable:
            assert records[place] == expected[place]
            assert image(records, place) == (data / "images" / f"{place}.jpg").read_bytes()
        elif place == 6 and cut == "in the image":
            with pytest.raises(
                ValueError, match=rf"^6.jpg: lies in {shard} from byte \d+ to \d+, where the file is cut"
            ):
                image(records, place)
        else:
            with pytest.raises(ValueError, match=rf"{shard}: record {place}: .*(cut|can't be read)"):
                records[place]


def test_a_damaged_index_or_manifest_is_refused(data):
    folder = packed(data)
    for name, message in (
        ("records.npy", "records.npy: SHA-256 is .*; manifest.json needs "),
        ("images.npy", "images.npy: SHA-256 is "),
        ("manifest.json", r"manifest.json: (line|.*not UTF-8)|does not describe"),
    ):
        whole = (folder / name).read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            if name == "manifest.json" and place:
                continue  # a flipped digit of a number is a manifest of other files
            (folder / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(ValueError, match=message):
                open_shards(folder)
        (folder / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=message):
            open_shards(folder)
        (folder / name).write_bytes(whole)
    manifest = json.loads((folder / "manifest.json").read_text())
    for change, message in (
        ({"index": ["records.npy", "images.npy"]}, "does not describe"),
        ({"format": 2}, "format is 2; this version reads 1"),
        ({"shards": [{"name": "../../etc/passwd", "bytes": 1}]}, "does not describe"),
        ({"index": {}}, "does not describe"),
        ({"shards": 3}, "does not describe"),
    ):
        (folder / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ValueError, match=message):
            open_shards(folder)


def resealed(folder, **change):
    """Make the manifest one of the index as it is."""
    manifest = json.loads((folder / "manifest.json").read_text()) | change
    for name in ("records.npy", "images.npy"):
        if (folder / name).is_file():
            manifest["index"][name] = {"sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_crafted_index_with_a_manifest_to_match_is_refused(data):
    """Every way in which it may lead out of the shards, or to another record's images."""
    (data / "data.json").write_text(json.dumps([record(0, image=["0.jpg", "1.jpg"]), *map(record, range(1, 11))]))
    folder = packed(data)
    whole = {name: (folder / name).read_bytes() for name in ("records.npy", "images.npy", "manifest.json")}
    manifest = json.loads(whole["manifest.json"])

    def refused(message, **change):
        resealed(folder, **change)
        with pytest.raises(ValueError, match=message):
            open_shards(folder)
        for name, content in whole.items():
            (folder / name).unlink(missing_ok=True)
            (folder / name).write_bytes(content)

    for name, field, place, value in (
        ("records.npy", "shard", 3, 3),
        ("records.npy", "shard", 3, -1),
        ("records.npy", "size", 3, -1),
        ("records.npy", "first_image", 3, 3),
        ("records.npy", "first_image", 10, 1 << 40),
        ("records.npy", "num_images", 10, 2),
        ("records.npy", "num_images", 10, 0),
        ("images.npy", "size", 11, -2),
    ):
        array = np.load(folder / name)
        array[field][place] = value
        np.save(folder / name, array)
        refused("the index does not fit 3 shards and 12 images; needs")
    array = np.load(folder / "records.npy")
    array["num_images"][4:6] = 3, -1
    array["first_image"][5] += 2
    np.save(folder / "records.npy", array)
    refused("the index does not fit 3 shards and 12 images; needs")
    refused("the index does not fit 0 shards and 12 images", shards={})
    refused("the index does not fit 2 shards and 12 images", shards=manifest["shards"][:2])

    (folder / "images.npy").write_bytes(b"")
    refused("images.npy can't be mapped")
    huge = whole["images.npy"].replace(b"(12,)", b"(%d,)" % 2**70)
    for content in (huge, huge.replace(b"%d" % 2**70, b"-1"), huge.replace(b"(", b"[")):
        (folder / "images.npy").write_bytes(content)
        refused("images.npy can't be mapped|has rows of")
    with (folder / "images.npy").open("wb") as file:
        np.savez(file, np.arange(3))
    refused("images.npy can't be mapped")
    (folder / "images.npy").unlink()
    refused(r"images.npy can't be read \(No such file")
    for name in ("images.npy", "shard-000001.tar"):
        (folder / name).rename(data / name)
        os.mkfifo(folder / name)
        with pytest.raises(ValueError, match=f"{name} is no plain file"):
            open_shards(folder)
        (data / name).replace(folder / name)

    array = np.load(folder / "records.npy")
    array["num_images"][:2] = 1, 2  # the sums are right, and the checksums of all images
    array["first_image"][1] = 1
    np.save(folder / "records.npy", array)
    resealed(folder)
    records = open_shards(folder)
    assert image(records, 2) == (data / "images" / "2.jpg").read_bytes()
    pickled = pickle.dumps(records)
    for place in (0, 1):
        with pytest.raises(
            ValueError, match=rf"^{place}.jpg: the record has .* images, the index of .*packed {place + 1}"
        ):
            image(records, place)
    (folder / "images.npy").unlink()
    with pytest.raises(ValueError, match=r"images.npy can't be mapped"):
        pickle.loads(pickled)


def test_what_is_too_large_is_not_read(data, monkeypatch, capsys):
    """An image and a record, of a packed set and of another's tars; nor is such a record packed."""
    long = record(3, conversations=talk("<image>\nWhat?", "word " * 200))
    (data / "data.json").write_text(json.dumps([*map(record, range(3)), long, *map(record, range(4, 11))]))
    folder = packed(data)
    (data / "set").mkdir()
    for path in folder.glob("*.tar"):
        (data / "set" / path.name).write_bytes(path.read_bytes())
    both = [open_records(folder), open_records(data / "set")]
    monkeypatch.setattr("aligngpt.image.MAX_BYTES", 1000)
    for records in both:
        assert [len(image(records, place)) for place in range(6)] == [500, 600, 700, 800, 900, 1000]
        with pytest.raises(ValueError, match=r"^6.jpg: 1100 bytes; at most 1000 are read"):
            image(records, 6)
    for module in ("data.shards", "pack"):
        monkeypatch.setattr(f"aligngpt.{module}.MOST_TEXT", 1000)
    with pytest.raises(ValueError, match=r"shard-000000.tar: record 3: 11\d\d bytes; at most 1000 are read"):
        both[0][3]
    assert [both[0][place].id for place in (2, 4)] == ["r2", "r4"]
    with pytest.raises(ValueError, match=r"member '000000003.json' has 11\d\d bytes; at most 1000 are read"):
        open_records(data / "set")
    command = ["pack", str(data / "data.json"), "--image-folder", str(data / "images"), "--out", str(data / "again")]
    assert main(command) == 2
    assert "data.json: record 3 has 11" in capsys.readouterr().err
    assert not list(data.glob("again*"))


def test_reads_that_give_less_than_asked_for(data, monkeypatch):
    records = open_shards(packed(data))
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: read(descriptor, min(size, 100), offset))
    assert image(records, 9) == (data / "images" / "9.jpg").read_bytes()
    assert records[9].id == "r9"


def test_opening_costs_the_same_for_ten_times_the_records(data):
    """Of 200 and 2000 records: what is read beyond the index and the manifest, and what Python and NumPy hold after. No
    page of the index is resident before the first access."""
    line = record(0, conversations=talk("<image>\nWhat?", "word " * 400))
    costs = []
    open_shards(packed(data, out="imports"))[0]
    for count in (200, 2000):
        (data / "data.json").write_text(json.dumps([line] * count))
        folder = packed(data, "--records-per-shard", "200", out=str(count))
        alone = sum((folder / name).stat().st_size for name in ("records.npy", "images.npy", "manifest.json"))
        gc.collect()
        tracemalloc.start()
        before = bytes_read()
        records = open_shards(folder)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert resident(folder) == [0, 0]
        assert (records[count // 2].id, len(image(records, count // 2))) == ("r0", 500)
        costs.append((bytes_read() - before - alone, held))
    (read, held), (read_of_ten, held_of_ten) = costs
    assert sum(path.stat().st_size for path in folder.glob("*.tar")) > 5_000_000
    assert abs(read_of_ten - read) < 200_000  # the index's headers come with a buffer of what follows
    assert held_of_ten - held < 20_000  # names of shards


def bytes_read():
    with open("/proc/self/io") as file:
        return int(file.read().split()[1])


def resident(folder):
    """KiB of each mapping of the index."""
    with open("/proc/self/smaps") as file:
        areas = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", file.read(), flags=re.MULTILINE)
    return [int(re.search(r"^Rss: +(\d+)", area, re.MULTILINE)[1]) for area in areas if f"{folder}/" in area]


@pytest.mark.parametrize("name", ["shard-000001.tar", "records.npy", "manifest.json"])
def test_fault_16_links_out_of_the_folder_are_refused(data, name):
    folder = packed(data)
    (folder / name).rename(data / name)
    (folder / name).symlink_to(data / name)
    with pytest.raises(ValueError, match=f"{name} is a link out of its folder; it must stay in there"):
        open_shards(folder)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_fault_19_pickles_are_never_loaded(data):
    """As an array of the index, with a manifest to match, and as members of a tar."""
    trap = data / "trapped"
    tar = write_tar(
        data / "others" / "a.tar",
        [
            ("0.jpg", b"picture"),
            ("0.txt", b"words"),
            *((f"0.{kind}", pickle.dumps(Trap(trap))) for kind in ("pkl", "pyd", "pickle", "pth", "npy", "cls")),
        ],
    )
    records = open_records(tar.parent)
    assert (len(records), image(records, 0)) == (1, b"picture")
    assert main(["pack", str(tar), "--workers", "0", "--out", str(data / "again")]) == 0
    assert b"mkdir" not in b"".join(contents(data / "again").values())

    folder = packed(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    for content in (pickle.dumps(Trap(trap)), saved(np.array([Trap(trap)], dtype=object))):
        manifest["index"]["records.npy"] = pack._checked(folder / "records.npy", content)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=r"records.npy can't be mapped"):
            open_shards(folder)
    manifest["index"]["records.npy"] = pack._checked(folder / "records.npy", saved(np.zeros(11)))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="has rows of float64"):
        open_shards(folder)
    assert not trap.exists()


def saved(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_a_set_without_images_and_one_without_records(data):
    (data / "data.json").write_text(json.dumps([{"conversations": talk("a", "b")}] * 5))
    records = open_shards(packed(data))
    assert (len(records), records.num_images.sum(), records[4].id) == (5, 0, "4")
    (data / "data.json").write_text("[]")
    records = open_shards(packed(data, out="empty"))
    assert (len(records), list(records), records.levels.tolist()) == (0, [], [])


# ---------------------------------------------------------------------------------------------------- others' tars


def write_tar(path, members):
    """members: (name, bytes), or a TarInfo."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def dump(content):
    return json.dumps(content).encode()


def test_webdataset_tars(tmp_path):
    """LLaVA records and captions, several images, folders, long names, keys that repeat, members that are no data."""
    long = "a" * 150 + "/" + "é" * 60
    folder = tarfile.TarInfo("sub/")
    folder.type = tarfile.DIRTYPE
    write_tar(
        tmp_path / "set" / "b.tar",
        [
            ("sub/x.jpg", b"1"),
            ("sub/x.json", dump({"caption": "in the json", "url": "http://x"})),
            ("sub/x.txt", b" in the text \n"),
            ("z.json", dump({"caption": "only there"})),
            ("z.cls", b"3"),
            ("z.left.PNG", b"2"),
            ("z.right.png", b"3"),
        ],
    )
    write_tar(
        tmp_path / "set" / "a.tar",
        [
            folder,
            ("README", b"no key"),
            ("._k.jpg", b"no key either"),
            ("k.json", dump(record(0, image=["p/second.jpg", "first.jpg"], conversations=talk("<image><image>", "a")))),
            ("k.1.jpg", b"1"),
            ("k.0.jpg", b"0"),
            (f"{long}.0.25.jpg", b"4"),
            (f"{long}.txt", "日本".encode()),
            ("k.json", dump({"conversations": talk("no", "image")})),
            ("l.json", dump(record(1))),
        ],
    )
    (tmp_path / "set" / "notes.txt").write_text("not a shard")
    records = open_records(tmp_path / "set")
    assert [sample.id for sample in records] == ["r0", long, "2", "r1", "sub/x", "z"]
    assert [sample.images for sample in records] == [
        ("p/second.jpg", "first.jpg"),
        (f"{long}.0.25.jpg",),
        (),
        ("1.jpg",),
        ("sub/x.jpg",),
        ("z.left.PNG", "z.right.png"),
    ]
    words = [[(turn.role, turn.text) for turn in sample.turns] for sample in records]
    assert words[1] == [("user", "<image>"), ("assistant", "日本")]
    assert words[4:] == [
        [("user", "<image>"), ("assistant", "in the text")],
        [("user", "<image>\n<image>"), ("assistant", "only there")],
    ]
    got = [image(records, place, number) for place, number in ((0, 0), (0, 1), (1, 0), (4, 0), (5, 0), (5, 1))]
    assert got == [b"0", b"1", b"4", b"1", b"2", b"3"]
    with pytest.raises(ValueError, match=r"^1.jpg: .*set holds no image for it"):
        image(records, 3)

    assert main(["pack", str(tmp_path / "set"), "--workers", "0", "--out", str(tmp_path / "packed")]) == 0
    again = open_records(tmp_path / "packed")
    assert (list(again), again.sha256) == (list(records), records.sha256)
    assert [image(again, place, number) for place, number in ((0, 0), (0, 1), (5, 1))] == [b"0", b"1", b"3"]


def special(kind, name="0.jpg", target="/etc/passwd"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (("../0.jpg", b"1"), r"'../0.jpg' leaves the archive"),
        (("a/../../0.jpg", b"1"), r"leaves the archive"),
        (("a\\..\\0.jpg", b"1"), r"leaves the archive"),
        (("/etc/0.jpg", b"1"), r"'/etc/0.jpg' leaves the archive"),
        (special(tarfile.SYMTYPE), r"'0.jpg' is of type b'2'"),
        (special(tarfile.LNKTYPE), r"'0.jpg' is of type b'1'"),
        (special(tarfile.CHRTYPE), r"is of type b'3'"),
        (special(tarfile.BLKTYPE), r"is of type b'4'"),
        (special(tarfile.FIFOTYPE), r"is of type b'6'"),
        (special(tarfile.GNUTYPE_SPARSE), r"is of type b'S'"),
        (special(tarfile.SYMTYPE, "no key"), r"'no key' is of type"),
    ],
)
def test_fault_18_members_that_lead_out(tmp_path, member, message):
    path = write_tar(tmp_path / "set" / "a.tar", [("0.txt", b"words"), member])
    with pytest.raises(ValueError, match=rf"{path}: member .*{message}"):
        open_records(path)


def header(name, size, kind=tarfile.REGTYPE):
    """A member's header that states any size."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=True)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (header("b.jpg", -512), "member 'b.jpg' has -512 bytes; needs 0 at least"),  # leads back to itself
        (header("b.jpg", -5120), "member 'b.jpg' has -5120 bytes"),
        (
            header("x", 1 << 21, tarfile.XHDTYPE) + bytes(1 << 21) + header("b.jpg", 0),
            "a header of 2097152 bytes at byte",
        ),
        (header("x", 1 << 60, tarfile.GNUTYPE_LONGNAME), f"a header of {1 << 60} bytes at byte"),
        (header("x", -512, tarfile.XGLTYPE) + header("b.jpg", 0), "a header of -512 bytes at byte"),
    ],
)
def test_fault_18_headers_that_would_hang_or_fill_memory(tmp_path, monkeypatch, blocks, message):
    """Behind a whole sample: the tar is refused all the same."""
    path = write_tar(tmp_path / "set" / "a.tar", [("0.txt", b"words"), ("0.jpg", b"1")])
    path.write_bytes(path.read_bytes()[:2048] + blocks + bytes(1024))
    left, read_next = [20], tarfile.TarFile.next

    def counted(tar):
        left[0] -= 1
        assert left[0], "it goes on for ever"
        return read_next(tar)

    monkeypatch.setattr(tarfile.TarFile, "next", counted)
    with pytest.raises(ValueError, match=f"{path}: {message}"):
        open_records(path)


def test_fault_13_a_caption_without_its_image_is_a_problem(tmp_path):
    """It is no error: the others are read, and training drops it. Packing keeps it as it is."""
    members = [("a.txt", b"words"), ("a.jpg", b"1"), ("b.txt", b"alone"), ("c.json", dump({"caption": "alone"}))]
    path = write_tar(tmp_path / "set" / "a.tar", [*members, ("d.txt", b"words"), ("d.jpg", b"4")])
    records = open_records(path)
    problem = "the text has 1 <image> marks; needs one for each of 0 images"
    assert [(sample.id, sample.problem) for sample in records] == [
        ("a", None), ("b", problem), ("c", problem), ("d", None)
    ]  # fmt: skip
    assert image(records, 3) == b"4"
    assert main(["pack", str(path), "--workers", "0", "--out", str(tmp_path / "packed")]) == 0
    assert list(open_records(tmp_path / "packed")) == list(records)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.jpg", b"1"), ("0.cls", b"1")], "'0' has jpg, cls; needs a .json with 'conversations', or an image"),
        ([("0.jpg", b"1"), ("0.json", b'{"caption": null}')], "'0' has jpg, json; needs"),
        ([("0.jpg", b"1"), ("0.txt", b"\xff")], "'0'.txt is not UTF-8"),
        ([("0.jpg", b"1"), ("0.json", b"{")], "'0'.json: line 1, column 2"),
        ([("0.txt", b"1"), ("0.txt", b"1")], "member '0.txt' is there twice"),
        (
            [("0.jpg", b"1"), ("0.png", b"1"), ("0.json", dump(record(0)))],
            r"'0' has 2 images, '0.png' among .* needs 1",
        ),
        ([("0.json", dump(record(0, conversations=3)))], r"'0' \(id 'r0'\): 'conversations' is 3"),  # fault 21
        ([], "holds no sample"),
    ],
)
def test_fault_21_members_that_are_no_sample(tmp_path, members, message):
    path = write_tar(tmp_path / "set" / "a.tar", members)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        open_records(path)


def test_fault_20_a_tar_cut_anywhere_gives_the_samples_before(tmp_path, caplog):
    """At every 64th byte. A cut between two whole samples loses none, but is told of: nobody can know."""
    members = []
    for number in range(4):
        members += [(f"{number}.json", dump(record(number))), (f"{number}.jpg", b"%d" % number * 600)]
    path = write_tar(tmp_path / "set" / "a.tar", members)
    other = write_tar(path.with_name("b.tar"), [("x.txt", b"words"), ("x.jpg", b"9")])
    with tarfile.open(path) as tar:
        ends = [info.offset_data + info.size for info in tar if info.name.endswith("jpg")]
        end_mark = tar.offset
    whole = path.read_bytes()
    for length in range(0, end_mark + 512, 64):
        path.write_bytes(whole[:length])
        caplog.clear()
        records = open_records(tmp_path / "set")
        kept = sum(end <= length for end in ends)
        assert [sample.id for sample in records] == [*(f"r{number}" for number in range(kept)), "x"]
        assert [image(records, number) for number in range(kept)] == [b"%d" % number * 600 for number in range(kept)]
        assert image(records, kept) == b"9"
        (message,) = caplog.messages
        assert message == f"{path} is cut after {length} bytes; only the samples before it are used"
    start = -(-ends[1] // 512) * 512
    damaged = whole[:start] + b"damage" + whole[start + 6 :]
    path.write_bytes(damaged)
    caplog.clear()
    assert [sample.id for sample in open_records(tmp_path / "set")] == ["r0", "r1", "x"]
    assert caplog.messages == [f"{path} is damaged at byte {start}; only the samples before it are used"]
    assert other.exists()


def test_fault_20_a_cut_never_alters_a_caption(tmp_path, caplog):
    """At every 64th byte: the last sample has all its images, or is not there."""
    members = [(f"{key}.{kind}", b"1" * 600) for key in "abc" for kind in ("txt", "0.jpg", "1.jpg")]
    path = write_tar(tmp_path / "set" / "a.tar", members)
    whole = open_records(path)
    with tarfile.open(path) as tar:
        names = {info.name: info.offset for info in tar}
        end = tar.offset
    content = path.read_bytes()
    for length in range(names["b.txt"] + 2048, end + 512, 64):
        path.write_bytes(content[:length])
        records = open_records(path)
        assert list(records) == whole[: len(records)]
        assert len(records) == 1 + (length >= names["c.txt"] + 512 + 600)
    assert len(caplog.messages) > 100


def test_what_is_no_tar_and_compressed_ones(tmp_path):
    (tmp_path / "set").mkdir()
    page = tmp_path / "set" / "a.tar"
    page.write_bytes(b"<html>" + b" " * 2000)
    with pytest.raises(ValueError, match=rf"{page} is no tar"):
        open_records(tmp_path / "set")
    with tarfile.open(page, "w:gz"):
        pass
    with pytest.raises(ValueError, match=rf"{page} is a compressed tar; needs a plain one"):
        open_records(page)
    for name in ("b.tar.gz", "b.tgz", "b.tar.zst"):
        other = page.rename(page.with_name(name))
        for path in (other, tmp_path / "set"):
            with pytest.raises(ValueError, match=rf"{other} is a compressed tar; needs a plain one"):
                open_records(path)
        page = other
    page.unlink()
    (tmp_path / "set" / "link.tar").symlink_to(write_tar(tmp_path / "x.tar", [("0.txt", b"a"), ("0.jpg", b"b")]))
    with pytest.raises(ValueError, match=r"link.tar is a link out of its folder; it must stay in there"):  # fault 16
        open_records(tmp_path / "set")


def test_more_shards_than_a_process_keeps_open(data, monkeypatch):
    monkeypatch.setattr("aligngpt.data.shards._MOST_OPEN", 2)
    folder = packed(data)
    gc.collect()  # what earlier tests had open
    before = len(os.listdir("/proc/self/fd"))
    records = open_shards(folder)
    for place in [0, 4, 8, 10, 5, 1] * 3:
        assert image(records, place) == (data / "images" / f"{place}.jpg").read_bytes()
    assert len(os.listdir("/proc/self/fd")) == before + 2 + 2  # and the mapped index
    del records
    assert len(os.listdir("/proc/self/fd")) == before
