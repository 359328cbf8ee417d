"""Set before torch is imported: what the suite needs of its environment."""

import os
import signal

# A shell starts what ends in & with Ctrl-C ignored, and children inherit that; the tests send it to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Some virtual machines report AMX and trap on its instructions; oneDNN would use them for bf16 matmuls.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
# One thread: small models are no faster with two, and two have been seen to give other last digits from run to run.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches the network; the hub's tests start a server of their own
os.environ.pop("PYTHONUNBUFFERED", None)  # set in many containers; it hides what a buffer holds that is never written
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would warn after fork

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():  # before triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the CUDA kernels run on the CPU, one program after another


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a small random model over the shipped tokenizer: whoever changes it works on a copy."""
    from helpers import make

    import minichat
    from minichat.cli import BASE
    from minichat.tokenizer import Tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("base"), Tokenizer(BASE)
    shape = dict(hidden_size=64, intermediate_size=96, head_dim=16, sliding_window=16, max_position_embeddings=512)
    minichat.save(make(vocab_size=tokenizer.vocab_size, **shape), tokenizer, folder)
    return folder
