"""What `--dry-run` and `python -m training.plan` print alike: parameters, memory, communication, seconds and hours."""

from training.cluster import Network, Prediction, Traffic
from training.loader import Order
from training.plan import GROUPS, Lengths, Plan, Weight


def many(count: int, one: str, more: str) -> str:
    return f"{count:,} {one if count == 1 else more}"


def unit_of(number: float, prefixes: str = "GMK") -> tuple[str, float]:
    """The prefix in which a number is read easily, and its factor."""
    factors = {"T": 1e12, "G": 1e9, "M": 1e6, "K": 1e3}
    prefix = next((prefix for prefix in prefixes if number >= factors[prefix]), prefixes[-1])
    return prefix, factors[prefix]


def gigabytes(count: float) -> str:
    prefix, factor = unit_of(count)
    return f"{count / factor:,.2f} {prefix}B"


def hours(seconds: float) -> str:
    if seconds < 60:
        return "less than a minute"
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:,.1f} minutes"


def of_step(lengths: Lengths, order: Order, total_steps: int) -> tuple[float, float, float]:
    """Tokens, supervised tokens and images of a step, on average over the run."""
    samples = order.samples_until(total_steps) / total_steps
    text = lengths.tokens - lengths.image_rows * lengths.images
    return (
        samples * float(lengths.tokens.mean()),
        samples * float(text.clip(0).mean()) * lengths.supervised,
        samples * float(lengths.images.mean()),
    )


def weight_lines(weights: list[Weight]) -> list[str]:
    """Parameters by group."""
    lines = [f"{'parameters':36}{'trained':>16}{'frozen':>16}"]
    for group in (*GROUPS, "all"):
        members = [weight for weight in weights if group in (weight.group, "all")]
        trained = sum(weight.elements for weight in members if weight.trained)
        frozen = sum(weight.elements for weight in members) - trained
        if members:
            lines.append(f"  {group:34}" + "".join(f"{n:16,}" if n else f"{'-':>16}" for n in (trained, frozen)))
    return lines


def memory_lines(plan: Plan, device_bytes: int) -> list[str]:
    """Bytes of a process; what lies on the host is marked."""
    need, largest = plan.memory, plan.batches.largest
    where = ", on the host" if need.offload else ""
    none_yet = "" if need.gradients_then else "; made after that moment, not in the sum"
    whole = "; whole until the step's last micro-batch" if need.gradients_then > need.gradients else ""
    rows = (
        ("parameters", need.parameters, f"exact{where}"),
        ("vision tower, whole in each process", need.tower, "exact"),
        ("gradients", max(need.gradients, need.gradients_then), f"exact{where}{none_yet}{whole}"),
        ("optimizer", need.optimizer, f"exact{where}"),
        ("gathered while at work", need.gathered, "estimate"),
        ("gradients being reduced", need.reducing, "estimate"),
        (
            "activations",
            need.activations,
            f"estimate for {largest.tokens:,} tokens and {many(largest.images, 'image', 'images')}",
        ),
        ("pixels made ahead", need.pixels, "estimate"),
    )
    prefix, factor = unit_of(max(need.device, need.host))
    lines = [
        f"{'memory of a process':36}{prefix + 'B':>16}",
        *(f"  {name:34}{n / factor:16,.3f}  {note}" for name, n, note in rows),
    ]
    share = f"{need.device / device_bytes:.0%} of {gigabytes(device_bytes)}; the most at once, {need.moment}"
    lines.append(f"  {'together':34}{need.device / factor:16,.3f}  {share}")
    if need.host:
        lines.append(f"  {'on the host':34}{need.host / factor:16,.3f}")
    lines.append("  CUDA, NCCL and the allocator's gaps come on top")
    return lines


def communication_lines(traffic: Traffic, network: Network, processes: int) -> list[str]:
    """What a process and a machine move in a step."""
    if processes == 1:
        return ["communication: none, with one process"]
    kinds: dict[str, list[float]] = {}
    for collective, times in traffic.counted().items():
        found = kinds.setdefault(f"{collective.kind} of {collective.members}", [0, 0.0, 0.0])
        for place, value in enumerate((1, collective.bytes, collective.sent)):
            found[place] += times * value
    kinds["together"] = [sum(values) for values in zip(*kinds.values(), strict=True)]
    prefix, factor = unit_of(kinds["together"][1])
    lines = [f"{'communication of a step':36}{'calls':>8}{f'{prefix}B, whole':>14}{f'{prefix}B, sent by each':>20}"]
    for kind, (calls, whole, sent) in kinds.items():
        lines.append(f"  {kind:34}{calls:8,.0f}{whole / factor:14,.3f}{sent / factor:20,.3f}")
    machines = -(-processes // network.gpus_per_node)
    if machines > 1:
        lines.append(f"  a machine sends {gigabytes(network.sent(traffic))} of it to others")
    return lines


def hours_lines(prediction: Prediction, flops: float, total_steps: int, processes: int) -> list[str]:
    """Seconds of a step by what takes them, and the run's hours."""
    seconds, total = prediction.seconds, prediction.seconds * total_steps
    waits, note = f"{prediction.exposed:8.3f}", ""
    if prediction.communicates:  # it was measured with the rest
        waits = f"{'in the above':>12}"
    elif prediction.communication:
        share = 1 - prediction.exposed / prediction.communication
        note = f"; of {prediction.communication:,.3g} s of communication {max(share, 0):.0%} are behind compute"
    prefix, factor = unit_of(flops / seconds / processes, "TGM")
    return [
        "seconds of a step",
        f"  {'forward and backward':34}{prediction.compute:8.3f}",
        f"  {'optimizer and what is fixed':34}{prediction.between:8.3f}",
        *([f"  {'waiting for communication':34}{waits}{note}"] if processes > 1 else ()),
        f"  {'together':34}{seconds:8.3f}",
        f"  {flops / seconds / processes / factor:,.1f} {prefix}FLOP/s a process, "
        f"{prediction.tokens / seconds:,.0f} tokens/s of all",
        f"time: {hours(total)}, {total_steps:,} steps; {total * processes / 3600:,.1f} GPU-hours",
    ]
