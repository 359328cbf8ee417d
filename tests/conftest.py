"""Set before torch is imported: what the suite needs of its environment."""

import os

# Some virtual machines report AMX and trap on its instructions; oneDNN would use them for bf16 matmuls.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches the network; the hub's tests start a server of their own
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would warn after fork
