"""Every substitution of the device seam: applied, still needed by core, and confined to core."""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import sys
import types
from pathlib import Path

import pytest
import torch

from megatron_slm.errors import LaunchError
from megatron_slm.parallel import context, device

device.preload("cpu")

from megatron.core import parallel_state  # noqa: E402, F401  - the seam comes first, as in a run
from megatron.core.models.common.embeddings import (  # noqa: E402
    rope_utils,
    rotary_pos_embedding,
    yarn_rotary_pos_embedding,
)
from megatron.core.models.common.language_module.language_module import LanguageModule  # noqa: E402
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer  # noqa: E402
from megatron.core.pipeline_parallel import p2p_communication, schedules  # noqa: E402
from megatron.core.tensor_parallel import mappings, random  # noqa: E402
from megatron.core.transformer import multi_latent_attention  # noqa: E402
from megatron.core.transformer.moe import moe_utils, token_dispatcher  # noqa: E402

CORE = Path(importlib.import_module("megatron.core").__path__[0])


def source(*parts: str) -> str:
    return (CORE / Path(*parts)).read_text()


def view_of(module: object) -> object:
    return vars(module)["torch"]


def test_every_core_module_sees_the_view_and_nobody_else_does() -> None:
    still_torch = [
        name
        for name, module in sys.modules.items()
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch
    ]
    assert still_torch == []
    assert view_of(schedules) is not torch
    assert device.__dict__.get("torch") is None
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")  # torch itself still refuses: only core's view differs


@pytest.mark.parametrize("factory", device._FACTORIES)
def test_factories_of_the_view_create_on_cpu(factory: str) -> None:
    arguments = {
        "full": ((2,), 1.0),
        "tensor": ([1.0],),
        "arange": (3,),
        "empty_like": (torch.ones(2),),
        "zeros_like": (torch.ones(2),),
        "ones_like": (torch.ones(2),),
    }.get(factory, ((2,),))
    made = getattr(view_of(schedules), factory)(*arguments, device="cuda")
    assert made.device.type == "cpu"


def test_the_reason_of_the_view_is_still_there() -> None:
    """Core still creates on 'cuda' and still asks torch.cuda for the current device."""
    assert 'device="cuda"' in source("pipeline_parallel", "schedules.py")
    assert "device='cuda'" in source("optimizer", "clip_grads.py")
    for parts in (
        ("tensor_parallel", "mappings.py"),
        ("distributed", "param_and_grad_buffer.py"),
        ("pipeline_parallel", "p2p_communication.py"),
    ):
        assert "torch.cuda.current_device()" in source(*parts)


@pytest.mark.parametrize(
    ("symbol", "where"),
    [
        ("current_device", ("tensor_parallel", "layers.py")),
        ("synchronize", ("pipeline_parallel", "p2p_communication.py")),
        ("empty_cache", ("distributed", "distributed_data_parallel.py")),
        ("manual_seed", ("tensor_parallel", "random.py")),
        ("get_rng_state", ("tensor_parallel", "random.py")),
        ("device_count", ("dist_checkpointing", "strategies", "async_utils.py")),
        ("set_device", ("dist_checkpointing", "strategies", "async_utils.py")),
    ],
)
def test_each_replaced_function_of_torch_cuda_is_still_called(symbol: str, where: tuple[str, ...]) -> None:
    assert f"torch.cuda.{symbol}(" in source(*where)
    assert any(row.symbol == f"torch.cuda.{symbol}" for row in device.SUBSTITUTIONS)
    assert getattr(view_of(p2p_communication).cuda, symbol) is not getattr(torch.cuda, symbol)  # type: ignore[attr-defined]


def test_cuda_calls_of_the_view_work_without_a_gpu() -> None:
    cuda = view_of(random).cuda  # type: ignore[attr-defined]
    assert torch.empty(1, device=cuda.current_device()).device.type == "cpu"
    assert (cuda.synchronize(), cuda.empty_cache(), cuda.set_device(0), cuda.device_count()) == (None, None, None, 1)
    state = torch.get_rng_state()
    cuda.manual_seed(7)
    expected = torch.rand(1)
    torch.set_rng_state(state)
    torch.manual_seed(7)
    assert torch.rand(1).equal(expected)
    assert cuda.get_rng_state().equal(torch.get_rng_state())


def test_every_row_of_the_table_names_a_reason_and_its_replacement() -> None:
    assert len({row.symbol for row in device.SUBSTITUTIONS}) == len(device.SUBSTITUTIONS)
    assert all(row.reason and row.becomes for row in device.SUBSTITUTIONS)


def test_torch_compile_is_itself_after_the_import() -> None:
    assert torch.compile.__module__ == "torch"
    assert "jit_fuser = torch.compile" in source("jit.py"), "core no longer compiles at import: drop the row"


def test_generator_functions_read_the_cpu_generator() -> None:
    torch.manual_seed(3)
    state = random._get_cuda_rng_state()
    first = torch.rand(2)
    random._set_cuda_rng_state(state)
    assert torch.rand(2).equal(first)
    assert "torch.cuda.default_generators" in source("tensor_parallel", "random.py")


def test_fork_switches_streams_and_does_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    tracker = random.CudaRNGStatesTracker()
    tracker.add("a", 1)
    tracker.add("b", 2)
    torch.manual_seed(0)
    outside = torch.get_rng_state()
    with caplog.at_level(logging.WARNING), tracker.fork("a"):
        first = torch.rand(1)
        with tracker.fork("b"):
            inner = torch.rand(1)
        second = torch.rand(1)
    assert caplog.records == []
    assert torch.get_rng_state().equal(outside)
    torch.manual_seed(1)
    assert torch.rand(1).equal(first) and torch.rand(1).equal(second)
    torch.manual_seed(2)
    assert torch.rand(1).equal(inner)
    assert "CPU RNG state changed within GPU RNG context" in source("tensor_parallel", "random.py")


def test_forking_an_unknown_stream_names_the_known_ones() -> None:
    with pytest.raises(AssertionError, match="not one of"), random.CudaRNGStatesTracker().fork("x"):
        pass


TYPE_COMPARISONS = (
    (distrib_optimizer.DistributedOptimizer.__init__, ("optimizer", "distrib_optimizer.py")),
    (distrib_optimizer.DistributedOptimizer._build_model_and_main_param_groups, ("optimizer", "distrib_optimizer.py")),
    (optimizer.Float16OptimizerWithFloat16Params.__init__, ("optimizer", "optimizer.py")),
    (clip_grads.clip_grad_by_total_norm_fp32, ("optimizer", "clip_grads.py")),
)


def constants(function: object) -> list[object]:
    code = getattr(function, "__func__", function).__code__
    flat: list[object] = []
    for constant in code.co_consts:
        flat.extend(constant if isinstance(constant, tuple) else [constant])
    return flat


@pytest.mark.parametrize(("function", "where"), TYPE_COMPARISONS)
def test_type_names_are_replaced_where_core_compares_them(function: object, where: tuple[str, ...]) -> None:
    assert any(isinstance(constant, device.TypeName) for constant in constants(function))
    assert "torch.cuda.FloatTensor" in source(*where)


def test_no_other_function_of_the_optimizers_compares_type_names() -> None:
    """A comparison that the table does not cover would silently sort CPU parameters into no group."""
    covered = {getattr(function, "__func__", function).__name__ for function, _ in TYPE_COMPARISONS}
    for name in ("distrib_optimizer.py", "optimizer.py", "clip_grads.py"):
        tree = ast.parse(source("optimizer", name))
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            compares = any(
                isinstance(node, ast.Compare) and "torch.cuda." in ast.unparse(node) and "Tensor" in ast.unparse(node)
                for node in ast.walk(function)
            )
            assert not compares or function.name in covered, f"{name}: {function.name}"


def test_type_names_accept_the_cpu_types_and_nothing_else() -> None:
    full, half = device.TYPE_NAMES["torch.cuda.FloatTensor"], device.TYPE_NAMES["torch.cuda.BFloat16Tensor"]
    assert torch.zeros(1).type() == full and torch.zeros(1, dtype=torch.float64).type() == full
    assert torch.zeros(1, dtype=torch.bfloat16).type() == half and torch.zeros(1).type() != half
    assert torch.zeros(1, dtype=torch.bfloat16).type() in [half] and torch.zeros(1).type() not in [half]


def test_tied_embeddings_move_to_the_cpu() -> None:
    names = LanguageModule.setup_embeddings_and_output_layer.__code__.co_names
    assert "cuda" not in names and "cpu" in names
    text = inspect.getsource(LanguageModule.setup_embeddings_and_output_layer)
    assert text.count(".cuda()") == 1 and "torch.cuda" not in text, "another use of cuda appeared in this method"


def test_optimizer_shards_are_gathered_on_the_cpu() -> None:
    method = distrib_optimizer.DistributedOptimizer.get_parameter_state_dp_zero
    assert "cuda" not in method.__code__.co_names and "cpu" in method.__code__.co_names
    assert "send_tensor.cuda()" in inspect.getsource(method)
    assert torch.device(torch.cpu.current_device()).type == "cpu"


def test_rotary_positions_of_a_cp_rank_need_no_pinned_memory() -> None:
    where = [("rope_utils.py", rope_utils), ("rotary_pos_embedding.py", rotary_pos_embedding)]
    where.append(("yarn_rotary_pos_embedding.py", yarn_rotary_pos_embedding))
    for name, module in where:
        assert "get_pos_emb_on_this_cp_rank(" in source("models", "common", "embeddings", name)
        assert module.get_pos_emb_on_this_cp_rank is context.rotary_part
    text = source("models", "common", "embeddings", "rope_utils.py")
    assert 'device="cpu", pin_memory=True' in text and "[cp_rank, (2 * cp_size - cp_rank - 1)]" in text
    group = types.SimpleNamespace(rank=lambda: 1, size=lambda: 2)
    assert context.rotary_part(torch.arange(8).view(8, 1), 0, group).flatten().tolist() == [2, 3, 4, 5]


def test_float64_gradients_keep_their_precision_reason() -> None:
    assert "shard_main_param.grad = shard_model_grad.float()" in source("optimizer", "distrib_optimizer.py")
    assert distrib_optimizer.DistributedOptimizer._copy_model_grads_to_main_grads.keeps_float64


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_float64_logits_of_a_router_are_scored_in_float64(score_function: str) -> None:
    text = source("transformer", "moe", "moe_utils.py")
    assert "torch.softmax(scores, dim=-1, dtype=torch.float32).type_as(logits)" in text
    assert "torch.sigmoid(logits.float()).type_as(logits)" in text
    logits = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    probs, chosen = moe_utils.topk_routing_with_score_function(logits, 2, score_function=score_function)
    scores = logits.exp() if score_function == "softmax" else logits.sigmoid()
    expected = (scores * chosen) / (scores * chosen).sum(dim=-1, keepdim=True)
    torch.testing.assert_close(probs, expected, rtol=1e-14, atol=0)
    rounded, _ = moe_utils.topk_routing_with_score_function(logits.float(), 2, score_function=score_function)
    assert rounded.dtype == torch.float32 and not torch.allclose(rounded.double(), expected, rtol=1e-10, atol=0)


def test_latent_attention_does_not_ask_for_classes_that_are_not_there() -> None:
    assert not isinstance(multi_latent_attention.TELinear, type), "core no longer has stand-ins for these classes"
    assert "isinstance(self.linear_proj, TELinear)" in source("transformer", "multi_latent_attention.py")
    assert not multi_latent_attention.HAVE_TE


def test_the_dispatchers_stream_is_always_done() -> None:
    text = source("transformer", "moe", "token_dispatcher.py")
    for call in ("torch.cuda.Stream()", "torch.cuda.current_stream()", "torch.cuda.stream(", ".record_event()"):
        assert call in text, f"core no longer calls {call}"
    cuda = view_of(token_dispatcher).cuda  # type: ignore[attr-defined]
    stream = cuda.Stream()
    with cuda.stream(stream):
        stream.wait_stream(cuda.current_stream())
    stream.record_event().synchronize()


def test_split_sizes_are_arrays() -> None:
    """Gloo counts through split sizes, and refuses tensors as numbers."""
    assert "if torch.is_tensor(tensor) and tensor.is_cuda:" in source("transformer", "moe", "moe_utils.py")
    assert "self.output_splits, as_numpy=True" in source("transformer", "moe", "token_dispatcher.py")
    counts = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([3, 4]), as_numpy=True)
    assert type(counts).__name__ == "ndarray" and counts.tolist() == [3, 4]
    kept = torch.tensor([1])
    assert token_dispatcher.maybe_move_tensor_to_cpu(kept) is kept
    assert token_dispatcher.maybe_move_tensor_to_cpu(None, as_numpy=True) is None


def test_uneven_exchanges_are_still_made_of_calls_that_gloo_refuses() -> None:
    text = source("tensor_parallel", "mappings.py")
    assert "torch.distributed.all_gather(output_tensor_list, input_, group=group)" in text
    assert "torch.distributed.reduce_scatter(output, input_tensor_list, group=group)" in text
    assert mappings._gather_along_first_dim.takes_uneven and mappings._reduce_scatter_along_first_dim.takes_uneven


def test_applying_the_seam_twice_changes_nothing() -> None:
    before = distrib_optimizer.DistributedOptimizer._copy_model_grads_to_main_grads, view_of(schedules)
    device.preload("cpu")
    assert before == (distrib_optimizer.DistributedOptimizer._copy_model_grads_to_main_grads, view_of(schedules))


def test_on_a_gpu_nothing_is_substituted() -> None:
    """The cuda branch imports core and returns: no function of the seam that replaces something is called in it."""
    tree = ast.parse(inspect.getsource(device.preload))
    branch = next(node for node in ast.walk(tree) if isinstance(node, ast.If) and "cuda" in ast.unparse(node.test))
    assert isinstance(branch.body[-1], ast.Return)
    calls = {ast.unparse(node.func) for node in ast.walk(ast.Module(branch.body, [])) if isinstance(node, ast.Call)}
    assert calls == {"refuse_without_kernels", "importlib.import_module"}, "the cuda branch does more than import"


def test_cuda_without_a_gpu_is_refused() -> None:
    if torch.cuda.is_available():
        assert device.choose_device("cuda") == "cuda"
        return
    with pytest.raises(LaunchError, match=r"parallel\.device=cuda.*parallel\.device=cpu"):
        device.choose_device("cuda")
    assert device.choose_device("auto") == "cpu"


def test_gloo_sends_are_not_freed_early() -> None:
    """Core's early release races with gloo's thread; see also the interleaved layouts of test_equivalence."""
    assert not device.can_free_while_sending("cpu") and device.can_free_while_sending("cuda")
    assert device.default_backend("cpu") == "gloo" and device.default_backend("cuda") == "nccl"
