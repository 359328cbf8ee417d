"""A model for decoding INT4 on the CPU: as the kernel reads it, in one file of the cache that is mapped into memory.

The first start quantises, which takes a minute or two for a 7B, and writes the file; the next one opens it, and the
pages come as they are read. A head that the scheme skips is in INT8 here, groups of 128: in fp32 it would be an eighth
of all that a token reads.
"""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from minichat import device as devices
from minichat import files, kernels, lora, weights
from minichat import int4 as quant
from minichat.console import say
from minichat.errors import BadInput
from minichat.model import Mistral, without_weights
from minichat.tokenizer import Tokenizer

VERSION = 2  # of the file, and of the layout in kernels/int4_cpu.cpp
LARGE = 64 << 20  # bytes of a model from which on it is kept
FILE = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"


def load_model(
    source: str,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    int4: bool | quant.Scheme = False,
    adapter: str | None = None,
) -> tuple[Mistral, Tokenizer]:
    """weights.load_model for a model that will only decode: on the CPU, an INT4 one comes from the cache if it can."""
    where = devices.pick(device)
    folder, adapters = weights.chain(source)
    adapters += [] if adapter is None else [lora.Adapter(weights.resolve(adapter))]
    scheme = weights.wanted_scheme(folder, int4)
    on_cpu = where.type == "cpu" and dtype in (None, torch.float32)
    if not (scheme and not scheme.nf4 and on_cpu and kernels.for_device(where) is kernels.named("cpu")):
        return weights.load_model(source, device, dtype, int4, adapter)
    at = files.cache_folder() / "packed" / _key(folder, adapters, scheme)
    if (at / FILE).exists():
        weights.warn_of(source, adapters, scheme, adapter and adapters[-1])
        return _open(at / FILE, folder, scheme), weights.tokenizer_of(folder, adapters)
    model, tokenizer = weights.load_model(source, device, dtype, int4, adapter)
    if type(model.lm_head) is nn.Linear and (of_head := _of_head(model.lm_head)):
        model.lm_head = quant.Int4Linear.from_weight(model.lm_head.weight.detach(), of_head)
    tied = model.config.tie_word_embeddings and type(model.lm_head) is nn.Linear  # which no group fits
    tensors = {} if tied or lora.adapted(model) else _tensors(model)
    if sum(tensor.nbytes for tensor in tensors.values()) < LARGE:
        return model, tokenizer
    try:
        with files.staged(at, last=FILE) as new:
            files.write_mapped(tensors, new / FILE)
    except BadInput as error:  # a cache is no reason to fail
        say(f"not kept for the next start: {error}")
        return model, tokenizer
    say(f"kept for the next start in {at}")
    del model, tensors
    devices.release_host_memory()
    return _open(at / FILE, folder, scheme), tokenizer


def _key(folder: Path, adapters: list[lora.Adapter], scheme: quant.Scheme) -> str:
    """A hash of all that decides what the file holds: contents where they are small, else samples, sizes and times."""
    read = [*folder.glob("*.safetensors"), *(adapter.folder / lora.WEIGHTS for adapter in adapters)]
    known = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(read)]
    known += [weights.identity(folder), *(weights.identity(adapter.folder) for adapter in adapters)]
    known += [(folder / "config.json").read_text(), *(adapter.config for adapter in adapters), str(scheme), VERSION]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]


def _of_head(head: nn.Linear) -> quant.Scheme | None:
    """How a head is held that the model's scheme leaves as it is: in 8 bits, in the largest groups that fit."""
    fitting = [size for size in (128, 64, 32) if head.in_features % size == 0]
    return quant.Scheme(bits=8, group_size=fitting[0], skip=()) if fitting else None


def _tensors(model: Mistral) -> dict[str, Tensor]:
    """What the file holds: the buffers of quantised linears, and the parameters of all else."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, quant.Int4Linear):
            found |= {f"{name}.{key}": tensor for key, tensor in module.named_buffers(recurse=False)}
    for name, weight in model.named_parameters():
        half = weight.detach().bfloat16()
        is_embedding = name == EMBEDDING  # only its rows are read, each cast to the activations' type
        found[name] = half if is_embedding and torch.equal(half.float(), weight) else weight.detach()
    return found


class _Rows(nn.Module):
    """An embedding whose table stays in the file: a token needs one row of it."""

    def __init__(self, file: Path, shape: torch.Size):
        super().__init__()
        self.rows, self.shape = files.read_rows(file, EMBEDDING), shape

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids)

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.shape)


def _open(file: Path, folder: Path, scheme: quant.Scheme) -> Mistral:
    """The model in a file that load_model wrote. Raises BadInput if it is corrupt."""
    tensors = files.read_mapped(file)
    model = without_weights(weights.read_config(folder))
    model.scheme = scheme
    try:
        for name, module in list(model.named_modules()):
            parent, _, leaf = name.rpartition(".")
            if isinstance(module, nn.Linear) and f"{name}.codes" in tensors:
                N, K = module.out_features, module.in_features
                codes, scale, zero = (tensors.get(f"{name}.{key}") for key in ("codes", "scale", "zero"))
                blocks, words, groups = -(-N // 16), codes.shape[1], scale.shape[1]
                fits = codes.shape == (blocks, words, 16) and scale.shape == (blocks, groups, 16)
                fits &= codes.dtype == torch.int32 and scale.dtype in quant.reference.SCALE_DTYPES
                quantised = scheme if quant.wanted(name, module, scheme) else _of_head(module)
                fits &= (words, groups) == (K * quantised.bits // 32, K // quantised.group_size)
                fits &= (zero is None) == quantised.symmetric
                fits &= zero is None or (zero.shape, zero.dtype) == (scale.shape, torch.uint8)
                if not fits:
                    raise KeyError(f"{name} does not fit")
                packed = quant.Packed(codes, scale, zero, N, K, quantised.group_size, quantised.bits)
                setattr(model.get_submodule(parent), leaf, quant.Int4Linear(packed, "cpu"))
            elif f"{name}.weight" == EMBEDDING:
                if tensors[EMBEDDING].shape != module.weight.shape:
                    raise KeyError(f"{name} does not fit")
                model.model.embed_tokens = _Rows(file, module.weight.shape)
            elif (weight := tensors.get(f"{name}.weight")) is not None:
                if (weight.shape, weight.dtype) != (module.weight.shape, torch.float32):
                    raise KeyError(f"{name} does not fit")
                module.weight = nn.Parameter(weight, requires_grad=False)
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            raise KeyError("not all weights are there")
    except (LookupError, AttributeError, RuntimeError) as error:
        raise BadInput(f"{file} is corrupt ({error}); delete it: it is made again") from None
    return model.eval()
