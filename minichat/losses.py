"""The losses, as pure functions of log-probabilities; and the log-probabilities, without their logits."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

KINDS = ("sigmoid", "ipo", "hinge", "robust")
ROWS = 512  # targets whose logits exist at a time: with half of them the CPU is a tenth slower at them


def target_logps(rows: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
    """Log-probability of each target token in nats, (N,) float32.

    rows: (N, D), the decoder's output at the position that predicts labels[n], so the one shift between inputs and
    targets is made where the batch is. head: rows (n, D) -> logits (n, V). They are computed ROWS at a time, so that no
    (N, V) tensor lives.
    """
    if isinstance(head, nn.Module) and not any(p.requires_grad for p in head.parameters()):
        return _Logps.apply(rows, head, labels)

    def logps(rows: Tensor, labels: Tensor) -> Tensor:
        return -F.cross_entropy(head(rows).float(), labels, reduction="none")

    parts = zip(rows.split(ROWS), labels.split(ROWS))
    if not torch.is_grad_enabled():
        return torch.cat([logps(r, l) for r, l in parts])
    return torch.cat([checkpoint(logps, r, l, use_reentrant=False) for r, l in parts])


class _Logps(torch.autograd.Function):
    """target_logps of rows (N, D) under a head that does not train, with the gradient formed in the forward pass.

    A log-prob depends on its own row alone, so all that backward has to do is to scale: the logits, a third of the
    head's work, are not computed again.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
        parts = zip(rows.split(ROWS), labels[:, None].split(ROWS))
        found, slopes = zip(*(_log_softmax(r, head, l, ctx.needs_input_grad[0]) for r, l in parts))
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (slopes,) = ctx.saved_tensors
        return (grad[:, None] * slopes).to(slopes.dtype), None, None


def _log_softmax(rows: Tensor, head: nn.Module, labels: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probs (n,) and, if wanted, their slopes (n, D) by the rows; what is (n, V) goes before the next rows come."""
    with torch.set_grad_enabled(slope):
        rows = rows.detach().requires_grad_(slope)
        logits = head(rows)
    x = logits.detach().float()  # the logits' own memory where they are float32
    x.sub_(x.amax(-1, keepdim=True))
    target = x.gather(1, labels)
    total = x.exp_().sum(-1, keepdim=True)
    found = (target - total.log())[:, 0]
    if not slope:
        return found, None
    x.scatter_add_(1, labels, -total)  # d log-prob / d logits is one at the label, less the softmax
    torch.autograd.backward(logits, x.to(logits.dtype))
    return found, (rows.grad.float() / -total).to(rows.dtype)


def row_sums(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Sum (N,) values by the row that each belongs to, (N,) int64 -> (rows,).

    By torch's own sum, which adds in a tree: one after the other, as index_add does, the log-prob of an answer of 300
    tokens would be off by a thousandth.
    """
    mine = row == torch.arange(rows, device=row.device)[:, None]  # (rows, N)
    return torch.where(mine, values, 0.0).sum(1)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-pair preference loss, (B,) float32, and the chosen and rejected answers' rewards, (B,) without gradient.

    The arguments are log-probs of whole answers in nats, each (B,): summed over the tokens, but for "ipo" their mean.
    The reference's carry no gradient; zeros in their place make the loss reference-free.

    sigmoid: DPO (arXiv 2305.18290, eq. 7), with label_smoothing conservative DPO (cDPO, E. Mitchell 2023, eq. 3);
    robust: the unbiased form for flipped labels (arXiv 2403.00409, eq. 7); hinge: SLiC (arXiv 2305.10425, eq. 7) on
    the same margin; ipo: arXiv 2310.12036, eq. 17.
    Raises ValueError as check_preference does.
    """
    check_preference(beta, kind, label_smoothing)
    chosen = (policy_chosen - ref_chosen).float()
    rejected = (policy_rejected - ref_rejected).float()
    margin = chosen - rejected
    right, wrong = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
    if kind == "sigmoid":
        losses = (1 - label_smoothing) * right + label_smoothing * wrong
    elif kind == "robust":
        losses = ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    elif kind == "hinge":
        losses = torch.relu(1 - beta * margin)
    else:
        losses = (margin - 1 / (2 * beta)) ** 2
    return losses, (beta * chosen).detach(), (beta * rejected).detach()


def check_preference(beta: float, kind: str, label_smoothing: float) -> None:
    """Raise ValueError if beta or label_smoothing is out of range, kind unknown, or label_smoothing of no use to it."""
    if not 0 < beta < math.inf:
        raise ValueError(f"beta is {beta}; it must be a positive number")
    if kind not in KINDS:
        raise ValueError(f"loss {kind!r} is unknown; choose from {', '.join(KINDS)}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; it is a share of flipped pairs, 0 or more, below 0.5")
    if label_smoothing and kind in ("ipo", "hinge"):
        raise ValueError(f"label_smoothing is for the sigmoid and robust losses, not {kind}")


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats per token; inf rather than an overflow."""
    return math.inf if loss >= 700 else math.exp(loss)
