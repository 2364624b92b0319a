"""Limits and defaults of the settings of a run. It knows no setting's meaning."""

from formats.adapters import RANK_MAX

PATH_LENGTH_MAX = 4096
MAX_SEQ_LENGTH_MIN = 16
MAX_SEQ_LENGTH_MAX = 131_072
MAX_SEQ_LENGTH_DEFAULT = 4096
LORA_RANK_MAX = RANK_MAX
TARGET_MODULES_MAX = 64
COMMAND_WORDS_MAX = 64
MICRO_BATCH_TOKENS_MIN = 64
MICRO_BATCH_TOKENS_MAX = 1_048_576
# By kind of device. Measured on 2 cores in tokens/s and peak GiB, LoRA at 12M weights with a 32k vocabulary: 512: 1938,
# 0.70; 1024: 1898, 0.79; 4096: 1405, 1.35; at 1M weights 512: 5998; 1024: 7198; 2048: 6776. Small ones pad less and
# stay near the caches, large ones pay the cost of a call less often. A GPU wants as much at once as fits; if it does
# not, it is halved.
MICRO_BATCH_TOKENS = {"cpu": 768, "cuda": 8192}
PROCESSES_MAX = 64
NODES_MAX = 128
DEVICE_MEMORY_BYTES_MAX = 2**50
TEMPLATE_DATE_DEFAULT = "2024-07-26"
