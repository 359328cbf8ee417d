"""The learning-rate schedule and AdamW with float32 masters."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # their names in checkpoints
PART = 1 << 24  # weights that are updated together: bounds the temporaries
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


class AdamW:
    """AdamW (arXiv 1711.05101) over what requires a gradient in `model`.

    Weights below float32 get a float32 master that takes the updates: a bf16 weight has 8 bits, and would round most
    of them away. Weight decay spares vectors (the norms).
    """

    def __init__(
        self,
        model: nn.Module,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.weights = [p for p in model.parameters() if p.requires_grad]
        if not self.weights:
            raise ValueError("nothing to train: no parameter requires a gradient; attach LoRA or train in full")
        exact = torch.float32
        self.masters = [p if p.dtype == exact else p.detach().to(exact).requires_grad_() for p in self.weights]
        self.betas, self.eps, self.decay, self.steps = betas, eps, weight_decay, 0
        self.moments = [(torch.zeros_like(m), torch.zeros_like(m)) for m in self.masters]

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
            weights, grads, first, second = zip(*part)
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
        for weight, master in zip(self.weights, self.masters):
            if master is not weight:
                weight.copy_(master)
            master.grad = None
        return norm

    def _parts(self) -> Iterator[list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
        """(weight, gradient, moments) of some at a time, matrices apart from vectors: those do not decay."""
        part, size = [], 0
        for master, moments in sorted(zip(self.masters, self.moments), key=lambda known: known[0].dim() > 1):
            if master.grad is None:
                continue
            if part and (size >= PART or (part[0][0].dim() > 1) != (master.dim() > 1)):
                yield part
                part, size = [], 0
            part.append((master.detach(), master.grad, *moments))
            size += master.numel()
        if part:
            yield part

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on: each weight in float32, and AdamW's moments and count of its steps."""
        found = {}
        for name, master, moments in zip(self.names, self.masters, self.moments):
            found[f"weight.{name}"] = master.detach()
            found |= {f"{key}.{name}": moment for key, moment in zip(MOMENTS, moments)}
        return found | {"steps": torch.tensor(self.steps)}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what state() gave. Raises KeyError or RuntimeError for the state of other weights."""
        for name, weight, master, moments in zip(self.names, self.weights, self.masters, self.moments):
            master.copy_(tensors[f"weight.{name}"])
            if master is not weight:
                weight.copy_(master)
            for key, moment in zip(MOMENTS, moments):
                moment.copy_(tensors[f"{key}.{name}"])
        self.steps = int(tensors["steps"])
