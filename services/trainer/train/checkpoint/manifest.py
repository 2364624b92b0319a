"""The names of the files in a checkpoint. It reads and writes nothing."""

VERSION = 1
OPTIMIZER = "optimizer.safetensors"
RANDOM = "rng.safetensors"
STATE = "state.json"
SHARDS = "shards"
FOLDER_NAME = "step-{:08d}"
