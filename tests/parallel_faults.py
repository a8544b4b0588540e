"""The catalogue of parallelism bugs: where each shows, and what it is to be blamed on.

``Fault.plant`` (``tests/parallel_bugs.py``) is called once core is loaded and before the model is built, on every rank
of a parallel job and never in the one-rank reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megatron_slm.config.run_config import RunConfig
from tests import parallel_bugs as bugs
from tests.axes import case, config_of


@dataclass(frozen=True)
class Fault:
    """One bug.

    Attributes:
        axis: the axis without which it cannot show.
        modules: what it can be blamed on, as shell patterns: global names of modules, or "loss", "gradient norm",
            "optimizer", "reduction of the gradients" where the bug is in none.
        values: axes that leave the plain case of ``tests.axes``.
        plant: changes the code of this process.
        direction: in what the difference must show, as ``verify`` names it; any by default.
    """

    name: str
    axis: str
    modules: tuple[str, ...]
    values: dict[str, str]
    plant: Callable[[], None]
    direction: str = "*"

    @property
    def config(self) -> RunConfig:
        """A configuration under which the bug shows."""
        return config_of(case(**self.values))

    def is_named_by(self, module: str | None, direction: str | None) -> bool:
        """Whether ``module``, which differs in ``direction``, says where the bug is."""
        named = any(fnmatchcase(module or "", pattern) for pattern in self.modules)
        return named and fnmatchcase(direction or "", self.direction)


FIRST_ATTENTION = ("decoder.layers.0.self_attention", "decoder.layers.0.self_attention.*")
FIRST_MLP = ("decoder.layers.0.mlp", "decoder.layers.0.mlp.*")
FIRST_EXPERTS = ("decoder.layers.1.mlp", "decoder.layers.1.mlp.*")
EXPERTS = ("decoder.layers.*.mlp", "decoder.layers.*.mlp.experts*")
ROUTER = ("decoder.layers.*.mlp.router",)
OUTPUT = ("output_layer", "loss")
EMBEDDING = ("embedding", "embedding.*")
REDUCTION = "reduction of the gradients"
PREDICTION = (*OUTPUT, "mtp", "mtp.*")

TP, SP = {"tp": "2"}, {"tp": "2", "sp": "on"}
PP, DP, CP = {"pp": "2"}, {"dp": "2"}, {"cp": "2"}
EP = {"dp": "2", "ep": "2", "mlp": "experts"}

FAULTS = (
    Fault(
        name="row-parallel output not reduced",
        axis="tp",
        modules=FIRST_ATTENTION,
        values=TP,
        plant=bugs.attention_output_not_reduced,
    ),
    Fault(
        name="gradient of an input not reduced",
        axis="tp",
        modules=("decoder.layers.*.mlp.linear_fc1",),
        values=TP,
        plant=bugs.input_gradient_not_reduced,
    ),
    Fault(name="gate and up swapped", axis="tp", modules=FIRST_MLP, values=TP, plant=bugs.gate_and_up_swapped),
    Fault(
        name="two ranks' shards swapped",
        axis="tp",
        modules=FIRST_ATTENTION,
        values=TP,
        plant=bugs.shards_of_two_ranks_swapped,
    ),
    Fault(
        name="vocabulary offset off by one",
        axis="tp",
        modules=OUTPUT,
        values=TP,
        plant=bugs.vocabulary_offset_off_by_one,
    ),
    Fault(
        name="replicas counted twice in the norm",
        axis="tp",
        modules=("gradient norm",),
        values=TP,
        plant=bugs.replicated_parameters_counted_twice,
    ),
    Fault(
        name="norms' gradients not summed",
        axis="sp",
        modules=("decoder.*norm",),
        values=SP,
        plant=bugs.norm_gradients_not_summed,
    ),
    Fault(
        name="output cut, not reduce-scattered",
        axis="sp",
        modules=FIRST_ATTENTION,
        values=SP,
        plant=bugs.attention_output_cut_instead_of_reduce_scattered,
    ),
    Fault(
        name="tied embedding not summed",
        axis="pp",
        modules=(*EMBEDDING, *OUTPUT),
        values=PP | {"embeddings": "tied"},
        plant=bugs.tied_embedding_not_summed,
    ),
    Fault(name="wrong micro-batch", axis="pp", modules=OUTPUT, values=PP, plant=bugs.wrong_micro_batch),
    Fault(
        name="virtual stages swapped",
        axis="vpp",
        modules=("decoder.layers.[13]", "decoder.layers.[13].*"),
        values=PP | {"vpp": "2"},
        plant=bugs.virtual_stages_swapped,
    ),
    Fault(name="one bucket not reduced", axis="dp", modules=OUTPUT, values=DP, plant=bugs.bucket_not_reduced),
    Fault(
        name="shifted optimizer shard",
        axis="dp",
        modules=("*",),
        values=DP,
        plant=bugs.shifted_optimizer_shard,
        direction="update",
    ),
    Fault(
        name="parameters not gathered",
        axis="dp",
        modules=("*",),
        values=DP,
        plant=bugs.parameters_not_gathered,
        direction="update",
    ),
    Fault(
        name="norm differs in recomputation",
        axis="recompute",
        modules=("decoder.layers.*",),
        values=TP | {"recompute": "uniform"},
        plant=bugs.norm_differs_in_recomputation,
    ),
    Fault(
        name="tokens counted once a cp rank",
        axis="cp",
        modules=(REDUCTION, *OUTPUT),
        values=CP,
        plant=bugs.tokens_counted_once_a_context_rank,
    ),
    Fault(
        name="rotary positions of another cut",
        axis="cp",
        modules=(*FIRST_ATTENTION, "rotary_pos_emb"),
        values=CP,
        plant=bugs.rotary_positions_of_contiguous_cut,
    ),
    Fault(name="ring skips a block", axis="cp", modules=FIRST_ATTENTION, values=CP, plant=bugs.ring_skips_a_block),
    Fault(
        name="key gradients of other ranks dropped",
        axis="cp",
        modules=("decoder.layers.*.self_attention*",),
        values=CP,
        plant=bugs.key_gradients_of_other_ranks_dropped,
    ),
    Fault(
        name="positions not cut",
        axis="cp",
        modules=EMBEDDING,
        values=CP | {"positions": "learned"},
        plant=bugs.positions_not_cut,
    ),
    Fault(name="labels cut contiguously", axis="cp", modules=OUTPUT, values=CP, plant=bugs.labels_cut_contiguously),
    Fault(
        name="predicted labels rolled within a rank",
        axis="cp",
        modules=PREDICTION,
        values=CP | {"mtp": "1"},
        plant=bugs.predicted_labels_rolled_within_a_rank,
    ),
    Fault(
        name="predicted labels not rolled",
        axis="pp",
        modules=PREDICTION,
        values=PP | {"mtp": "1"},
        plant=bugs.predicted_labels_not_rolled,
    ),
    Fault(
        name="router's load of one cp rank",
        axis="cp",
        modules=ROUTER,
        values=CP | {"mlp": "experts"},
        plant=bugs.loads_not_summed_over_context,
    ),
    Fault(
        name="router's bias by one replica's load",
        axis="dp",
        modules=ROUTER,
        values=DP | {"mlp": "shared"},
        plant=bugs.loads_not_summed_over_replicas,
    ),
    Fault(
        name="capacity of each rank",
        axis="cp",
        modules=FIRST_EXPERTS,
        values=CP | {"mlp": "capacity"},
        plant=bugs.capacity_of_each_rank,
    ),
    Fault(name="dropped experts", axis="ep", modules=FIRST_EXPERTS, values=EP, plant=bugs.dropped_experts),
    Fault(
        name="expert gradients over dense replicas",
        axis="ep",
        modules=EXPERTS,
        values=EP,
        plant=bugs.expert_gradients_reduced_as_dense_ones,
    ),
)
