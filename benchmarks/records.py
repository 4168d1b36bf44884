"""How long opening a data set takes, how much memory it holds, and what one sample costs: packed shards against JSON.

    python -m benchmarks.records --records 665000

Makes records of the lengths of LLaVA's 665K (about 1.5 KB of JSON, a picture in 15 of 16) with pictures of 400 random
bytes, as JSON and packed by `aligngpt pack`. Pictures are not decoded: reading them is all that is measured. Then new
processes open the sets, one after the other: seconds, resident memory (MiB of /proc/self/smaps_rollup) and how much of
it came after Python and its imports, microseconds for one record at random with its picture, all pages cached. Last,
four processes open the packed set and read its whole index: the part of the memory that is theirs alone and the share
of what they have in common. All samples of both kinds must have the same hash.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ACCESSES, PROCESSES, PICTURES = 2000, 4, 1000


def memory() -> dict[str, float]:
    """MiB of this process: resident, private to it, and its proportional share."""
    found: dict[str, float] = {"private": 0}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, kib = line.split()[:2]
        if name in ("Rss:", "Pss:"):
            found[{"Rss:": "resident", "Pss:": "share"}[name]] = int(kib) / 1024
        elif name.startswith("Private_"):
            found["private"] += int(kib) / 1024
    return found


def measure(path: str, images: str | None, wait: bool) -> None:
    """Open a set in this process and print what that took. wait: until standard input ends, with the set open."""
    from aligngpt.data.records import open_records

    before = memory()
    started = time.perf_counter()
    records = open_records(path, images)
    seconds = time.perf_counter() - started
    after = memory()
    started = time.perf_counter()
    digest = records.sha256
    hash_seconds = time.perf_counter() - started
    index = int(records.num_images.sum() + records.num_characters.sum() + records.levels.sum())  # all its pages
    generator = random.Random(0)
    places = [generator.randrange(len(records)) for _ in range(ACCESSES)]
    microseconds = []
    for _ in range(2):  # the first brings the pages in
        started = time.perf_counter()
        for place in places:
            sample = records[place]
            for number in range(len(sample.images)):
                source = records.image(sample, number)
                if not isinstance(source, bytes):
                    source.read_bytes()
        microseconds.append((time.perf_counter() - started) / ACCESSES * 1e6)
    if wait:
        print(flush=True)
        sys.stdin.readline()
    used = memory()
    result = {"records": len(records), "sha256": digest, "index": index, "open_s": seconds, "hash_s": hash_seconds}
    print(
        json.dumps(result | {"access_us": microseconds[1], "before": before, "after": after, "used": used}), flush=True
    )
    if wait:
        sys.stdin.readline()


def start(path: Path, images: Path | None = None, wait: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.records", "--measure", str(path)]
    command += ["--images", str(images)] if images else []
    command += ["--wait"] if wait else []
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def measured(path: Path, images: Path | None = None) -> dict[str, Any]:
    output, _ = start(path, images).communicate()
    return json.loads(output)


def measured_together(path: Path) -> list[dict[str, Any]]:
    """Processes that have the set open at the same time."""
    processes = [start(path, wait=True) for _ in range(PROCESSES)]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()  # it has read everything
    results = []
    for process in processes:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        results.append(json.loads(process.stdout.readline()))
    for process in processes:
        process.communicate()
    return results


def make(folder: Path, num_records: int) -> Path:
    """data.json and images/ as the module's docstring says; returns the former."""
    generator = random.Random(num_records)
    (folder / "images").mkdir(parents=True)
    for number in range(PICTURES):
        (folder / "images" / f"{number:012d}.jpg").write_bytes(generator.randbytes(400))
    words = [f"{''.join(generator.choices('abcdefghijklmnop', k=generator.randrange(2, 9)))} " for _ in range(5000)]
    path = folder / "data.json"
    with path.open("w") as file:
        for number in range(num_records):
            has_image = number % 16 != 0
            talk = []
            for turn in range(2 * generator.randrange(1, 8)):
                length = generator.randrange(2, 20) if turn % 2 == 0 else generator.randrange(2, 60)
                mark = "<image>\n" if has_image and turn == 0 else ""
                text = mark + "".join(generator.choices(words, k=length))
                talk.append({"from": ("human", "gpt")[turn % 2], "value": text})
            image = {"image": f"{number % PICTURES:012d}.jpg"} if has_image else {}
            record = {"id": f"{number:012d}"} | image | {"conversations": talk}
            file.write("[\n" if number == 0 else ",\n")
            json.dump(record, file)
        file.write("]\n")
    return path


def report(name: str, result: dict[str, Any]) -> None:
    imports, opened, used = (result[when]["resident"] for when in ("before", "after", "used"))
    print(
        f"{name:7} {result['records']:7} records: opened in {result['open_s']:.3f} s, its hash in "
        f"{result['hash_s']:.3f} s; {opened:.0f} MiB resident, {opened - imports:.1f} beyond imports; {used:.0f} MiB, "
        f"{used - imports:.1f} beyond imports, after {ACCESSES} accesses; {result['access_us']:.1f} µs for one"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=100_000, metavar="N")
    parser.add_argument("--folder", metavar="DIR", help="where to make the sets (default: the temporary folder)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--images", help=argparse.SUPPRESS)
    parser.add_argument("--wait", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.images, args.wait)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        for num_records in sorted({min(10_000, args.records), args.records}):
            folder = Path(temporary) / str(num_records)
            data, images, packed = make(folder, num_records), folder / "images", folder / "packed"
            started = time.perf_counter()
            command = [sys.executable, "-m", "aligngpt", "pack", str(data), "--image-folder", str(images)]
            subprocess.run([*command, "--out", str(packed)], check=True)
            print(f"packed in {time.perf_counter() - started:.0f} s; the JSON has {data.stat().st_size / 1e6:.0f} MB")
            from_shards, from_json = measured(packed), measured(data, images)
            assert from_shards["sha256"] == from_json["sha256"]
            assert from_shards["index"] == from_json["index"]
            report("packed", from_shards)
            report("JSON", from_json)
        print(f"{PROCESSES} processes with the packed set open, its whole index read by each, MiB:")
        for result in measured_together(packed):
            used = result["used"]
            print(f"  {used['resident']:.0f} resident, {used['private']:.0f} private, {used['share']:.0f} as its share")


if __name__ == "__main__":
    main()
