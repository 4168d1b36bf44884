"""Both training stages: configs, the loop, sharding, checkpoints."""
