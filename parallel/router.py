"""The router of a mixture of experts: core's choice, with losses, capacity and counts of the whole micro-batch.

Core 0.16.1 multiplies its balancing and z losses by this rank's tokens alone where the loss is a sum over tokens, so
that they shrink with tp and cp (Megatron-LM issue 3672, PR 3768), and decides which tokens an expert drops on each rank
for itself. Here both are of the micro-batch: the objective is cross-entropy sum + tokens of the micro-batch x router
losses, and a token is dropped or not, whatever the layout. The bias that balances experts moves with the update.

Shapes: S sequence (local: S / (tp x cp), with sequence parallelism), B micro-batch, E experts, T = S x B tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_slm.parallel.context import cut, join

DROPPED, TOKENS, ENTROPY, BALANCING, Z_LOSS = range(5)
COLUMNS = 5


class Router(TopKRouter):
    """``TopKRouter`` whose choices and losses do not depend on how the tokens are divided over ranks.

    Attributes:
        counted: [E + COLUMNS] float64: the (token, expert) pairs of each expert before any is dropped, then sums over
            this rank's tokens since :func:`forget_counts`: pairs dropped, tokens, entropy of the probabilities in nats,
            balancing loss, squared log-partition. The losses are without their coefficients. None before any token.
    """

    def __init__(self, config: Any, pg_collection: Any = None, *, balanced_by_bias: bool = False) -> None:
        """Build core's router.

        Args:
            balanced_by_bias: choose by score plus a bias that :func:`balance` moves (arXiv 2408.15664).
        """
        super().__init__(config=config, pg_collection=pg_collection)
        self.counted: Tensor | None = None
        if balanced_by_bias:
            del self.expert_bias
            self.register_buffer("expert_bias", torch.zeros(config.num_moe_experts, dtype=torch.float32))

    def gating(self, input: Tensor) -> Tensor:
        """Hidden states [S, B, H] -> logits [S, B, E] in the router's precision."""
        if moe_utils.HAVE_TE:
            logits: Tensor = super().gating(input)
            return logits
        # Without Transformer Engine core's own function looks for a name that was never imported.
        dtype = torch.float64 if self.config.moe_router_dtype == "fp64" else torch.float32
        return F.linear(input.to(dtype), self.weight.to(dtype))

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [S, B, E] -> weights and choice [T, E] of the local tokens; ``padding_mask`` is not supported."""
        assert padding_mask is None, "every token of a packed sample is a token"
        sequence, samples, experts = logits.shape
        logits = logits.view(-1, experts)
        probs, chosen = self._choose(logits)
        kept = chosen
        if self.config.moe_expert_capacity_factor is not None:
            kept = self._within_capacity(probs.detach(), chosen, (sequence, samples, experts))
            probs = probs * kept
        # Not in an evaluation; and of a forward pass that is recomputed, the second one counts.
        if self.training and torch.is_grad_enabled():
            probs = self._with_losses(probs, logits, chosen, kept, samples)
        return probs, kept

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Core's top-k: weights [T, E], zero for experts not chosen, and the choice [T, E]."""
        config = self.config
        chosen: tuple[Tensor, Tensor] = moe_utils.topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=config.moe_router_pre_softmax,
            num_groups=config.moe_router_num_groups,
            group_topk=config.moe_router_group_topk,
            scaling_factor=config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
        )
        return chosen

    def _with_losses(self, probs: Tensor, logits: Tensor, chosen: Tensor, kept: Tensor, samples: int) -> Tensor:
        """``probs`` as they are; their backward pass adds the gradients of the router's losses."""
        aux_coefficient, z_coefficient = self.config.moe_aux_loss_coeff, self.config.moe_z_loss_coeff or 0.0
        with torch.set_grad_enabled(aux_coefficient > 0.0 or z_coefficient > 0.0):
            scores = probabilities(logits, self.score_function)
            squares = torch.logsumexp(logits, dim=-1).square().sum(dtype=torch.float64)
            balancing = self._balancing_loss(scores, samples)
            loss = aux_coefficient * balancing + z_coefficient * squares
        if loss.requires_grad:
            probs = MoEAuxLossAutoScaler.apply(probs, loss)
        with torch.no_grad():
            load = chosen.sum(dim=0).double()
            sums = [load.sum() - kept.sum(), load.sum() / self.topk, torch.special.entr(scores).sum()]
            counted = torch.cat([load, torch.stack([*sums, balancing, squares]).double()])
            self.counted = counted if self.counted is None else self.counted + counted
        return probs

    def _balancing_loss(self, scores: Tensor, samples: int) -> Tensor:
        """This rank's part of tokens x balancing loss: scalar, float64; the ranks' parts add up to the whole.

        The loss of N tokens is E / (k N^2) sum_e (tokens that choose e) x (sum of their scores of e), 1 where all
        experts are alike (arXiv 2101.03961, equation 4): over the micro-batch, or over each of its samples.
        """
        kind, experts = self.config.moe_router_load_balancing_type, scores.shape[-1]
        by_sample = scores.view(-1, samples, experts)
        if kind not in ("aux_loss", "seq_aux_loss"):
            return scores.new_zeros((), dtype=torch.float64)
        over = (0,) if kind == "seq_aux_loss" else (0, 1)
        with torch.no_grad():
            favourites = torch.zeros_like(by_sample).scatter(-1, by_sample.topk(self.topk, dim=-1).indices, 1.0)
            demand = favourites.sum(dim=over, dtype=torch.float64)
            dist.all_reduce(demand, group=self.tp_cp_group)
            tokens = demand.sum(dim=-1, keepdim=True) / self.topk
        mass = by_sample.sum(dim=over, dtype=torch.float64)
        return (mass * demand / tokens).sum() * (experts / self.topk)

    def _within_capacity(self, probs: Tensor, chosen: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Which of the chosen experts [T, E] still have room, in the order of the whole micro-batch."""
        config, experts = self.config, shape[-1]
        # In fp32: equal tokens (a sample's first, and all that follow alike) differ in the last bits of float64.
        order = (probs if config.moe_token_drop_policy == "probs" else chosen).float()
        whole = self._of_all_ranks(torch.where(chosen, order, -torch.ones_like(order)).view(shape))
        ranked = whole.view(-1, experts)
        capacity = moe_utils.get_capacity(len(ranked) * self.topk, experts, config.moe_expert_capacity_factor)
        # Stable: of equal tokens the earlier one stays. Core leaves it to torch.topk which of them does.
        first = ranked.argsort(dim=0, descending=True, stable=True)[:capacity]
        room = torch.zeros_like(ranked, dtype=torch.bool).scatter(0, first, True)
        return chosen & self._of_this_rank(room.view(whole.shape)).reshape(-1, experts)

    def _of_all_ranks(self, local: Tensor) -> Tensor:
        """Local [S, B, E] -> the whole sequence, in its order."""
        tp, cp = self.tp_group.size(), self.cp_group.size()
        if tp * cp == 1:
            return local
        parts = local.new_empty((cp, tp * local.shape[0], *local.shape[1:]))
        dist.all_gather_into_tensor(parts.view(-1, *local.shape[1:]), local.contiguous(), group=self.tp_cp_group)
        return join(list(parts), 0) if cp > 1 else parts[0]

    def _of_this_rank(self, whole: Tensor) -> Tensor:
        """The inverse of ``_of_all_ranks``."""
        tp, cp = self.tp_group.size(), self.cp_group.size()
        part = cut(whole, 0, self.cp_group.rank(), cp) if cp > 1 else whole
        return part.chunk(tp, 0)[self.tp_group.rank()]


def probabilities(logits: Tensor, score_function: str) -> Tensor:
    """Each token's probabilities over all experts, [T, E]: softmax, or sigmoids divided by their sum."""
    if score_function == "softmax":
        return torch.softmax(logits, dim=-1)
    scores = torch.sigmoid(logits)
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)


def routers(chunks: Sequence[Any]) -> list[Router]:
    """The routers of a rank's model chunks, in the order of the model."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]


def forget_counts(chunks: Sequence[Any]) -> None:
    """Begin a step: nothing has been routed yet."""
    for router in routers(chunks):
        router.counted = None


def balance(balanced: Sequence[Router]) -> None:
    """Move every bias against the load of the step: up by the rate below the mean load, down above it. Collective.

    The load is that of all tokens of the global batch, dropped ones included. Core moves the bias while it reduces the
    gradients; a step that is judged afterwards and rejected would have moved it too.

    Args:
        balanced: the routers of this rank that have a bias; the same on all ranks of a pipeline stage.
    """
    if not balanced or balanced[0].counted is None:
        return
    loads = torch.stack([router.counted[:-COLUMNS] for router in balanced if router.counted is not None])
    dist.all_reduce(loads, group=balanced[0].tp_dp_cp_group)
    steps = torch.sign(loads.mean(dim=-1, keepdim=True) - loads) * balanced[0].config.moe_router_bias_update_rate
    for router, step in zip(balanced, steps, strict=True):
        router._maintain_float32_expert_bias()
        router.expert_bias += step.float()
