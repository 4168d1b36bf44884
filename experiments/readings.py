"""What results files hold, as the page asks for it: numbers by seed, of an arm and a measure.

    experiments/results/<sizes>/seed-<n>.json    what `make evidence` measured with one seed

An arm, a measure or a seed that is not there is left out, never an error. ValueError: two files of one folder were made
with different sizes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from aligngpt.data.scenes import Scene, Thing
from experiments.statistics import rank_correlation

ROOT = Path(__file__).parents[1]
RESULTS = Path("experiments/results")

Result = Mapping[str, Any]  # a results file: what one seed gave
Files = Mapping[str, Sequence[Result]]  # by sizes
Values = Mapping[int, float]  # by seed
Rows = Mapping[int, Sequence[float]]  # by seed, a number for each level


class Measure(NamedTuple):
    key: str
    head: str
    better: int = 1  # −1 where less is better


SAMPLED = Measure("sampled fact precision", "facts, sampled")
GREEDY = Measure("greedy fact precision", "facts, greedy")
WAYS = {"sampled": SAMPLED, "greedy": GREEDY}
NLL = Measure("clean caption NLL", "NLL", -1)
MEASURES = (
    SAMPLED,
    GREEDY,
    Measure("sampled object F1", "objects, sampled"),
    Measure("greedy object F1", "objects, greedy"),
    Measure("sampled hallucination", "not there, sampled", -1),
    Measure("greedy hallucination", "not there, greedy", -1),
    NLL,
)
OURS, NONE, QUARTER, TRUE = "8 levels", "no token", "top quarter", "true levels"
MAIN = (OURS, NONE, QUARTER, TRUE, "random levels", "one constant token")
CUTS = (OURS, "2 levels", "4 levels", "16 levels", "8 levels, equal range")
NUM_LEVELS, FIRST_NOISE, OWN = 8, "uniform 0.5", "the pairs' own"
PLAIN = tuple(f"{arm}, plain LLM" for arm in (OURS, NONE, QUARTER))
ADAPTIVE, RANDOM_TABLE, FROZEN = "adaptive", "random table", "gate frozen"
HIGHER_RATE, DRAWN_LARGER, READS_ANSWERS = "gate rate x 10", "gate drawn x 4", "gate reads answers"
SAME_START, QUARTER_START = "no token, from 8 levels", "no token, from top quarter"
MODES = (
    ADAPTIVE, "local", "global", "average", RANDOM_TABLE, FROZEN,
    HIGHER_RATE, DRAWN_LARGER, READS_ANSWERS, SAME_START, QUARTER_START, NONE,
)  # fmt: skip


def load(folder: Path = ROOT / RESULTS) -> dict[str, list[Result]]:
    """By sizes, "small" first, the results in order of seed. "quick" is left out: nothing is learned at its size."""
    found: dict[str, dict[Path, Result]] = {}
    for file in sorted(folder.glob("*/seed-*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        seeds = found.setdefault(file.parent.name, {})
        for other, of in seeds.items():
            if of.get("sizes") != result.get("sizes"):
                raise ValueError(f"{file} and {other} have different sizes; the results of a folder need the same")
        seeds[file] = result
    order = sorted(found.keys() - {"quick"}, key=lambda sizes: (sizes != "small", sizes))
    return {sizes: sorted(found[sizes].values(), key=lambda result: result["seed"]) for sizes in order}


def read(results: Sequence[Result], *keys: str) -> dict[int, Any]:
    """By seed what the file holds under these keys, one in another; seeds without it are left out."""
    found: dict[int, Any] = {result["seed"]: result for result in results}
    for key in keys:
        found = {seed: of[key] for seed, of in found.items() if key in of}
    return found


def asked_for(arm: Mapping[str, Any]) -> str:
    """The level at which the true captions of validation pictures are likeliest: "none" where there is no token."""
    return min(arm["validation"], key=lambda level: arm["validation"][level][NLL.key])


def captions(results: Sequence[Result], arm: str, measure: Measure) -> Values:
    """What an arm gets on test pictures, at the level asked for."""
    found = read(results, "stage 1", arm)
    return {seed: of["test"][asked_for(of)][measure.key] for seed, of in found.items()}


def by_level(results: Sequence[Result], arm: str, measure: Measure) -> Rows:
    """What an arm gets on test pictures at each of its levels, in order; without a token nothing."""
    found = {seed: of for seed, of in read(results, "stage 1", arm, "test").items() if "none" not in of}
    return {seed: [of[level][measure.key] for level in sorted(of, key=int)] for seed, of in found.items()}


def levels(results: Sequence[Result], arm: str) -> str:
    """Those that are asked for: "7", or "6 or 7"."""
    found = {asked_for(of) for of in read(results, "stage 1", arm).values()} - {"none"}
    return " or ".join(sorted(found, key=int)) or "—"


def answers(results: Sequence[Result], arm: str, *keys: str) -> Values:
    return read(results, "stage 2", arm, "test", *keys)


def accuracy(results: Sequence[Result], arm: str) -> Values:
    """Mean over kinds of question, each counting the same."""
    return {seed: fmean(of.values()) for seed, of in read(results, "stage 2", arm, "test", "accuracy").items()}


def choosing(results: Sequence[Result], arm: str, key: str) -> Values:
    """Of answers with each question's own row of the gate, and with the mean of these rows for all questions."""
    return read(results, "choosing", arm, key)


def answer_nll(results: Sequence[Result], arm: str) -> Values:
    """Nats a token of the right answers."""
    return answers(results, arm, "answer NLL")


def arms_with_levels(results: Sequence[Result]) -> list[str]:
    """Arms of stage 1 that can be asked for more than two levels."""
    names = dict.fromkeys(arm for result in results for arm in result.get("stage 1", {}))
    return [arm for arm in names if any(len(of) > 2 for of in by_level(results, arm, SAMPLED).values())]


def noises(results: Sequence[Result]) -> list[str]:
    found = {noise for result in results for noise in result.get("noise", {})}
    return sorted(found, key=lambda noise: (not noise.startswith("uniform"), noise))


def under(arm: str, noise: str) -> str:
    return arm if noise == FIRST_NOISE else f"{arm}, {noise}"


def by_noise(results: Sequence[Result], measure: Measure) -> dict[str, dict[str, Values]]:
    arms = (OURS, TRUE, NONE, QUARTER)
    return {n: {arm: captions(results, under(arm, n), measure) for arm in arms} for n in noises(results)}


def correlations(found: Rows) -> Values:
    return {seed: rank_correlation(range(len(values)), values) for seed, values in found.items()}


def own(results: Sequence[Result]) -> Rows:
    """How much of the training captions of each level is true, each caption counting the same. A seed in which a level
    has none to count is left out."""
    found = read(results, "noise", FIRST_NOISE, "mean true facts")
    return {seed: values for seed, values in found.items() if None not in values}


def sampled(results: Sequence[Result]) -> tuple[int, Sequence[Mapping[str, Any]]]:
    """The first seed that has sample captions, and these."""
    return next(((seed, of) for seed, of in read(results, "samples").items() if of), (0, []))


def scene_of(sample: Mapping[str, Any]) -> Scene:
    return tuple(Thing(*facts) for facts in sample["scene"])
