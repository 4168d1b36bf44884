"""What is compared: sizes, noises and arms, pure data.

The arms of a stage see the same pictures in the same order and take the same number of steps of the same size at the
same rate; an arm is what it differs in. Only "top quarter" sees fewer pairs, each more often. An arm that is added here
is trained when the command is next given, and none of the others is trained again.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Sizes:
    """How much of everything, the same for each seed."""

    train: int  # scenes; one pair and four questions each
    validation: int
    test: int
    vision_steps: int
    llm_steps: int
    stage_1_steps: int
    stage_1_batch: int
    stage_2_steps: int
    stage_2_batch: int
    stage_1_rate: float = 3e-3
    stage_2_rate: float = 1e-3
    pixels: int = 72  # side of a picture
    vision: tuple[str, ...] = ()  # further options of demo.vision
    language: tuple[str, ...] = ()  # of demo.language
    training: tuple[str, ...] = ()  # of both stages
    gpu: bool = False  # whether one is used if it is there


_ON_A_GPU = ("--precision", "bf16", "--data.workers", "4")
SIZES = {
    "small": Sizes(12_000, 500, 1_000, 600, 270, 400, 32, 200, 128),
    "quick": Sizes(320, 40, 40, 4, 4, 6, 16, 4, 16),  # nothing is learned
    "large": Sizes(
        12_000, 500, 1_000, 1_500, 600, 400, 32, 200, 128,
        pixels=224,
        vision=("--patch", "16", "--width", "384", "--layers", "6"),
        language=("--grid", "14", "--width", "384", "--layers", "6"),
        training=_ON_A_GPU,
        gpu=True,
    ),
    # Its LLM is given, so it takes no steps.
    "smollm2": Sizes(12_000, 500, 1_000, 600, 0, 400, 32, 200, 128, stage_2_rate=1e-4, training=_ON_A_GPU, gpu=True),
}  # fmt: skip
SEEDS = (2, 3, 4, 5, 6)  # `make demo`, whose recipe and rates these are, was tuned while looking at seeds 0 and 1


@dataclass(frozen=True)
class Noise:
    """How captions are made false. rate: the mean share of false facts, or for "swapped" the share of swapped pairs."""

    kind: Literal["uniform", "biased", "swapped"]
    rate: float

    @property
    def name(self) -> str:
        return f"{self.kind} {self.rate:g}"


UNIFORM, BIASED, SWAPPED = (Noise(kind, 0.5) for kind in ("uniform", "biased", "swapped"))
NOISES = (UNIFORM, BIASED, SWAPPED, Noise("uniform", 0.25), Noise("uniform", 0.75))


@dataclass(frozen=True)
class CaptionArm:
    """A run of stage 1.

    levels: where a pair's level is from. "score": CLIP's score, cut into parts of equal count or equal range; "true":
    the true alignment, cut into parts of equal count; "random": a draw; "constant": the same one for all pairs; "none":
    there is no alignment token. llm: "" for the LLM that documents told how sure their authors were, "plain" for one
    that has read nothing of it.
    """

    name: str
    levels: Literal["score", "true", "random", "constant", "none"]
    noise: Noise = UNIFORM
    num_levels: int = 8
    cut: Literal["count", "range"] = "count"
    best_quarter: bool = False  # train on the quarter of the pairs with the highest scores alone
    llm: Literal["", "plain"] = ""
    stage = "stage-1"


@dataclass(frozen=True)
class AnswerArm:
    """A run of stage 2. start: the arm of stage 1 that it goes on from.

    gate_text: what the gate reads in training, "prompt" or, as in the public code, "all", the answer too.
    """

    name: str
    mode: Literal["adaptive", "local", "global", "average", "none"]
    start: str = "8 levels"
    random_table: bool = False
    gate_frozen: bool = False
    gate_rate: float = 1  # times the stage's rate
    gate_drawn: float = 1  # times its weights as they are drawn, when training begins
    gate_text: Literal["prompt", "all"] = "prompt"
    stage = "stage-2"

    @property
    def mixes(self) -> bool:
        """Whether its gate chooses levels for each question."""
        return self.mode in ("adaptive", "local")


def under(noise: Noise) -> tuple[CaptionArm, ...]:
    """The arms that are compared under each noise beside the first."""
    arms: tuple[CaptionArm, ...] = (
        CaptionArm(f"8 levels, {noise.name}", "score", noise),
        CaptionArm(f"no token, {noise.name}", "none", noise),
        CaptionArm(f"top quarter, {noise.name}", "none", noise, best_quarter=True),
    )
    if noise in (BIASED, SWAPPED):
        arms += (CaptionArm(f"true levels, {noise.name}", "true", noise),)
    return arms


STAGE_1 = (
    CaptionArm("8 levels", "score"),
    CaptionArm("no token", "none"),
    CaptionArm("random levels", "random"),
    CaptionArm("one constant token", "constant", num_levels=2),  # a table has two rows at least; one is used
    CaptionArm("true levels", "true"),
    CaptionArm("2 levels", "score", num_levels=2),
    CaptionArm("4 levels", "score", num_levels=4),
    CaptionArm("16 levels", "score", num_levels=16),
    CaptionArm("8 levels, equal range", "score", cut="range"),
    CaptionArm("top quarter", "none", best_quarter=True),
    CaptionArm("8 levels, plain LLM", "score", llm="plain"),
    CaptionArm("no token, plain LLM", "none", llm="plain"),
    CaptionArm("top quarter, plain LLM", "none", best_quarter=True, llm="plain"),
    *(arm for noise in NOISES[1:] for arm in under(noise)),
)
STAGE_2 = (
    AnswerArm("adaptive", "adaptive"),
    AnswerArm("local", "local"),
    AnswerArm("global", "global"),
    AnswerArm("average", "average"),
    AnswerArm("random table", "adaptive", random_table=True),
    AnswerArm("gate frozen", "adaptive", gate_frozen=True),
    AnswerArm("gate rate x 10", "adaptive", gate_rate=10),
    AnswerArm("gate drawn x 4", "adaptive", gate_drawn=4),
    AnswerArm("gate reads answers", "adaptive", gate_text="all"),
    AnswerArm("no token", "none", start="no token"),
    AnswerArm("no token, from 8 levels", "none"),
    AnswerArm("no token, from top quarter", "none", start="top quarter"),
)
