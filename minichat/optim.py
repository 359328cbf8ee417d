"""The learning-rate schedule and AdamW with float32 masters."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # their names in checkpoints
PART = 1 << 24  # weights that are updated together: bounds the temporaries
BLOCK = 256  # values of an 8-bit moment that share a scale
CURVE = 4
SCHEDULES = ("cosine", "linear", "constant")


def lr_at(step: int, total: int, peak: float, schedule: str = "cosine", warmup: float = 0) -> float:
    """The learning rate of step `step` (0, 1, …) of `total`: linear warm-up from 0, then the schedule to 0.

    warmup: steps if 1 or more, a share of all steps if below 1 (rounded up). Step for step that of transformers'
    get_*_schedule_with_warmup. Raises ValueError for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is unknown; choose from {', '.join(SCHEDULES)}")
    warmup = math.ceil(warmup * total) if warmup < 1 else int(warmup)
    if step < warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (1 - progress) if schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * progress))


def quantize_moment(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """A moment in 8 bits: codes (blocks, BLOCK) int8 or uint8, and each block's peak (blocks, 1) float32.

    Codes are dense around 0, where most of a moment is: |x| / peak is (code / top) to the power CURVE. The second
    moment is never rounded to 0: it divides, and would make an update of any size.
    """
    blocks = F.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    peak = blocks.abs().amax(1, keepdim=True)
    part = (blocks.abs() / peak.clamp_min(torch.finfo(torch.float32).tiny)).pow_(1 / CURVE)
    if signed:
        return part.mul_(127).round_().mul_(blocks.sign()).to(torch.int8), peak
    return part.mul_(255).round_().clamp_min_(1).mul_(blocks > 0).to(torch.uint8), peak


def dequantize_moment(codes: Tensor, peak: Tensor, shape: torch.Size) -> Tensor:
    """What quantize_moment() was given, float32, to a few per cent."""
    top = 127 if codes.dtype == torch.int8 else 255
    part = codes.float()
    values = (part.abs() / top).pow_(CURVE).mul_(part.sign()).mul_(peak)
    return values.flatten()[: shape.numel()].view(shape)


class AdamW:
    """AdamW (arXiv 1711.05101) over what requires a gradient in `model`.

    Weights below float32 get a float32 master that takes the updates: a bf16 weight has 8 bits, and would round most
    of them away. Weight decay spares vectors (the norms). eight_bit: hold the moments as quantize_moment() makes them,
    block by block (after arXiv 2110.02861; the codes are our own). home: where they are held; None, beside the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        eight_bit: bool = False,
        home: torch.device | None = None,
    ):
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.weights = [p for p in model.parameters() if p.requires_grad]
        if not self.weights:
            raise ValueError("nothing to train: no parameter requires a gradient; attach LoRA or train in full")
        exact = torch.float32
        self.masters = [p if p.dtype == exact else p.detach().to(exact).requires_grad_() for p in self.weights]
        self.betas, self.eps, self.decay, self.steps = betas, eps, weight_decay, 0
        self.eight_bit, self.home = eight_bit, home
        self.moments = [self._put(torch.zeros_like(m), torch.zeros_like(m)) for m in self.masters]

    def _put(self, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        """Both moments of a weight as they are held: two tensors, or codes and peaks of each."""
        held = first, second
        if self.eight_bit:
            held = (*quantize_moment(first, signed=True), *quantize_moment(second, signed=False))
        return held if self.home is None else tuple(x.to(self.home) for x in held)

    def _get(self, i: int) -> tuple[Tensor, Tensor]:
        """Both moments of a weight, float32, where the weight is."""
        master = self.masters[i]
        held = [x.to(master.device, non_blocking=True) for x in self.moments[i]]
        if not self.eight_bit:
            return tuple(held)
        return dequantize_moment(*held[:2], master.shape), dequantize_moment(*held[2:], master.shape)

    @property
    def _keys(self) -> tuple[str, ...]:
        return tuple(f"{key}.{part}" for key in MOMENTS for part in ("codes", "peak")) if self.eight_bit else MOMENTS

    def collect(self) -> None:
        """After each backward: add the gradients of weights below float32 to their masters', and clear them.

        Left to add up in bf16, those of many micro-batches would lose what is small beside the sum.
        """
        for weight, master in zip(self.weights, self.masters):
            if master is not weight and weight.grad is not None:
                grad = weight.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                weight.grad = None

    def gradients(self) -> list[Tensor]:
        """The gradients as step() will take them, of all that trains: zeros where there was none."""
        for master in self.masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self.masters]

    @torch.no_grad()
    def step(self, lr: float, max_norm: float) -> Tensor:
        """Clip the gradients to a total norm of max_norm (0: not), update, clear them; their norm before clipping."""
        self.collect()
        norm = nn.utils.clip_grad_norm_(self.masters, max_norm or math.inf)
        self.steps += 1
        (beta1, beta2), t = self.betas, self.steps
        # what changes from step to step reaches the device as a tensor: as numbers it would be another graph each time
        changing = torch.tensor([lr / (1 - beta1**t), math.sqrt(1 - beta2**t), 1 - lr * self.decay])
        rate, root, shrink = changing.to(norm.device, non_blocking=True).unbind()
        for part in self._parts():
            weights = [self.masters[i].detach() for i in part]
            grads = [self.masters[i].grad for i in part]
            first, second = zip(*map(self._get, part))
            if self.decay and weights[0].dim() > 1:
                torch._foreach_mul_(weights, shrink)
            torch._foreach_lerp_(first, grads, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
            deviation = torch._foreach_sqrt(second)
            torch._foreach_div_(deviation, root)
            torch._foreach_add_(deviation, self.eps)
            update = torch._foreach_div(first, deviation)
            torch._foreach_mul_(update, rate)
            torch._foreach_sub_(weights, update)
            if self.eight_bit or self.home:  # else they were changed where they are
                for i, *moments in zip(part, first, second):
                    self.moments[i] = self._put(*moments)
        for weight, master in zip(self.weights, self.masters):
            if master is not weight:
                weight.copy_(master)
            master.grad = None
        return norm

    def _parts(self) -> Iterator[list[int]]:
        """Which weights are updated together: some at a time, matrices apart from vectors: those do not decay."""
        part, size = [], 0
        for i in sorted(range(len(self.masters)), key=lambda i: self.masters[i].dim() > 1):
            master = self.masters[i]
            if master.grad is None:
                continue
            if part and (size >= PART or (self.masters[part[0]].dim() > 1) != (master.dim() > 1)):
                yield part
                part, size = [], 0
            part.append(i)
            size += master.numel()
        if part:
            yield part

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on: each weight in float32, and AdamW's moments and count of its steps."""
        found = {}
        for name, master, moments in zip(self.names, self.masters, self.moments):
            found[f"weight.{name}"] = master.detach()
            found |= {f"{key}.{name}": moment for key, moment in zip(self._keys, moments)}
        return found | {"steps": torch.tensor(self.steps)}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what state() gave. Raises KeyError or RuntimeError for the state of other weights."""
        for name, weight, master, moments in zip(self.names, self.weights, self.masters, self.moments):
            master.copy_(tensors[f"weight.{name}"])
            if master is not weight:
                weight.copy_(master)
            for key, moment in zip(self._keys, moments):
                moment.copy_(tensors[f"{key}.{name}"])
        self.steps = int(tensors["steps"])
