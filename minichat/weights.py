"""Hugging Face folders <-> models: config.json and safetensors, read a tensor at a time straight to the device."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from minichat import device as devices
from minichat import int4 as quant
from minichat.console import say
from minichat.errors import BadInput, why, within
from minichat.files import fingerprint, read_json, staged, write_json, write_tensors
from minichat.lora import (
    CONFIG,
    WEIGHTS,
    Adapter,
    Frozen,
    adapted,
    freeze,
    load,
    rounding,
    say_merged_over,
)
from minichat.model import Config, Mistral, without_weights
from minichat.tokenizer import FILES as TOKENIZER_FILES
from minichat.tokenizer import Tokenizer

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000


# ---- where a model lies ----


def resolve(source: str | Path) -> Path:
    """The local folder of a model: `source` itself, a run folder's model/ or adapter/, or a hub id's snapshot.

    A hub id is owner/name or owner/name@revision; the token comes from the environment (HF_TOKEN), and what is in
    the hub's cache works offline. Raises BadInput if there is no such model.
    """
    try:
        return _resolved(source)
    except (OSError, RuntimeError) as error:  # a folder that may not be searched, a name too long, ~nobody
        raise BadInput(f"{source}: {getattr(error, 'strerror', None) or error}") from None


def _resolved(source: str | Path) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        for inner in (folder, folder / "model", folder / "adapter"):
            if (inner / CONFIG).exists() or _describes_model(inner / "config.json"):
                return inner
        if (folder / "metrics.jsonl").exists():
            saved = [path for path in (folder / "checkpoints").glob("step-*") if path.name[5:].isdecimal()]
            last = max(saved, key=lambda path: int(path.name[5:]), default=None)
            more = f"; go on with --resume, or take its last checkpoint: {last}" if last else ""
            raise BadInput(f"{folder} is a run that did not finish: it holds neither model/ nor adapter/{more}")
        within = [path for here in ("*", "runs/*") for path in sorted(folder.glob(f"{here}/metrics.jsonl"))]
        more = f"; runs in it: {', '.join(str(path.parent) for path in within)}" if within else ""
        raise BadInput(f"{folder}: holds neither config.json of a model nor {CONFIG} of an adapter{more}")
    if folder.exists():
        raise BadInput(f"{folder} is a file; --model takes a folder in Hugging Face format, or a hub id")
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", str(source))
    if not match or str(source).startswith("."):
        raise BadInput(f"{source}: no such folder, and not a hub id (owner/name or owner/name@revision)")
    return _download(match[1], match[2])


def _describes_model(config: Path) -> bool:
    """A run folder has a config.json too: that of its flags."""
    try:
        raw = json.loads(config.read_text())
    except FileNotFoundError:
        return False
    except (OSError, ValueError, RecursionError):
        return True  # let the reader say what is wrong with it
    return not (isinstance(raw, dict) and "minichat" in raw)


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
    wanted = {"revision": revision, "allow_patterns": patterns, "ignore_patterns": "consolidated*"}
    refused = HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError
    unreached = None
    try:
        try:
            at = snapshot_download(repo, **wanted)
        except refused:
            raise
        except Exception as error:  # of whichever HTTP library this version of the hub's package uses
            unreached = error
            at = snapshot_download(repo, **wanted, local_files_only=True)
            say(f"the hub did not answer ({type(error).__name__}): {repo} as far as it is here")
    except refused as error:
        raise BadInput(f"{repo}: no such folder here, and the hub gave none: {why(unreached or error)}") from None
    if not any(Path(at).glob("*.safetensors")):
        how = _to_safetensors(repo, repo.split("/")[1])
        raise BadInput(f"{repo} has no safetensors; pickle can run code: convert it where you trust it: {how}")
    return Path(at)


def _to_safetensors(model: object, folder: object) -> str:
    """The command with which transformers writes a model of pickles as safetensors."""
    how = f"M.from_pretrained('{model}', dtype='auto').save_pretrained('{folder}')"
    return f'python -c "from transformers import AutoModelForCausalLM as M; {how}"'


def chain(source: str | Path) -> tuple[Path, list[Adapter]]:
    """The base folder of `source`, and the adapters over it in the order of merging: an adapter folder is a model.

    Raises BadInput if a base is missing, or is another than the adapter was trained over.
    """
    folder, adapters = resolve(source), []
    while (folder / CONFIG).exists():
        adapter = Adapter(folder)
        adapters.insert(0, adapter)
        if len(adapters) > 16:
            raise BadInput(f"{source}: adapters over adapters without end")
        base = adapter.config.get("base_model_name_or_path")
        if not base or not isinstance(base, str):
            raise BadInput(f"{folder / CONFIG}: names no base; give it: --model BASE --adapter {folder}")
        try:
            # a project that was moved has its runs where they were to one another
            beside = folder / adapter.metadata.get("base_beside", base)
            below = resolve(beside if beside.is_dir() and not Path(base).expanduser().is_dir() else base)
        except (BadInput, OSError, RuntimeError) as error:
            raise BadInput(f"the base of {folder}: {error}; give it: --model BASE --adapter {folder}") from None
        check_base(adapter, below)
        folder = below
    return folder, adapters


def check_base(adapter: Adapter, base: Path) -> None:
    """Raise BadInput if the adapter says that it was trained over other weights than `base` holds now."""
    trained_over = adapter.metadata.get("base_fingerprint")
    if trained_over and trained_over != identity(base):
        raise BadInput(
            f"{adapter.folder} was trained over other weights than {base} holds now; train it again, "
            f"or apply it knowingly: --model {base} --adapter {adapter.folder}"
        )


def is_base(adapter: Adapter, source: str) -> bool:
    """Whether the adapter was trained over `source`: by its fingerprint, or where it has none, by its base's name."""
    folder = resolve(source)
    if trained_over := adapter.metadata.get("base_fingerprint"):
        return trained_over == identity(folder)
    named = adapter.config.get("base_model_name_or_path") or ""
    return named == source or Path(named).is_dir() and Path(named).resolve() == folder.resolve()


def identity(folder: Path) -> str:
    """A short hash that tells one set of weights from another: of an adapter, or of a model's shards."""
    if (folder / CONFIG).exists():
        return fingerprint(folder / WEIGHTS)
    shards = [fingerprint(folder / name) for name in sorted(set(Shards(folder).files.values()))]
    return shards[0] if len(shards) == 1 else hashlib.sha256("".join(shards).encode()).hexdigest()[:16]


# ---- reading ----


class Shards:
    """The tensors of a model folder, by name. Raises BadInput for what cannot be read, naming file and tensor."""

    def __init__(self, folder: Path):
        self.folder = folder
        file = folder / "model.safetensors"  # first, as transformers does: it leaves the index of shards it replaces
        if (folder / INDEX).exists() and not file.exists():
            self.files = read_json(folder / INDEX).get("weight_map")
            named = isinstance(self.files, dict) and all(isinstance(f, str) for f in self.files.values())
            if not self.files or not named:
                raise BadInput(f"{folder / INDEX}: holds no weight_map")
            for name in sorted(set(self.files.values())):
                if Path(name).name != name or not name.endswith(".safetensors"):
                    raise BadInput(f"{folder / INDEX}: {name!r} is not the name of a safetensors file beside it")
                if not (folder / name).exists():
                    raise BadInput(f"{folder / name}: not there, but {INDEX} lists it; download it again")
            return
        if not file.exists():
            pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
            if pickles:
                how = _to_safetensors(folder, folder)
                raise BadInput(f"{pickles[0]}: pickle can run code; make it safetensors where you trust it: {how}")
            raise BadInput(f"{folder}: holds neither model.safetensors nor {INDEX}")
        with self._open(file) as tensors:
            self.files = dict.fromkeys(tensors.keys(), file.name)

    def read(self, name: str) -> Tensor:
        """One tensor, memory-mapped. The file is opened for it alone, so that its pages go when it goes."""
        file = self.folder / self.files[name]
        with self._open(file) as tensors:
            try:
                return tensors.get_tensor(name)
            except Exception as error:
                raise BadInput(f"{file}: tensor {name} cannot be read: {error}") from None

    def _open(self, file: Path):
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{file}: not a whole safetensors file: {error}; download it again") from None


def read_config(folder: Path) -> Config:
    """config.json as a Config; BadInput names the file."""
    with within(folder):
        return Config.from_dict(read_json(folder / "config.json"))


def read_scheme(folder: Path) -> quant.Scheme | None:
    """How the folder's weights are quantised, None if they are not; BadInput names the folder."""
    with within(folder):
        return quant.parse_quantization_config(read_json(folder / "config.json").get("quantization_config"))


def wanted_scheme(folder: Path, int4: bool | quant.Scheme) -> quant.Scheme | None:
    """The folder's own scheme, or the one that is asked for. Raises BadInput if they are different ones, or if the one
    that is asked for has the head of a model that ties it to its embedding.
    """
    packed = read_scheme(folder)
    if packed and int4 not in (False, True) and int4 != packed:
        raise BadInput(f"{folder} is quantised already, as {packed}; it cannot be loaded as {int4}")
    if not packed and isinstance(int4, quant.Scheme):
        quant.check_head(int4, read_config(folder).tie_word_embeddings, folder)
    return packed or (quant.Scheme() if int4 is True else int4 or None)


def load_model(
    source: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    int4: bool | quant.Scheme = False,
    adapter: str | Path | None = None,
    only: Sequence[str] | None = None,
    shapes_alone: bool = False,
) -> tuple[Mistral, Tokenizer]:
    """A model and its tokenizer from a folder in Hugging Face format, an adapter or run folder, or a hub id.

    device: None is the best there is. dtype of what is not quantised: None is bf16 on CUDA and HPU, fp32 on the CPU.
    int4: quantise the decoder's linears as they are read (True: the default Scheme). A folder that is quantised
    already loads as it is. Adapters are merged tensor by tensor, in float32 and rounded once; those that were trained
    over the same INT4 or NF4 base stay beside it. adapter: one more, over whatever `source` is; only: of these modules.
    shapes_alone: on the meta device, without values: what a plan needs. Host memory peaks at the model plus one tensor.
    Raises BadInput.
    """
    where = devices.pick(device)
    dtype = dtype or devices.default_dtype(where)
    if shapes_alone:
        where = torch.device("meta")
    folder, scheme, merged, beside = _base_and_adapters(source, int4, adapter, only)
    if not shapes_alone:
        warn_of(source, merged, scheme, adapter and [*merged, *beside][-1])
    model = without_weights(read_config(folder))
    model.scheme = scheme
    tokenizer = tokenizer_of(folder, [*merged, *beside])  # before the weights: what is wrong with it shows at once
    values = devices.holds_values(where)
    if values:
        _fill(model, Shards(folder), where, dtype, read_scheme(folder), scheme, merged)
    else:  # what is merged into it shows in no shape
        imagine(model, where, dtype, scheme)
    _load_beside(model, beside)
    model.source = str(resolve(source).resolve()) if Path(source).expanduser().is_dir() else str(source)
    model.identity = identity(resolve(source)) if values else "none: shapes alone"
    return model.eval(), tokenizer


def _load_beside(model: Mistral, adapters: list[Adapter]) -> None:
    """Unmerged, one over the other: a model carries one adapter, and those below it are frozen into it."""
    for adapter in adapters:
        freeze(model)
        load(model, adapter)


def _base_and_adapters(
    source: str | Path, int4: bool | quant.Scheme, adapter: str | Path | None, only: Sequence[str] | None = None
) -> tuple[Path, quant.Scheme | None, list[Adapter], list[Adapter]]:
    """What load_model reads: the base's folder, how its linears are quantised, the adapters that are merged into them,
    and those that stay beside them. Raises BadInput."""
    folder, adapters = chain(source)
    if adapter is not None:
        adapters.append(Adapter(resolve(adapter)).only(only))
    scheme = wanted_scheme(folder, int4)
    first = len(adapters)  # of the last ones, that were trained over exactly this base in INT4
    while first and scheme is not None and adapters[first - 1].metadata.get("int4") == str(scheme):
        first -= 1
    merged, beside = adapters[:first], adapters[first:]
    if merged and read_scheme(folder):
        name = merged[-1].folder
        raise BadInput(
            f"{folder} is quantised: the adapter {name} cannot be merged into it; merge it into the float model, and "
            f"use that with --int4: python -m minichat.lora merge --adapter {name} --base FLOAT --force --out MERGED"
        )
    return folder, scheme, merged, beside


def warn_of(source: str | Path, merged: list[Adapter], scheme: quant.Scheme | None, given: Adapter | None) -> None:
    """Tell of adapters that go over other weights than they were trained over. given: the one beside `source`."""
    if given is not None and (own := given.metadata.get("base_fingerprint")) and own != identity(resolve(source)):
        say(f"warning: {given.folder} was trained over other weights than {source}")
    for one in merged:
        if over := one.metadata.get("int4"):
            say_merged_over(one.folder, over, "float weights" if scheme is None else f"weights of {scheme}")


def tokenizer_of(folder: Path, adapters: list[Adapter]) -> Tokenizer:
    """The tokenizer of the last adapter that has one, else the base's."""
    tuned = [a.folder for a in reversed(adapters) if (a.folder / "tokenizer.json").exists()]
    return Tokenizer(tuned[0] if tuned else folder)


@torch.no_grad()
def imagine(model: Mistral, where: torch.device, dtype: torch.dtype, scheme: quant.Scheme | None) -> None:
    """Weights without values, on a device that holds none: the folder needs none."""
    if scheme is not None:
        quant.check({n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}, scheme)
    for name, module in list(model.named_modules()):
        if scheme is not None and quant.wanted(name, module, scheme):
            N, K, groups = module.out_features, module.in_features, module.in_features // scheme.group_size
            q = torch.empty(N, K, dtype=torch.uint8, device="meta")
            scale = torch.empty(N, groups, dtype=scheme.scale_dtype, device="meta")
            zero = None if scheme.symmetric else scale.to(torch.uint8)
            _put(model, name, quant.Int4Linear.from_quantized(q, scale, zero, scheme.bits, where, nf4=scheme.nf4))
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            module.weight = nn.Parameter(torch.empty(module.weight.shape, dtype=dtype, device=where))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    devices.mark_step(where)


@torch.no_grad()
def _fill(model: Mistral, shards: Shards, where, dtype, packed, scheme, adapters: list[Adapter]) -> None:
    """Read every tensor of the model, each cast and placed once."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if scheme is not None:
        with within(shards.folder):
            quant.check(linears, scheme)
    names = list(model.state_dict(keep_vars=True))
    tied = model.config.tie_word_embeddings
    left = {n for n in shards.files if not n.endswith("rotary_emb.inv_freq")}  # a buffer of old Llama checkpoints
    if tied:
        names.remove("lm_head.weight")
        left.discard("lm_head.weight")
    for adapter in adapters:
        for name in adapter.pairs:
            if name not in linears:
                raise BadInput(f"{adapter.folder}: has weights for {name}, which {shards.folder} does not have")
            if tied and name == "lm_head":
                raise BadInput(f"{adapter.folder}: changes lm_head, which {shards.folder} shares with its embedding")
    worst = 0.0
    names.sort(key=lambda name: shards.files.get(name, ""))  # shard after shard, in the model's order within one
    for name in names:
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if packed and owner_name in linears and f"{owner_name}.weight_packed" in shards.files:
            keys = [k for k in quant.KEYS if f"{owner_name}.{k}" in shards.files]
            tensors = {key: shards.read(f"{owner_name}.{key}") for key in keys}
            left -= {f"{owner_name}.{key}" for key in keys}
            with within(f"{shards.folder / shards.files[f'{owner_name}.weight_packed']}: {owner_name}"):
                new = quant.from_tensors(tensors, (owner.out_features, owner.in_features), packed, where)
            _put(model, owner_name, new)
            devices.release_host_memory()
            continue
        if name not in left:
            missing = [n for n in names if n not in shards.files]
            rest = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise BadInput(f"{shards.folder}: tensor {name} is missing{rest}")
        left.discard(name)
        tensor = shards.read(name)
        file = shards.folder / shards.files[name]
        shape = getattr(owner, leaf).shape
        if tensor.shape != shape:
            raise BadInput(f"{file}: tensor {name} has shape {tuple(tensor.shape)}; config.json wants {tuple(shape)}")
        if not tensor.is_floating_point():
            raise BadInput(f"{file}: tensor {name} is {tensor.dtype}; wanted are floats")
        quantises = scheme is not None and not packed and quant.wanted(owner_name, owner, scheme)
        deltas = [d for a in adapters if (d := a.delta(owner_name, tensor)) is not None]
        if deltas:
            exact = tensor.float() + sum(deltas)
            tensor = exact if quantises else exact.to(dtype)
            worst = max(worst, rounding(exact, tensor))
        if quantises:
            near = tensor.to(devices.quantises(where))
            _put(model, owner_name, quant.Int4Linear.from_weight(near, scheme, where))
            devices.release_host_memory()
        else:
            setattr(owner, leaf, nn.Parameter(tensor.to(where, dtype), requires_grad=tensor.is_floating_point()))
    if left:
        name = min(left)
        rest = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise BadInput(f"{shards.folder / shards.files[name]}: tensor {name} is not one of this architecture's{rest}")
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    if adapters:
        merged = ", ".join(str(adapter.folder) for adapter in adapters)
        moved = f"; rounding moves outputs by at most {worst:.1e}" if worst else ""
        say(f"merged {merged}{moved}")


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


# ---- writing ----


def save_model(
    model: Mistral,
    tokenizer: Tokenizer,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    template: str | None = None,
    stop_ids: Sequence[int] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder that transformers opens: shards, index, config.json, generation_config.json, tokenizer files.

    dtype: of the float weights on disk, None is what they are. template: the chat template to write as the model's
    own (Jinja). stop_ids: what ends an answer (None: the tokenizer's). INT4 linears are written in compressed-tensors'
    pack-quantized format. What the folder held before is replaced when all files are written, so one that fails
    leaves it as it was. Raises BadInput if an adapter is attached and not merged, if a weight is not finite, or if a
    file cannot be written.
    """
    if adapted(model) or any(isinstance(module, Frozen) for module in model.modules()):
        raise BadInput(
            "the model has an unmerged adapter: lora.merge(model) first, or lora.save(model, folder); over INT4: "
            "merge it into the float ones, python -m minichat.lora merge --help"
        )
    shards: list[list[str]] = [[]]
    size = 0
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in _tensors(model, dtype, meta=True)}
    for name, count in sizes.items():
        if shards[-1] and size + count > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += count
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    config = model.config.to_dict(dtype or model.dtype)
    if any(isinstance(m, quant.Int4Linear) for m in model.modules()):
        config["quantization_config"] = quant.quantization_config(model.scheme)
    stream = _tensors(model, dtype)
    stale = ("model*.safetensors", INDEX, CONFIG, WEIGHTS, *TOKENIZER_FILES)
    with staged(folder, last="config.json", stale=stale) as new:
        for file, shard in zip(names, shards):
            write_tensors(dict(next(stream) for _ in shard), new / file, finite=True)
        if len(shards) > 1:
            weight_map = {name: file for file, shard in zip(names, shards) for name in shard}
            write_json(new / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
        write_json(new / "config.json", config)
        tokenizer.save(new, template, stop_ids)


def _tensors(model: Mistral, dtype: torch.dtype | None, meta: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on the CPU) of everything on disk, in the model's order; on the meta device, shapes alone."""
    for name, module in model.named_modules():
        if isinstance(module, quant.Int4Linear):
            for key, tensor in quant.tensors_of(module).items():
                yield f"{name}.{key}", tensor.to("meta" if meta else "cpu")
            continue
        for leaf, weight in module.named_parameters(recurse=False):
            if name == "lm_head" and model.config.tie_word_embeddings:
                continue
            weight = weight.detach()
            weight = torch.empty_like(weight, device="meta", dtype=dtype) if meta else weight.to("cpu", dtype)
            yield f"{name}.{leaf}", weight
