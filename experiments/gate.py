"""`python -m experiments.gate MODEL OUT --times T`: a model whose gate has weights T times as large, all else equal.

A gate that has not been trained is as it was drawn, so this is one drawn from T times the range: its logits differ more
between pictures before training begins. Its biases are left as they are. OUT is made whole or not at all.

ValueError: MODEL has no gate.
"""

import argparse
import shutil
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from demo.miniature import made_whole

WEIGHTS = ("model.align_gate.linear_1.weight", "model.align_gate.linear_2.weight")


def draw_larger(model: Path, out: Path, times: float) -> None:
    found: list[str] = []
    with made_whole(out) as folder:
        for file in sorted(model.iterdir()):
            if file.suffix != ".safetensors":
                shutil.copyfile(file, folder / file.name)
                continue
            with safe_open(file, framework="pt") as header:
                metadata = header.metadata()
            tensors = load_file(file)
            for name in tensors.keys() & set(WEIGHTS):
                tensors[name] *= times
                found.append(name)
            save_file(tensors, folder / file.name, metadata=metadata)
        if len(found) != len(WEIGHTS):
            raise ValueError(f"MODEL is {model}, with weights {found or 'of no gate'}; it needs {', '.join(WEIGHTS)}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.gate", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, help="folder that is made")
    parser.add_argument("--times", type=float, required=True)
    args = parser.parse_args()
    try:
        draw_larger(args.model, args.out, args.times)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
