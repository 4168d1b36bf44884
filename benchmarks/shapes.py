"""The sizes of AlignGPT-7B that the cases are made of; those of 13B where they differ."""

FEATURES = 1024  # width of CLIP ViT-L/14-336
ROWS = 576  # of an image
WIDTH, WIDTH_13B = 4096, 5120  # of the LLM
VOCABULARY, VOCABULARY_LLAMA3 = 32000, 128256
LEVELS, GATE_HIDDEN = 8, 256
HEADS, KV_HEADS_GQA, HEAD_DIM = 32, 8, 128

CPU_WIDTH = 1024  # where two cores have to do

IMAGES = 16  # samples of a micro-batch, one image each
TEXT = 128  # text tokens of its longest sample, BOS among them
LOSS_ROWS, SUPERVISED = 16384, 0.15  # of a packed micro-batch, and the part of them that carries a label
