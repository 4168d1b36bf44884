"""Hours of a run on many GPUs: communication counted, compute from measured rates, what is assumed said in words.

    collectives   what FSDP2 moves in a step, to the byte (tested against what torch.distributed is called with)
    Network       how long that takes, and which share of it crosses from machine to machine
    Rates, Cost   seconds of work: from training/rates.json, which benchmarks/rates.py makes of recorded results, or
                  from steps that training/calibrate.py runs on the machine at hand
    predict       seconds of a step, of which communication that no compute hides is a part

A decoder layer is gathered in its forward and again in its backward pass, the root group once in a micro-batch; with
gather="step" all are gathered once in a step. Gradients are reduced in fp32, once in a micro-batch or once in a step;
where several groups of processes hold a copy each, what a process keeps of them is summed over the copies once in a
step. Weights go in the type of the arithmetic, frozen ones like trained ones; the tower is in each process.
"""

import functools
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from training.config import ShardingConfig, Stage, TrainConfig
from training.flops import Flops
from training.metrics import peak_by_name
from training.plan import Plan, Weight

if TYPE_CHECKING:
    from training.calibrate import Calibration

RATES = Path(__file__).parent / "rates.json"
OPTIMIZER_BYTES = (
    28  # a trained weight's: AdamW reads it, its gradient and two moments, and writes all but the gradient
)
H100 = "NVIDIA H100 80GB HBM3"  # planned for where there is no GPU
USED_SHARE = 0.8  # of a link's bandwidth
LATENCY = 20e-6  # seconds, of a collective
# What is computed again in the backward pass, in forward passes of the LLM.
RECOMPUTED = {"none": 0.0, "selective": 0.2, "full": 1.0}
# Memory and its bandwidth by the words of a device's name, the narrower name first, from NVIDIA's data sheets.
MEMORY = {
    "B200": (180e9, 7.7e12),
    "H200": (141e9, 4.8e12),
    "H100 NVL": (94e9, 3.9e12),
    "H100 PCIe": (80e9, 2.0e12),
    "H100": (80e9, 3.35e12),
    "A100 40GB": (40e9, 1.555e12),
    "A100 80GB PCIe": (80e9, 1.935e12),
    "A100": (80e9, 2.039e12),
}


# ---------------------------------------------------------------------------------------------------- communication


Kind = Literal["all-gather", "reduce-scatter", "all-reduce"]


class Collective(NamedTuple):
    """bytes: of the whole, which each process then has (all-gather) or brings (reduce-scatter, all-reduce)."""

    kind: Kind
    bytes: int
    members: int  # processes that take part
    apart: int  # ranks between two of them: 1 for neighbours

    @property
    def sent(self) -> float:
        """Bytes that each member sends, and receives, in a ring."""
        return self.bytes * (self.members - 1) / self.members * (2 if self.kind == "all-reduce" else 1)


class Unit(NamedTuple):
    """What moves together, a decoder layer or the root group. None: nothing does."""

    gather: Collective | None
    scatter: Collective | None
    sum: Collective | None


class Traffic(NamedTuple):
    """A process's collectives in a step."""

    root: Unit
    layers: tuple[Unit, ...]
    forward_gathers: float  # of each unit
    backward_gathers: float  # of each layer
    scatters: float
    sums: float

    def counted(self) -> dict[Collective, float]:
        """How often each is called."""
        found: defaultdict[Collective, float] = defaultdict(float)
        for unit in (self.root, *self.layers):
            gathers = self.forward_gathers + (0 if unit is self.root else self.backward_gathers)
            for collective, times in ((unit.gather, gathers), (unit.scatter, self.scatters), (unit.sum, self.sums)):
                if collective is not None:
                    found[collective] += times
        return found

    @property
    def sent(self) -> float:
        """Bytes that a process sends in a step."""
        return sum(collective.sent * times for collective, times in self.counted().items())


def traffic(
    weights: Iterable[Weight],
    *,
    processes: int,
    compute_bytes: int,
    micro_batches: float,
    config: ShardingConfig,
) -> Traffic:
    """Of a step of so many micro-batches, or of the mean step of a run."""
    shards = config.size or processes
    copies = processes // shards
    members: dict[str, list[Weight]] = {}
    for weight in weights:
        if weight.unit != "tower":
            members.setdefault(weight.unit, []).append(weight)
    root = _unit(members.pop("root"), shards, copies, compute_bytes)
    layers = tuple(_unit(of_layer, shards, copies, compute_bytes) for of_layer in members.values())
    if config.gather == "step":
        return Traffic(root, layers, 1, 0, 1, 1)
    return Traffic(root, layers, micro_batches, micro_batches, micro_batches, 1)


def traffic_of(config: TrainConfig, plan: Plan, processes: int) -> Traffic:
    """Of the mean step of a planned run."""
    return traffic(
        plan.weights,
        processes=processes,
        compute_bytes=4 if config.precision == "fp32" or config.optim.kind == "apex" else 2,
        micro_batches=plan.batches.micro_batches_mean,
        config=config.sharding,
    )


def _unit(members: list[Weight], shards: int, copies: int, compute_bytes: int) -> Unit:
    kept = sum(weight.part(shards) for weight in members)
    trained = sum(weight.part(shards) for weight in members if weight.trained) * 4
    shared, copied = shards > 1, copies > 1
    return Unit(
        Collective("all-gather", kept * shards * compute_bytes, shards, 1) if shared else None,
        Collective("reduce-scatter", trained * shards, shards, 1) if shared and trained else None,
        Collective("all-reduce", trained, copies, shards) if copied and trained else None,
    )


class Network(NamedTuple):
    """Bandwidths in bytes a second and one direction."""

    gpus_per_node: int
    links: float  # of a GPU to the others of its machine
    network: float  # of a machine, all its ports together

    def holds(self, processes: int, shards: int) -> bool:
        """Whether groups of so many shards lie alike in all machines, which is what `crossing` counts."""
        size = self.gpus_per_node
        return processes <= size or size % shards == 0 or shards % size == 0

    def crossing(self, collective: Collective) -> float:
        """Bytes that a machine sends to others while each of its GPUs takes part in one such collective."""
        size = self.gpus_per_node
        here = min(collective.members, max(1, size // collective.apart))  # members of one group in a machine
        if here == collective.members:
            return 0.0
        return collective.sent * size / here

    def sent(self, moved: Traffic) -> float:
        """Bytes that a machine sends to others in a step."""
        return sum(self.crossing(collective) * times for collective, times in moved.counted().items())

    def seconds(self, collective: Collective | None) -> float:
        if collective is None:
            return 0.0
        inside = collective.sent / self.links if self.gpus_per_node > collective.apart else 0.0
        return max(inside, self.crossing(collective) / self.network) / USED_SHARE + LATENCY


ASSUMED = Network(gpus_per_node=8, links=450e9, network=400e9)  # NVLink 4; 8 ports of 400 Gb/s


# ---------------------------------------------------------------------------------------------------- compute


class Work(NamedTuple):
    """What the busiest process does in a step."""

    micro_batches: float
    tokens: float
    supervised_tokens: float
    images: float


class Cost(NamedTuple):
    """Seconds of a process for each, its optimizer in `step`. forward: share of the LLM's that is its forward pass."""

    step: float
    micro_batch: float
    token: float
    supervised_token: float
    image: float
    forward: float = 1 / 3
    communicates: bool = False  # whether what moves between processes is in it

    def llm(self, work: Work) -> float:
        return work.tokens * self.token + work.supervised_tokens * self.supervised_token

    def of(self, work: Work) -> float:
        return self.step + work.micro_batches * self.micro_batch + self.llm(work) + work.images * self.image


@dataclass(frozen=True)
class Rates:
    """What a device reached at the shapes of 7B. FLOPs as MFU counts them."""

    device: str
    measured: str  # when and with what
    tower: float  # FLOP/s
    optimizer: float  # bytes a second, OPTIMIZER_BYTES for each trained weight
    optimizer_seconds: float  # beside that, a step
    micro_batch_seconds: float  # beside its work
    llm: Mapping[str, Mapping[str, Mapping[str, float]]]  # stage, checkpointing: flops_per_second, forward


@functools.cache
def known_rates(path: Path = RATES) -> dict[str, Rates]:
    """Those of the file, by device."""
    return {name: Rates(device=name, **found) for name, found in json.loads(path.read_text(encoding="utf-8")).items()}


def words(device: str) -> set[str]:
    return set(re.split(r"[\s-]+", device))


def memory_of(device: str) -> tuple[float, float] | None:
    """Bytes of a known device's memory, and what it moves of them a second; None for a slice of a GPU."""
    of_device = words(device)
    if "MIG" in of_device:
        return None
    return next((found for name, found in MEMORY.items() if of_device.issuperset(name.split())), None)


def is_known(device: str) -> bool:
    """Whether it was measured, or peak and memory are known that make rates of another's."""
    return device in known_rates() or (peak_by_name(device) is not None and memory_of(device) is not None)


def cost_on(
    device: str, stage: Stage, checkpointing: str, flops: Flops, trained_weights: float
) -> tuple[Cost, list[str]] | None:
    """Seconds on a device, and what they rest on; None where nothing is known of it.

    trained_weights: how many of them a process updates. A device that was not measured is taken to reach the share of
    its peak and of its memory's bandwidth that a measured one did.
    """
    rates = known_rates()
    measured = device if device in rates else max(rates, key=lambda name: len(words(name) & words(device)), default="")
    peak, memory = peak_by_name(device), memory_of(device)
    if not measured:
        return None
    of = rates[measured]
    said = [f"FLOP/s and optimizer: measured on an {measured} at 7B's shapes ({of.measured})"]
    faster = faster_memory = 1.0
    if measured != device:
        its_peak, its_memory = peak_by_name(measured), memory_of(measured)
        if peak is None or memory is None or its_peak is None or its_memory is None:
            return None
        faster, faster_memory = peak / its_peak, memory[1] / its_memory[1]
        said.append(
            f"{device}: not measured; assumed to reach the {measured}'s share of its peak "
            f"(× {faster:.2f}) and of its memory's bandwidth (× {faster_memory:.2f})"
        )
    found = of.llm.get(stage)
    if not found:
        other, found = next(iter(of.llm.items()))
        said.append(f"LLM in {stage}: not measured; assumed to reach the FLOP/s of {other}")
    way = checkpointing if checkpointing in found else next(iter(found))
    rate, forward = found[way]["flops_per_second"] * faster, found[way]["forward"]
    longer = 1 + forward * (RECOMPUTED[checkpointing] - RECOMPUTED[way])
    if way != checkpointing:
        said.append(
            f"activation checkpointing {checkpointing}: measured with {way}; assumed to take {longer:.2f} × as long, "
            f"by {RECOMPUTED[checkpointing]:g} forward passes computed again instead of {RECOMPUTED[way]:g}"
        )
    optimizer = OPTIMIZER_BYTES * trained_weights / (of.optimizer * faster_memory)
    cost = Cost(
        step=of.optimizer_seconds + optimizer,
        micro_batch=of.micro_batch_seconds,
        token=flops.token / rate * longer,
        supervised_token=flops.supervised_token / rate,
        image=flops.image / (of.tower * faster),
        forward=forward / longer,
    )
    return cost, said


# ---------------------------------------------------------------------------------------------------- together


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step."""

    work: Work
    tokens: float  # of all processes, without padding
    communicates: bool  # whether communication was measured with the compute
    compute: float  # forward and backward of all micro-batches
    between: float  # optimizer, and what a step and a micro-batch take beside their work
    communication: float  # of all collectives, one after the other
    exposed: float  # of it, what no compute hides
    assumed: list[str]

    @property
    def seconds(self) -> float:
        return self.compute + self.between + self.exposed


def predict_run(
    config: TrainConfig,
    stage: Stage,
    plan: Plan,
    of_step: tuple[float, float, float],
    processes: int,
    *,
    device: str,
    network: Network,
    calibrated: "Calibration | None" = None,
) -> Prediction | None:
    """Of a planned run whose steps have so many tokens, supervised tokens and images; None: no rate is known.

    Known rates are of bf16: none tells of fp32.

    calibrated: seconds measured on the machine at hand, by as many processes, instead of known rates.
    """
    tokens, supervised, images = of_step
    packing = config.data.packing
    # A bin that is emptier than its neighbours' waits for them; padding is computed too.
    share = processes * (plan.batches.packed if packing else plan.batches.padded)
    work = Work(plan.batches.micro_batches_mean, tokens / share, supervised / share, images / share)
    moved = traffic_of(config, plan, processes)
    if calibrated is not None:
        cost, said = calibrated.cost, calibrated.said()
    elif config.precision == "fp32":
        return None
    else:
        shards = config.sharding.size or processes
        trained = sum(weight.part(shards) for weight in plan.weights if weight.trained and weight.unit != "tower")
        found = cost_on(device, stage, config.sharding.activation_checkpointing, plan.flops, trained)
        if found is None:
            return None
        cost, said = found
        if processes > 1:
            said += network_said(network, -(-processes // network.gpus_per_node))
        if not network.holds(processes, shards):
            said.append(
                f"what crosses is a guess: groups of {shards} lie unlike in machines of {network.gpus_per_node}"
            )
        if config.sharding.compile:
            said.append("--sharding.compile: measured without; assumed to take as long")
        if config.lora.rank:
            said.append("LoRA adapters: measured without; their FLOPs are counted and take as long as the LLM's")
        if config.sharding.offload:
            said.append("what --sharding.offload moves to the host and updates there: not counted")
        said.append(
            f"rates: the same in micro-batches of {work.tokens / work.micro_batches:,.0f} tokens as in the full ones "
            "that were measured"
        )
        said.append("data is there in time; checkpoints are written beside; no restarts")
    return predict(work, cost, moved, network, said, tokens)


def predict(work: Work, cost: Cost, moved: Traffic, network: Network, assumed: list[str], tokens: float) -> Prediction:
    """A step of a process that does this work at this cost and moves so much."""
    calls = moved.counted()
    llm = cost.llm(work)
    compute = llm + work.images * cost.image
    exposed = 0.0 if cost.communicates else _exposed(moved, network, llm / work.micro_batches, cost.forward)
    return Prediction(
        work,
        tokens,
        cost.communicates,
        compute,
        cost.of(work) - compute,
        sum(network.seconds(collective) * times for collective, times in calls.items()),
        exposed,
        assumed,
    )


def _exposed(moved: Traffic, network: Network, llm_seconds: float, forward: float) -> float:
    """Seconds of a step in which compute waits for what moves.

    While a layer is at work the next one is gathered and, going back, the one before is reduced. So the first gather
    and the last reduction of a pass are waited for, and of the others what takes longer than a layer's compute.
    """
    root, layers = moved.root, moved.layers
    count = len(layers)
    gather = network.seconds(layers[0].gather)
    scatter, summed = network.seconds(layers[0].scatter), network.seconds(layers[0].sum)
    ahead, back = llm_seconds * forward / count, llm_seconds * (1 - forward) / count

    def waits(first: float, each: float, hidden_by: float) -> float:
        return first + (count - 1) * max(0.0, each - hidden_by)

    forwards = moved.forward_gathers * (network.seconds(root.gather) + waits(gather, gather, ahead))
    regathered = gather if moved.backward_gathers else 0.0
    backwards = (moved.scatters - moved.sums) * waits(regathered + scatter, regathered + scatter, back)
    last = moved.sums * waits(regathered + scatter + summed, regathered + scatter + summed, back)
    ends = moved.scatters * network.seconds(root.scatter) + moved.sums * network.seconds(root.sum)
    return forwards + backwards + last + ends


def network_said(network: Network, machines: int) -> list[str]:
    """What `predict` takes for granted of it."""
    said = [
        f"links: {network.links / 1e9:,.0f} GB/s each way of a GPU inside a machine, of which {USED_SHARE:.0%} are "
        f"reached, and {LATENCY * 1e6:.0f} µs a collective"
    ]
    if machines > 1:
        said.append(
            f"network: {network.network / 1e9:,.0f} GB/s each way of a machine of {network.gpus_per_node} GPUs, of "
            f"which {USED_SHARE:.0%} are reached, shared with nobody"
        )
    return [*said, "communication takes no compute away: both run at their own speed at the same time"]
