"""aligngpt.levels: which pair gets which level, which data a file belongs to, and what the command leaves."""

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from aligngpt import levels as levels_module
from aligngpt.cli import main
from aligngpt.data.llava_json import read_llava_json
from aligngpt.data.records import open_records
from aligngpt.data.tables import data_hash, part_name, read_table, write_manifest, write_table
from aligngpt.levels import SET_ASIDE, cut_levels, read_levels, with_levels
from aligngpt.levels_report import histogram
from aligngpt.pack import pack, read_source
from benchmarks.sets import write_scores as scale_scores

PAIRS = 50


@pytest.mark.parametrize("pairs", [8, 9, 1003])  # one each, one more, a ragged number
def test_equal_counts(pairs):
    scores = np.random.default_rng(0).permutation(pairs) / pairs
    levels, cuts = cut_levels(scores.astype(np.float32), 8)
    counts = np.bincount(levels)
    assert len(counts) == 8
    assert counts.max() - counts.min() <= 1
    assert (np.diff(levels[np.argsort(scores)]) >= 0).all()  # a better score never has a lower level
    assert cuts == pytest.approx([scores[levels == level].min() for level in range(1, 8)])


def test_fault_30_ties_are_cut_by_place_in_the_data():
    scores = np.array([0.1] * 4 + [0.5] * 12 + [0.9] * 4)  # 60 % share a score
    scores = scores[np.random.default_rng(0).permutation(20)]
    levels, cuts = cut_levels(scores, 5)
    assert np.bincount(levels).tolist() == [4] * 5
    assert levels[scores == 0.5].tolist() == [1] * 4 + [2] * 4 + [3] * 4
    assert cuts.tolist() == [0.5, 0.5, 0.5, 0.9]
    assert cut_levels(np.zeros(20), 5)[0].tolist() == np.repeat(range(5), 4).tolist()


def test_equal_ranges_by_hand():
    levels, cuts = cut_levels(np.array([0.0, 0.24, 0.25, 0.3, 0.5, 0.99, 1.0]), 4, "range")
    assert cuts.tolist() == [0.25, 0.5, 0.75]
    assert levels.tolist() == [0, 0, 1, 1, 2, 3, 3]


@pytest.mark.parametrize("cut", ["count", "range"])
def test_fault_29_what_is_not_finite_is_set_aside(cut):
    scores = np.linspace(-1, 1, 40, dtype=np.float32)
    spoiled = np.insert(scores, [0, 7, 40], [np.nan, np.inf, -np.inf])
    levels, cuts = cut_levels(spoiled, 8, cut)
    aside = [0, 8, 42]
    assert levels[aside].tolist() == [SET_ASIDE] * 3
    expected, expected_cuts = cut_levels(scores, 8, cut)
    assert np.array_equal(np.delete(levels, aside), expected)
    assert np.array_equal(cuts, expected_cuts)


@pytest.mark.parametrize("cut", ["count", "range"])
def test_float32_is_cut_as_its_float64(cut, monkeypatch):
    """Many ties, what is not finite, and blocks that end inside the data."""
    monkeypatch.setattr(levels_module, "_BLOCK", 1000)
    scores = np.random.default_rng(0).normal(0.2, 0.1, 20_011).round(3).astype(np.float32)
    scores[::17] = np.nan
    scores[5::911] = np.inf
    usable = np.flatnonzero(np.isfinite(scores))
    found, cuts = cut_levels(scores, 7, cut)
    same, same_cuts = cut_levels(scores.astype(np.float64), 7, cut)
    assert np.array_equal(found, same)
    assert np.array_equal(cuts, same_cuts)
    assert cuts.dtype == np.float64
    if cut == "count":  # the rule, word for word: by score, then by place
        ranked = sorted(usable.tolist(), key=lambda place: (scores[place], place))
        expected = {place: rank * 7 // len(ranked) for rank, place in enumerate(ranked)}
        assert found[usable].tolist() == [expected[place] for place in usable.tolist()]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((np.array([0.1, np.nan, 0.3]), 3), "2 of 3 pairs have a score; 3 levels need one pair each"),
        ((np.array([]), 2), "0 of 0 pairs"),
        ((np.arange(9), 1), "num_levels is 1; it must lie in 2..127"),
        ((np.arange(900), 128), "num_levels is 128"),
        ((np.arange(9), 2, "rank"), "cut is 'rank'; it must be one of count, range"),
    ],
)
def test_fault_31_fewer_pairs_than_levels_and_what_else_cannot_be_cut(arguments, says):
    with pytest.raises(ValueError, match=says):
        cut_levels(*arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((np.array([0.0, 0.1, 0.9, 1.0]), 4, "range"), "leave level 1, 2 without a pair"),
        ((np.full(9, 0.5), 2, "range"), "leave level 0 without a pair"),
    ],
)
def test_fault_30_a_range_without_a_pair_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        cut_levels(*arguments)


def write_scores(folder, samples, scores, rows_per_part=21):
    """A finished scoring, as `aligngpt score` leaves it."""
    folder.mkdir(exist_ok=True)
    pairs = [sample for sample in samples if sample.images]
    about = {"kind": "scores", "data": {"sha256": data_hash(samples), "samples": len(samples)}, "model": {"is": "CLIP"}}
    table = pyarrow.table(
        {
            "record": pyarrow.array([sample.record for sample in pairs], pyarrow.int64()),
            "id": [sample.id for sample in pairs],
            "score": pyarrow.array(scores, pyarrow.float32()),
            "truncated": [False] * len(pairs),
            "problem": pyarrow.array([None if np.isfinite(score) else "lost" for score in scores], pyarrow.string()),
        }
    )
    starts = range(0, len(pairs), rows_per_part)
    for number, start in enumerate(starts):
        write_table(folder / part_name(number), table[start : start + rows_per_part], about)
    write_manifest(folder, about, len(starts), {})


@pytest.fixture
def place(tmp_path):
    """data.json with a text-only record after each tenth pair, its pictures, and scores/ with two NaN."""
    records, scores = [], []
    for number in range(PAIRS):
        Image.new("RGB", (30 + number, 40), (5 * number, 100, 200)).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"$_{number}^2$ 漢 words " * 9}]
        records.append({"id": f"p{number}", "image": f"{number}.png", "align_level": 99, "conversations": turns})
        scores.append(np.nan if number in (3, 20) else (number * 7 % PAIRS) / PAIRS)
        if number % 10 == 9:
            talk = [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "Hm."}]
            records.append({"id": number, "conversations": talk, "model": "kept"})
    (tmp_path / "data.json").write_text(json.dumps(records))
    samples = read_llava_json(tmp_path / "data.json")
    write_scores(tmp_path / "scores", samples, scores)
    return tmp_path


def command(place, *more, data="data.json"):
    words = ["levels", place / "scores", "--out", place / "levels.parquet", *(["--data", place / data] if data else [])]
    return main([str(word) for word in [*words, *more]])


def test_data_hash_is_of_the_samples_not_of_the_file(place):
    samples = read_llava_json(place / "data.json")
    records = json.loads((place / "data.json").read_text())
    for record in records:
        record.pop("align_level", None)
        record["unknown"] = 1
    (place / "again.json").write_text(json.dumps(records, indent=3, ensure_ascii=False))
    again = read_llava_json(place / "again.json")
    assert data_hash(again) == data_hash(samples) == data_hash(replace(s, level=3) for s in samples)
    first = samples[0]
    changes = [
        [samples[1], first, *samples[2:]],
        samples[:-1],
        [replace(first, id="q"), *samples[1:]],
        [replace(first, images=("1.png",)), *samples[1:]],
        [replace(first, turns=(first.turns[0], replace(first.turns[1], text="other"))), *samples[1:]],
    ]
    assert len({data_hash(changed) for changed in [samples, *changes]}) == 6


def test_command_end_to_end(place, capsys):
    report = place / "report"
    more = ["--num-levels", 4, "--report", report, "--image-folder", place, "--json", place / "leveled.json"]
    (place / "7.png").unlink()  # drawn as a gray field
    assert command(place, *more) == 0
    said = capsys.readouterr().out
    assert [line.split()[:2] for line in said.splitlines()[1:6]] == [
        ["0", "12"],
        ["1", "12"],
        ["2", "12"],
        ["3", "12"],
        ["–", "2"],
    ]

    table, metadata = read_table(place / "levels.parquet", "levels")
    scores = table["score"].to_numpy()
    expected, cuts = cut_levels(
        np.array([(n * 7 % PAIRS) / PAIRS if n not in (3, 20) else np.nan for n in range(50)]), 4
    )
    assert {field.name: str(field.type) for field in table.schema} == {
        "record": "int64",
        "id": "string",
        "score": "float",
        "level": "int8",
    }
    assert table["record"].to_pylist() == [n + n // 10 for n in range(PAIRS)]
    assert table["id"].to_pylist() == [f"p{n}" for n in range(PAIRS)]
    assert np.flatnonzero(np.isnan(scores)).tolist() == [3, 20]
    assert table["level"].to_pylist() == [None if level == SET_ASIDE else level for level in expected]
    assert (metadata["num_levels"], metadata["cut"]) == (4, "count")
    assert metadata["cuts"] == cuts.astype(np.float32).tolist()
    assert metadata["scores"]["model"] == {"is": "CLIP"}

    # Training with the levels file and with the written records sees the same samples.
    records = open_records(place / "data.json")
    kept, levels = with_levels(records, read_levels(place / "levels.parquet"))
    written = read_llava_json(place / "leveled.json")
    assert (kept.dtype, levels.dtype, len(levels)) == (np.int64, np.int8, len(records))
    assert len(records) - len(kept) == len(records) - len(written) == 2
    assert [(s.id, s.images, s.turns) for s in written] == [
        (s.id, s.images, s.turns) for s in map(records.__getitem__, kept)
    ]
    assert [s.level for s in written] == [None if level == -1 else level for level in levels[kept].tolist()]
    assert [place for place in kept if levels[place] == -1] == [10, 21, 32, 43, 54]  # text alone
    assert json.loads((place / "leveled.json").read_text())[9]["model"] == "kept"

    with Image.open(report / "levels.png") as picture:
        assert picture.size == (11 * 110, 5 * 110)
    sheet = np.asarray(Image.open(report / "contact-sheet.png"))
    blues = {tuple(pixel) for pixel in sheet[::3, ::3, :3].reshape(-1, 3) if tuple(pixel[1:]) == (100, 200)}
    assert len(blues) >= 4 * 6 - 1  # each picture is of one colour: six of each level, perhaps not the missing one
    assert not list(place.rglob("*.tmp"))


def test_levels_need_the_scores_alone_and_shards_their_own_pictures(place, capsys):
    few = ["--num-levels", 2]
    assert command(place, *few, data=None) == 0
    alone = (place / "levels.parquet").read_bytes()
    assert pack(read_source(place / "data.json", place), place / "shards", records_per_shard=9) == []
    assert command(place, *few, "--report", place / "of-shards", data="shards") == 0
    assert (place / "levels.parquet").read_bytes() == alone
    assert command(place, *few, "--report", place / "of-json", "--image-folder", place) == 0
    assert (place / "levels.parquet").read_bytes() == alone
    for picture in ("levels.png", "contact-sheet.png"):
        assert (place / "of-shards" / picture).read_bytes() == (place / "of-json" / picture).read_bytes()
    capsys.readouterr()
    assert command(place, "--json", place / "new.json", data="shards") == 2
    assert "it needs a LLaVA JSON file. Training takes the levels of other data from --out" in capsys.readouterr().err


@pytest.mark.parametrize("cut", ["count", "range"])
def test_the_histogram_shows_every_pair_in_its_level_and_the_cuts(cut):
    scores = np.append(np.random.default_rng(0).normal(size=1000), np.nan)
    levels, cuts = cut_levels(scores, 4, cut)
    axes = histogram(scores, levels, cuts, cut).axes[0]
    assert [line.get_xdata()[0] for line in axes.lines] == cuts.tolist()
    width = axes.containers[0][0].get_width()
    bounds = [-np.inf, *cuts, np.inf]
    for level, bars in enumerate(axes.containers):
        drawn = [bar for bar in bars if bar.get_height()]
        assert sum(bar.get_height() for bar in drawn) == (levels == level).sum()
        assert min(bar.get_x() for bar in drawn) > bounds[level] - width  # a cut may lie inside a bar
        assert max(bar.get_x() for bar in drawn) < bounds[level + 1]
    assert len(axes.containers) == 4
    assert axes.get_title(loc="left") == f"1,000 pairs in 4 levels of equal {cut} (1 without a score set aside)"


def test_folders_that_are_missing_are_made(place):
    new = place / "new"
    more = ["--out", new / "a/levels.parquet", "--json", new / "b/data.json", "--report", new / "c/d"]
    assert command(place, *more, "--image-folder", place) == 0
    assert sorted(path.name for path in new.rglob("*.*")) == [
        "contact-sheet.png",
        "data.json",
        "levels.parquet",
        "levels.png",
    ]


def test_same_scores_same_bytes(place):
    assert command(place) == 0
    first = (place / "levels.parquet").read_bytes()
    assert command(place) == 0
    assert (place / "levels.parquet").read_bytes() == first


def other_text(records):
    records[0]["conversations"][1]["value"] = "other"


@pytest.mark.parametrize("change", [other_text, lambda records: records.pop(), lambda records: records.reverse()])
def test_fault_34_scores_of_other_data_are_refused(place, capsys, change):
    records = json.loads((place / "data.json").read_text())
    change(records)
    (place / "other.json").write_text(json.dumps(records))
    assert command(place, data="other.json") == 2
    assert "scores belongs to other data" in capsys.readouterr().err
    assert not (place / "levels.parquet").exists()
    assert command(place) == 0
    with pytest.raises(ValueError, match=r"levels.parquet belongs to other data: .* it needs the same samples"):
        with_levels(open_records(place / "other.json"), read_levels(place / "levels.parquet"))


def test_fault_35_a_level_that_is_missing_or_out_of_range_is_named(place):
    assert command(place) == 0
    records = open_records(place / "data.json")
    levels = read_levels(place / "levels.parquet")
    with pytest.raises(ValueError, match=r"record 0 \(id p0\) has no level; it needs one in 0..7"):
        with_levels(records, replace(levels, records=levels.records[1:], levels=levels.levels[1:]))
    for wrong in (8, -2):
        changed = levels.levels.copy()
        changed[12] = wrong
        with pytest.raises(ValueError, match=rf"record 13 \(id p12\) has level {wrong}; it needs one in 0..7"):
            with_levels(records, replace(levels, levels=changed))
    for wrong in (55, -1):
        changed = levels.records.copy()
        changed[12] = wrong
        with pytest.raises(ValueError, match=rf"levels.parquet has a level for record {wrong}; .*data.json has 55"):
            with_levels(records, replace(levels, records=changed))


def test_levels_of_the_samples_without_an_image_do_not_count(place):
    assert command(place) == 0
    levels = read_levels(place / "levels.parquet")
    more = replace(levels, records=np.append(levels.records, 10), levels=np.append(levels.levels, np.int8(99)))
    for found, expected in zip(
        *(with_levels(open_records(place / "data.json"), x) for x in (more, levels)), strict=True
    ):
        assert np.array_equal(found, expected)


def cut_part(place):
    path = place / "scores/part-000001.parquet"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("spoil", "more", "says"),
    [
        (None, ["--report", "r"], "--image-folder is None; --report needs a folder"),
        (None, ["--num-levels", "49"], "48 of 50 pairs have a score; 49 levels need one pair each"),
        (None, ["--num-levels", "1"], "num_levels is 1"),
        (None, ["--json", "PLACE/data.json"], "which is read here; it needs another name"),
        (None, ["--out", "PLACE/scores/part-000000.parquet"], "scores, which is read here; it needs another place"),
        (None, ["--json", "PLACE/scores/new/data.json"], "--json would write "),
        (None, ["--report", "PLACE/scores", "--image-folder", "PLACE"], "--report would write "),
        (None, ["--json", "PLACE/levels.parquet"], "which is already written here; it needs another name"),
        (None, ["--json", "PLACE"], "which is a folder; it needs the name of a file"),
        (None, ["--json", "PLACE/0.png/data.json"], "0.png takes no files"),
        (None, ["--report", "PLACE/0.png", "--image-folder", "PLACE"], "0.png takes no files"),
        (
            lambda place: (place / "scores/manifest.json").unlink(),
            [],
            "scores has no manifest.json; it needs to be the",
        ),
        (lambda place: (place / "scores/manifest.json").write_text("{"), [], "manifest.json is damaged (Expecting"),
        (lambda place: (place / "scores/manifest.json").write_text('{"kind": "levels", "parts": []}'), [], "not about"),
        (
            cut_part,
            [],
            "part-000001.parquet is not the file that manifest.json names: its SHA-256 differs; give the `aligngpt",
        ),
        (lambda place: (place / "scores/part-000001.parquet").unlink(), [], "part-000001.parquet is missing; give the"),
        (
            lambda place: (place / "scores").rename(place / "moved"),
            [],
            "scores is no folder; it needs to be the folder",
        ),
        (
            lambda place: (place / "scores").rename(place / "moved") and (place / "scores").write_bytes(b"PAR1"),
            [],
            "scores is a file; scores are a folder now",
        ),
    ],
)
def test_bad_input_is_one_sentence(place, capsys, spoil, more, says):
    if spoil:
        spoil(place)
    assert command(place, *(word.replace("PLACE", str(place)) for word in more)) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert not (place / "levels.parquet").exists()


def test_read_levels_refuses_other_files(place):
    for spoil, says in (
        (lambda path: path.write_bytes(b"PAR1"), "levels.parquet is no Parquet file"),
        (
            lambda path: pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), path),
            "was not made by aligngpt; it needs",
        ),
        (
            lambda path: write_table(path, pyarrow.table({"a": [1]}), {"kind": "scores"}),
            "holds scores; it needs levels",
        ),
    ):
        spoil(place / "levels.parquet")
        with pytest.raises(ValueError, match=says):
            read_levels(place / "levels.parquet")


@pytest.mark.parametrize("cut", ["count", "range"])
def test_memory_is_for_scores_order_and_levels_alone(cut, tmp_path):
    """At most 20 bytes a pair in NumPy beside what the sort takes for itself, and in Arrow a few parts."""
    pairs = 300_000
    (tmp_path / "scores").mkdir()
    scale_scores(tmp_path / "scores", pairs)
    usual, counted = pyarrow.default_memory_pool(), pyarrow.proxy_memory_pool(pyarrow.default_memory_pool())
    pyarrow.set_memory_pool(counted)
    tracemalloc.start()
    try:
        words = ["levels", tmp_path / "scores", "--out", tmp_path / "levels.parquet", "--cut", cut, "--num-levels", 4]
        assert main([str(word) for word in words]) == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pyarrow.set_memory_pool(usual)
    part = read_table(tmp_path / "scores" / part_name(0), "scores")[0].nbytes
    blocks = 2**20 * (8 + 8 + 1) if cut == "range" else 0  # a block's float64, int64 and int8
    assert peak < 20 * pairs + blocks + 2**20
    assert counted.max_memory() < 5 * part
    assert pyarrow.parquet.read_metadata(tmp_path / "levels.parquet").num_rows == pairs
