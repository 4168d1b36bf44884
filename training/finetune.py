"""Stage 2: LLM, projector and gate learn to follow instructions; the gate weighs the levels that stage 1 learnt.

    torchrun --nproc-per-node 8 training/finetune.py aligngpt-7b --model.init runs/stage-1/model \\
        --data.path llava_v1_5_mix665k.json --data.image-folder IMAGES --run-dir runs/stage-2

`--help` after the preset lists every field. Exit status: 0 done, 1 a file or value that cannot be used, 2 a command
line that is not understood.
"""

from training.entry import run

if __name__ == "__main__":
    run("finetune")
