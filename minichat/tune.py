"""Find the CUDA kernel's tiles for this card by timing them, and keep them in the cache folder.

python -m minichat.tune                     # Mistral-7B's weights, for 1, 16 and 32 tokens
python -m minichat.tune --model FOLDER --tokens 1
"""

import itertools
import statistics
import sys

import torch

from minichat import cli, files, kernels
from minichat import device as devices
from minichat.errors import BadInput
from minichat.kernels.int4_reference import Packed

MISTRAL = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]  # q, k, v together; o; gate and up; down
ROWS, WARPS, STAGES, PROGRAMS = (32, 64, 128), (2, 4), (3, 4), (2, 4, 6)  # of TABLES in int4_triton.py


def main() -> None:
    parser = cli.Parser(__doc__, prog="python -m minichat.tune")
    parser.add_argument("--model", metavar="FOLDER", help="whose weights (without it: Mistral-7B's)")
    parser.add_argument("--device", default="auto", help="cuda or cuda:N")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 32], help="at a time")
    parser.add_argument("--group-size", type=int, default=32, choices=[32, 64, 128], help="of the weights' scales")
    parser.add_argument("--asymmetric", action="store_true", help="weights with zero-points")
    args = parser.parse_args()
    if not 1 <= min(args.tokens) <= max(args.tokens) <= 128:
        raise BadInput(f"--tokens {' '.join(map(str, args.tokens))}; the kernel takes from 1 to 128 at a time")
    where = devices.pick(args.device)
    if where.type != "cuda":
        raise BadInput(f"--device {args.device} is {where.type} here; tiles are tuned on a GPU")
    if kernels.for_device(where) is not kernels.named("int4_triton"):
        raise BadInput("the CUDA kernel does not run here, so that there is nothing to tune")
    from minichat.kernels import int4_triton

    shapes, file = MISTRAL, int4_triton.tuned_file(where)
    if args.model:
        from minichat import weights

        c = weights.read_config(weights.resolve(args.model))
        qkv, D = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim, c.hidden_size
        shapes = [(qkv, D), (D, c.num_attention_heads * c.head_dim), (2 * c.intermediate_size, D)]
        shapes.append((D, c.intermediate_size))
    table = dict(int4_triton.tuned(where))
    for tokens, (N, K) in itertools.product(args.tokens, shapes):
        with torch.cuda.device(where):  # events and graphs are of the current one
            weights = random_weights(where, N, K, args.group_size, args.asymmetric)
            name = f"{max(8, 1 << (tokens - 1).bit_length())} {N} {K} {int4_triton.group_name(weights[0])}"
            before, best, found = tune(where, tokens, weights, name, "silu" if shapes[2] == (N, K) else "")
        table[name] = found
        print(f"{name}: {before:.1f} -> {best:.1f} microseconds with {found}", flush=True)
        with files.staged(file.parent, last=file.name) as new:
            files.write_json(new / file.name, table)
    print(f"minichat: kept in {file}", file=sys.stderr)


def random_weights(where: torch.device, N: int, K: int, group_size: int, asymmetric: bool) -> list[Packed]:
    """More of them than the second cache holds."""
    weights = []
    for _ in range(2 * torch.cuda.get_device_properties(where).L2_cache_size // (N * K // 2) + 2):
        codes = torch.randint(-(2**15), 2**15, (N // 16, K // 128, 16, 32), device=where, dtype=torch.int16)
        scale = torch.rand(N // 16, K // group_size, 16, device=where).bfloat16() / 100
        zero = torch.full(scale.shape, 8, device=where, dtype=torch.uint8) if asymmetric else None
        weights.append(Packed(codes, scale, zero, N, K, group_size, 4))
    return weights


def tune(
    where: torch.device, tokens: int, weights: list[Packed], name: str, then: str
) -> tuple[float, float, list[int]]:
    """Microseconds with the table's tile and with the best, and that: rows, warps, stages, programs."""
    from minichat.kernels import int4_triton

    N, K = weights[0].out_features, weights[0].in_features
    x = torch.randn(tokens, K, device=where, dtype=torch.bfloat16)
    out = torch.empty(tokens, N // 2 if then else N, device=where, dtype=torch.bfloat16)
    known = int4_triton.tuned(where)

    def seconds(tile: list[int]) -> float:
        known[name] = tile
        run = lambda: [int4_triton.linear(x, weight, out, then=then) for weight in weights]  # noqa: E731
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        times = []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times) / len(weights)

    kind, _ = int4_triton.card(where)
    default = known.get(name) or list(int4_triton.TABLES[kind][int(name.split()[0])])
    before = best = seconds(default)
    found = default
    for tile in map(list, itertools.product(ROWS, WARPS, STAGES, PROGRAMS)):
        try:
            took = seconds(tile)
        except Exception:  # more registers or shared memory than there are, a layout that does not compile
            continue
        if took < best:
            best, found = took, tile
    known[name] = found
    return before * 1e6, best * 1e6, found


if __name__ == "__main__":
    cli.run(main)
