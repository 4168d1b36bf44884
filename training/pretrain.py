"""Stage 1: the projector and the alignment table learn on image–caption pairs that carry an alignment level.

    torchrun --nproc-per-node 8 training/pretrain.py aligngpt-7b --model.llm VICUNA --model.vision CLIP \\
        --data.path blip_laion_cc_sbu_558k.json --data.image-folder IMAGES --run-dir runs/stage-1

`--help` after the preset lists every field. Exit status: 0 done, 1 a file or value that cannot be used, 2 a command
line that is not understood.
"""

from training.entry import run

if __name__ == "__main__":
    run("pretrain")
