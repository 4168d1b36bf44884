"""`python -m experiments.report`: docs/evidence.md, its pictures and the README's block, from results files alone.

`--check` writes nothing and fails where a page does not say, or a picture does not show, what the files give. An arm or
a seed that was not measured is a dash. Every verdict follows from a 95 % interval by one rule: one that contains 0 is
"no difference seen", any other "better" or "worse". Without any results, or with results of different sizes in one
folder, the command refuses.
"""

import argparse
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aligngpt.data.scenes import KINDS, fact_precision
from experiments import charts
from experiments.charts import Drawing, Line
from experiments.readings import (
    ADAPTIVE,
    CUTS,
    FIRST_NOISE,
    MAIN,
    MEASURES,
    MODES,
    NONE,
    NUM_LEVELS,
    OURS,
    OWN,
    PLAIN,
    QUARTER,
    RESULTS,
    ROOT,
    TRUE,
    WAYS,
    Files,
    Measure,
    Result,
    accuracy,
    answer_nll,
    answers,
    arms_with_levels,
    asked_for,
    by_level,
    by_noise,
    captions,
    choosing,
    correlations,
    levels,
    load,
    own,
    read,
    sampled,
    scene_of,
)
from experiments.statistics import entropy_bits, estimate, never_falls
from experiments.verdicts import (
    UNMEASURED,
    answer,
    common,
    difference,
    gate_why,
    in_short,
    means,
    seeds,
    spread,
    table,
)

ON_A_GPU = {
    "large": 'EVIDENCE="--sizes large"',
    "smollm2": 'EVIDENCE="--sizes smollm2 --llm FOLDER --emoji FOLDER"',
}
PAGE, PICTURES = Path("docs/evidence.md"), Path("docs/evidence")
OPENING, CLOSING = "<!-- evidence: written by python -m experiments.report -->", "<!-- end of evidence -->"

INTRODUCTION = """\
# Do alignment levels help, and does the gate?

Written by `python -m experiments.report`, its numbers and verdicts from the files in
[experiments/results](../experiments/results) alone; a test fails when this page says anything different.

## In short

Differences are paired by seed, in brackets their 95 % interval; ▲ better, ▼ worse. *Plain LLM*: one that has read
nothing that favours levels. *Top quarter* is filtering: no token, and the best quarter of the pairs.
"""
METHOD = """\
## How it was done

**Data.** Scenes of one to three objects with five facts each (size, color, shape, row, column), so that what is true of
a picture is known. Training captions are made false at a known rate. *Uniform*: each fact of a caption is replaced by
another value at random, with a probability drawn for the caption that is 0.25, 0.5 or 0.75 on average. *Biased*: the
same, but the substitute is always the same value, which so becomes frequent, and false facts agree with each other.
*Swapped*: a caption is, with that probability, the whole true caption of another picture. What is measured is of scenes
with two or three objects.

**In miniature.** The LLM of *small* has half a million weights and rows 128 wide, a picture is nine of them, so the
gate reads nine dots (in the paper 576, of rows 4096 wide). Stage 1 sees each pair once, stage 2 half of the questions:
what differs is how soon things are learned, as well as how well.

**The LLM favours levels.** It has read documents in which one word says how sure the author is, in the place where the
alignment token will stand, of captions with uniform noise ([demo/language.py](../demo/language.py)). The arms *plain
LLM* have one that has read the same without that word. A given LLM, that of smollm2, has read no such documents.

**Arms of stage 1**, of the same steps, batch and rate, and of the noise *uniform 0.5* where none is named. *8 levels*:
AlignGPT, CLIP scores cut into equal counts. *no token*: LLaVA. *top quarter*: no token, and only the quarter of the
pairs with the best CLIP scores, each seen about four times as often. *true levels*: cut by true alignment, what perfect
scores would give. *random levels*, *one constant token*: tokens that say nothing.

**Arms of stage 2**, on the same questions: the modes of the gate, each from the stage 1 with 8 levels; *random table*:
adaptive, with a table of random numbers; *gate frozen*: adaptive, the gate left as it was drawn, which is nearly even
weights; *gate rate x 10*: adaptive, its rate ten times as high (`--optim.align-lr`); *gate drawn x 4*: adaptive, its
weights four times as large when training begins; *gate reads answers*: adaptive, trained as the public code trains it,
with the answer in the mean text that the gate sees, which is not there when one asks. *no token*: LLaVA, from its own
stage 1, so that against adaptive it compares both stages together; *no token, from 8 levels* and *from top quarter*:
from those stages 1, in the first of which only the token of stage 2 is missing.

**Seeds** are 2 to 6. Each changes data, noise, CLIP tower, LLM (unless it is given) and training together; arms are
compared within a seed. Intervals are 95 %, of paired differences, by Student's t with seeds − 1 degrees of freedom. ▲
(better) and ▼ (worse) mark those without 0; of many differences that are none, one in twenty would be marked too. "No
difference seen" is not "no difference". ± is the standard deviation between seeds.

**Choices.** Rates, steps and recipe are the demo's, found with seeds 0 and 1, which are not used here; how many runs
that took was not counted. Before this protocol half of one seed (0) was run, and is not shown. An arm with a token is
asked for one level in each seed: that at which the true captions of validation pictures are likeliest. What is measured
of test pictures chooses no level and no setting. That the gate counts as inert or not by one measure, the answers' NLL
of *adaptive* against *gate frozen*, was written down before these runs; the arms *no token, from …*, the mean row for
all questions and the order of this page were added when seed 2 had been seen.

**To repeat it**: `make evidence`; hours on two cores. On a GPU `--sizes large` has pictures of 224 pixels and a tower
384 wide, and `--sizes smollm2` takes the folder of an LLM ([docs/real-run.md](real-run.md) makes one of SmolLM2-135M)
and one with `pretrain.json` and `images/`, whose captions are the names of pictures, such as emoji.
"""
MEASURED = """\
*Facts*: the share of stated facts that are true, each named object held against that of the scene which it fits best
(the caption of another picture has about 0.4). *Objects*: F1 of objects with all five facts right. *Not there*: the
share of named objects (color and shape) that the scene has not, the rate of hallucination. *NLL*: nats a token of the
true caption. *Asked for*: the level.
"""
ANSWERED = """\
Accuracy by kind of question; *mean* counts kinds, not questions. Questions are of scenes with two or three objects.
Presence is the mean of the accuracies on "yes" and on "no"; the "no" questions kept are those that recombine a color
and a shape that are both there. *Blind*: adaptive, shown another picture. *Any object*: answering for one of the
scene's objects at random. *Majority*: always the commonest answer.
"""
GATE = """\
*Mutual information*: of the kind of question and a level drawn by the gate's weights, in bits; at most log2(7) = 2.81,
and at most H(kind). *Entropy*: of a question's weights, in bits. *Dots*: standard deviation of what goes into the
gate's layers, over questions and image rows together. *Logits*: that of what comes out, over questions. *Apart*: mean
distance of a question's row from the mean row, in units of its norm. *Norm*: of the table's rows, which stage 2 never
trains. *Own*, *mean*: the answers' NLL with each question's own row, and with the mean row for all, which the model has
not been trained with.
"""


def page(files: Files) -> str:
    """The whole of docs/evidence.md."""
    parts = [INTRODUCTION]
    for sizes, results in files.items():
        said = "\n".join(f"- {sentence}" for sentence in in_short(results))
        parts += [f"Of {sizes}, {seeds(len(results))}:\n", *answer(results), f"{said}\n"]
    parts += [
        f"Of {sizes}: unmeasured; `make evidence {how}`.\n" for sizes, how in ON_A_GPU.items() if sizes not in files
    ]
    parts += [METHOD, runs(files)]
    for sizes, results in files.items():
        parts += [f"## {sizes}\n", *stage_1(sizes, results), *stage_2(results), *samples(sizes, results)]
    return "\n".join(parts)


def runs(files: Files) -> str:
    rows, said = [], []
    for sizes, results in files.items():
        number = sum(read(results, "runs").values())
        device = ", ".join(sorted({*read(results, "device").values()}))
        commits = {commit_name(name) for names in read(results, "commits").values() for name in names}
        seed = ", ".join(map(str, read(results)))
        minutes = spread(read(results, "job minutes"), 0)
        rows.append([sizes, seed, f"{number or '—'}", minutes, device, ", ".join(sorted(commits))])
        said.append(f"Sizes of {sizes}: {trained(results[0])}. Measured, at most: {measured(results[0])}.\n")
    return "\n".join(
        [table(["sizes", "seeds", "training runs", "job minutes a seed", "device", "commits"], rows), *said]
    )


def trained(result: Result) -> str:
    try:
        return (
            "{train} training scenes, a pair and four questions each, {pixels} pixels; CLIP {vision_steps} steps, LLM "
            "{llm_steps}; stage 1 {stage_1_steps} steps of {stage_1_batch} at rate {stage_1_rate:g}, stage 2 "
            "{stage_2_steps} steps of {stage_2_batch} at rate {stage_2_rate:g}"
        ).format(**result.get("sizes", {}))
    except KeyError:
        return "—"


def measured(result: Result) -> str:
    found = result.get("measured")
    if found is None:
        return "—"
    pictures, questions = found["pictures"], found["questions"]
    return (
        f"{pictures['validation']} validation and {pictures['test']} test pictures, {questions['test']} test questions "
        f"(at fixed levels the first {found['questions by level']})"
    )


def commit_name(name: str) -> str:
    return f"`{name[:10]}`" + (" with changes" if name.endswith("+") else "")


def stage_1(sizes: str, results: Sequence[Result]) -> Iterator[str]:
    yield f"### Stage 1: captions\n\n{MEASURED}"
    yield values_table(results, MAIN)
    yield from (differences_table(results, MAIN, rival) for rival in (NONE, QUARTER))
    yield "### Is the level obeyed?\n"
    yield f"![True facts at each level, by arm]({PICTURES.name}/{sizes}-levels.svg)\n"
    own_said = "true facts in a level's training captions, each caption counting the same"
    yield f"*{OWN.capitalize()}*: {own_said}. *True alignment*: of all pairs of the level, facts left as they were.\n"
    truth = read(results, "noise", FIRST_NOISE, "mean true alignment")
    found = {OWN: own(results), "true alignment": truth}
    found |= {of.head: by_level(results, OURS, of) for of in MEASURES}
    rows = [[name, common(of), *means(of)] for name, of in found.items()]
    yield table(["8 levels, mean at level", "seeds", *map(str, range(NUM_LEVELS))], rows)
    rows = []
    for arm in arms_with_levels(results):
        ways = [by_level(results, arm, measure) for measure in WAYS.values()]
        trends = [(f"{sum(map(never_falls, of.values()))}", spread(correlations(of), 2)) for of in ways]
        rows.append([arm, common(*ways), *(cell for trend in trends for cell in trend)])
    yield "In how many seeds facts fall from no level to the next, and their rank correlation (Spearman) with it:\n"
    yield table(["arm", "seeds", "sampled never fall", "correlation", "greedy never fall", "correlation"], rows)
    yield f"### How many levels, and how cut\n\n{values_table(results, CUTS)}"
    yield differences_table(results, CUTS, OURS, list(WAYS.values()))
    yield "### An LLM that has read nothing of sureness\n"
    yield values_table(results, PLAIN)
    yield from (differences_table(results, PLAIN, rival) for rival in PLAIN[1:])
    yield f"### Noise\n\n![True facts against the noise rate]({PICTURES.name}/{sizes}-noise.svg)\n"
    yield "*CLIP*: rank correlation of the scores with true alignment.\n"
    for measure in WAYS.values():
        rows = []
        for noise, facts in by_noise(results, measure).items():
            cells = [spread(facts[arm]) for arm in (OURS, TRUE, NONE, QUARTER)]
            cells += [difference(facts[OURS], facts[rival]) for rival in (NONE, QUARTER)]
            clip = spread(read(results, "noise", noise, "rank correlation"), 2)
            rows.append([noise, common(facts[OURS]), clip, *cells])
        minus = [f"8 levels − {rival}" for rival in (NONE, QUARTER)]
        yield table([measure.head, "seeds", "CLIP", OURS, TRUE, NONE, QUARTER, *minus], rows)
    if names := names_table(results):
        yield names


def names_table(results: Sequence[Result]) -> str:
    """Of the emoji beside the scenes, where there were any."""
    rows = []
    for arm in MAIN:
        found = {
            seed: of["emoji"][asked_for(of)] for seed, of in read(results, "stage 1", arm).items() if "emoji" in of
        }
        nll, other = ({seed: of[key] for seed, of in found.items()} for key in ("name NLL", "another picture"))
        rows.append([arm, common(nll), spread(nll), spread(other), difference(nll, other, -1)])
    head = ["arm", "seeds", "name NLL", "with another picture", "difference"]
    said = "Nats a token of the names of emoji that neither tower nor stage 1 saw. The tower learned the others' names."
    return f"### Emoji beside the scenes\n\n{said}\n\n{table(head, rows)}" if any(row[1] != "0" for row in rows) else ""


def values_table(results: Sequence[Result], arms: Sequence[str]) -> str:
    rows = []
    for arm in arms:
        found = [captions(results, arm, measure) for measure in MEASURES]
        rows.append([arm, common(*found), levels(results, arm), *map(spread, found)])
    return table(["arm", "seeds", "asked for", *(measure.head for measure in MEASURES)], rows)


def differences_table(
    results: Sequence[Result], arms: Sequence[str], rival: str, measures: Sequence[Measure] = MEASURES
) -> str:
    """The differences of the other arms from a rival."""
    others = [arm for arm in arms if arm != rival]
    pairs = {of: [(captions(results, arm, of), captions(results, rival, of)) for arm in others] for of in measures}
    rows = [[of.head, *(difference(*pair, of.better) for pair in found)] for of, found in pairs.items()]
    rows.append(["*seeds*", *(common(*pair) for pair in pairs[measures[0]])])
    return table([f"minus {rival}", *others], rows)


def stage_2(results: Sequence[Result]) -> Iterator[str]:
    yield f"### Stage 2: answers\n\n{ANSWERED}"
    rows = []
    for arm in MODES:
        kinds = [spread(answers(results, arm, "accuracy", kind)) for kind in KINDS]
        rows.append([arm, common(accuracy(results, arm)), *kinds, spread(accuracy(results, arm))])
    for name, part in (("blind", "another picture"), ("any object", "any object"), ("majority", "majority")):
        kinds = [spread(answers(results, ADAPTIVE, part, kind)) for kind in KINDS]
        rows.append([f"*{name}*", common(answers(results, ADAPTIVE, part)), *kinds, ""])
    yield table(["arm", "seeds", *KINDS, "mean"], rows)
    presence = ("precision", "recall", "F1", "yes share")
    found = {arm: [answers(results, arm, "presence", key) for key in presence] for arm in MODES}
    found = {arm: [*of, answers(results, arm, "answer NLL")] for arm, of in found.items()}
    yield (
        'Presence as POPE counts it: "yes" is the positive class, so saying it always has a high F1. NLL in nats a '
        "token of the right answers:\n"
    )
    rows = [[arm, common(*of), *map(spread, of)] for arm, of in found.items()]
    shares = answers(results, "adaptive", "presence", "yes among answers")
    always = [shares, dict.fromkeys(shares, 1.0), {seed: 2 * of / (1 + of) for seed, of in shares.items()}]
    rows.append(["*always yes*", common(shares), *map(spread, always), "1.000" if shares else "—", ""])
    yield table(["arm", "seeds", *presence, "answer NLL"], rows)
    rows = []
    for arm in MODES[1:]:
        pair = accuracy(results, arm), accuracy(results, ADAPTIVE)
        kinds = [
            difference(answers(results, arm, "accuracy", kind), answers(results, ADAPTIVE, "accuracy", kind))
            for kind in ("place", "presence")
        ]
        nll = difference(answer_nll(results, arm), answer_nll(results, ADAPTIVE), -1)
        rows.append([arm, common(*pair), difference(*pair), *kinds, nll])
    yield table(["minus adaptive", "seeds", "accuracy, mean", "place", "presence, balanced", "answer NLL"], rows)
    rows = []
    for arm in ("adaptive", "random table"):
        for key in ("NLL", "accuracy"):
            fixed = read(results, "stage 2", arm, "test", "by level", key)
            mix = answers(results, arm, "by level", f"own {key}")
            rows.append([f"{arm}, {key}", common(fixed, mix), *means(fixed), spread(mix)])
    yield (
        "One level's row alone for all answers, as `align_levels` puts it, beside the mix of the gate, on the same "
        "questions (fewer than above). In training adaptive never saw a row alone, so this does not say what a choice "
        "of the gate would give:\n"
    )
    yield table(["mean at level", "seeds", *map(str, range(NUM_LEVELS)), "the gate's mix"], rows)
    yield f"### What the gate does\n\n{gate_why(results)}\n\n{GATE}"
    heads = {
        "mutual information": "mutual information",
        "entropy": "entropy",
        "dots std": "dots",
        "logits std": "logits",
        "table distance": "table",
    }
    rows = []
    for arm in MODES:
        asked = read(results, "stage 2", arm, "test", "questions")
        bits = {seed: entropy_bits(numbers.values()) for seed, numbers in asked.items()}
        cells = [answers(results, arm, "gate", key) for key in heads]
        if cells[0]:
            rows.append([arm, common(cells[0]), *(spread(of) for of in cells), spread(bits, 2)])
    yield table(["arm", "seeds", *heads.values(), "H(kind)"], rows)
    rows = []
    for arm in MODES:
        apart, norm = (spread(choosing(results, arm, key)) for key in ("rows apart", "table norm"))
        mean_row, own_row = (choosing(results, arm, f"{row} row NLL") for row in ("mean", "own"))
        if own_row:
            nats = spread(own_row), spread(mean_row), difference(mean_row, own_row, -1)
            rows.append([arm, common(own_row), apart, norm, *nats])
    yield table(["arm", "seeds", "apart", "norm", "own", "mean", "mean − own"], rows)
    rows = []
    for kind in KINDS:
        weights = read(results, "stage 2", "adaptive", "test", "gate", "weights", kind)
        rows.append([kind, common(weights), *means(weights, NUM_LEVELS - 1)])
    yield table(["adaptive, mean weight of level", "seeds", *map(str, range(NUM_LEVELS - 1))], rows)


def samples(sizes: str, results: Sequence[Result]) -> Iterator[str]:
    seed, found = sampled(results)
    rows = []
    for number, sample in enumerate(found):
        said = [(text.strip(), *fact_precision(text, scene_of(sample))) for text in sample["captions"].values()]
        cells = [f"{text} ({true} of {stated})" for text, true, stated in said]
        rows.append([f"![Test picture {sample['picture']}]({PICTURES.name}/{sizes}-sample-{number}.png)", *cells])
    if rows:
        said_of = f"Greedy, of 8 levels, seed {seed}, the first pictures of two objects or more"
        yield f"### Sample captions\n\n{said_of}; in brackets how many stated facts are true:\n"
        yield table(["picture", *(f"asked for level {level}" for level in found[0]["captions"])], rows)


# ------------------------------------------------------------------------------------------------ pictures and files


def drawings(files: Files) -> dict[Path, Drawing]:
    """The pictures that the page names."""
    found: dict[Path, Drawing] = {}
    for sizes, results in files.items():
        names = (*MAIN, OWN)
        panels = {way: level_lines(results, measure) for way, measure in WAYS.items()}
        axes = "level asked for", "true facts"
        found[PICTURES / f"{sizes}-levels.svg"] = Drawing(charts.lines, (panels, names, *axes))
        panels = {way: noise_lines(results, measure) for way, measure in WAYS.items()}
        axes = "share of false facts in training captions", "true facts"
        found[PICTURES / f"{sizes}-noise.svg"] = Drawing(charts.lines, (panels, names, *axes))
        seed, said = sampled(results)
        for number, sample in enumerate(said):
            arguments = scene_of(sample), f"{seed} test {sample['picture']}"
            found[PICTURES / f"{sizes}-sample-{number}.png"] = Drawing(charts.picture, arguments)
    return found


def level_lines(results: Sequence[Result], measure: Measure) -> list[Line]:
    """Of arms with other than eight levels one value, at the level asked for."""
    found = []
    for arm, rows in [*((arm, by_level(results, arm, measure)) for arm in MAIN), (OWN, own(results))]:
        columns = dict(enumerate(zip(*rows.values(), strict=True)))
        if len(columns) == NUM_LEVELS:
            found.append(line(arm, columns))
        elif arm != OWN:
            found.append(line(arm, {0: captions(results, arm, measure).values()})._replace(xs=()))
    return [of for of in found if of.means]


def noise_lines(results: Sequence[Result], measure: Measure) -> list[Line]:
    facts = {float(n.split()[1]): of for n, of in by_noise(results, measure).items() if n.startswith("uniform")}
    found = [line(arm, {rate: of[arm].values() for rate, of in facts.items()}) for arm in (OURS, NONE, QUARTER)]
    return [of for of in found if of.means]


def line(name: str, points: Mapping[Any, Collection[float]]) -> Line:
    found = {x: whole for x, of in points.items() if (whole := estimate(of))}
    deviations = tuple(whole.deviation or 0.0 for whole in found.values())
    return Line(name, tuple(found), tuple(whole.mean for whole in found.values()), deviations)


def readme_block(files: Files) -> str:
    """What the README says between its marks: the first sizes alone."""
    if not files:
        return UNMEASURED
    results = next(iter(files.values()))
    rows = []
    for arm in (*MAIN[:4], *PLAIN):
        found = [captions(results, arm, measure) for measure in MEASURES[:4]]
        if arm in MAIN or found[0]:
            rows.append([arm, common(*found), *map(spread, found)])
    head = ["arm", "seeds", *(measure.head for measure in MEASURES[:4])]
    plot = f"![True facts at each level, by arm]({PAGE.parent}/{PICTURES.name}/{next(iter(files))}-levels.svg)"
    closing = (
        "In brackets: the 95 % interval of the paired difference; ▲ better, ▼ worse. All comparisons, more plots, and "
        "captions\nbeside their pictures: [docs/evidence.md](docs/evidence.md)."
    )
    return "\n".join([table(head, rows), *answer(results), "", f"{plot}\n", closing])


def fill(text: str, block: str) -> str:
    """A document with the block between its marks."""
    pattern = re.compile(re.escape(OPENING) + ".*?" + re.escape(CLOSING), re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"README.md has {len(pattern.findall(text))} blocks of evidence; it needs one, from {OPENING}")
    return pattern.sub(lambda _: f"{OPENING}\n\n{block}\n\n{CLOSING}", text)


def texts(files: Files, root: Path = ROOT) -> dict[Path, str]:
    """What each document must say; without results there is no page."""
    readme = fill((root / "README.md").read_text(encoding="utf-8"), readme_block(files))
    return {Path("README.md"): readme} | ({PAGE: page(files)} if files else {})


def write(files: Files, root: Path = ROOT) -> list[Path]:
    """Writes documents and pictures, and says which."""
    contents = {path: text.encode() for path, text in texts(files, root).items()}
    contents |= {path: drawing.content() for path, drawing in drawings(files).items()}
    for path, content in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return list(contents)


def differences(files: Files, root: Path = ROOT) -> list[str]:
    """A sentence for each document or picture that is not of these results."""
    found = []
    for path, text in texts(files, root).items():
        said = (root / path).read_text(encoding="utf-8") if (root / path).exists() else ""
        if said != text:
            lines = zip(said.splitlines(), text.splitlines(), strict=False)
            line = next((n for n, (a, b) in enumerate(lines, 1) if a != b), min(said.count("\n"), text.count("\n")) + 1)
            found.append(f"{path} differs from the results files from line {line}")
    wanted = drawings(files)
    for path, drawing in wanted.items():
        if not (root / path).exists() or drawing.mark.encode() not in (root / path).read_bytes():
            found.append(f"{path} does not show what the results files hold")
    there = {PICTURES / file.name for file in (root / PICTURES).glob("*")}
    found += [f"{path} is of no results file" for path in sorted(there - wanted.keys())]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page differs from the files")
    check = parser.parse_args(arguments).check
    try:
        files = load()
    except ValueError as error:
        sys.exit(f"error: {error}")
    if not files:
        print(f"error: {RESULTS} holds no <sizes>/seed-<n>.json; `make evidence` makes them")
        return 1
    if not check:
        print("\n".join(map(str, write(files))))
        return 0
    found = differences(files)
    print("\n".join([*found, "Run `python -m experiments.report`."]) if found else "the pages say what the files give")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
