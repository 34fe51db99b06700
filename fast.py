"""Forward and backward of a micro-batch, and the ways to make them fast.

`--fast none` is the truth: plain PyTorch, one kernel after the other. `compile` fuses what lies
between the matrix products of a Conformer block (torch.compile, once a shape). `graph` does that
and then records the whole of forward and backward as one CUDA graph a shape, which is replayed
without Python. Batches have at most 8 joint shapes (data.py), so that both end after a few steps.
Tests hold each to `none`.

Public: matmul_flops, choose_matmul, check_fast, compile_blocks, checkpoint_blocks, uncompiled,
        compilations, autocast, MicroStep, GraphedMicroStep, make_micro_step, peak_memory_mib.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
PROBE_SIZE = {"cpu": 512, "cuda": 8192}  # of a square matrix product
# `auto` switches only where it is worth it, and well above what neighbours on a machine do to a
# time: the same command on the same machine should always choose the same.
WORTH_SWITCHING = 1.6
EXACT = 1e-4  # largest error over RMS that is fp32's rounding; bf16 has 1e-2
MOST_COMPILED = 64  # shapes of a block: 8 joint ones, each with up to four stacks' batches
WARM_UP = 2  # times that a shape runs as usual before it is recorded
BUCKET = 2**25  # gradients reduced at a time

# --------------------------------------------------------------------------------- matrix products


def matmul_flops(device: torch.device, dtype: str, rounds: int = 50) -> float:
    """Floating-point operations a second of this device's best matrix product, as of now.

    A square product, 512 wide on a CPU and 8192 on an accelerator; the best of `rounds`. On a CPU
    that others keep busy it is too low, and MFU by it too high.
    """
    n, of_type = PROBE_SIZE.get(device.type, 4096), DTYPES[dtype]
    a, b = torch.randn(2, n, n, device=device).to(of_type)
    best = 0.0
    for _ in range(rounds):
        _wait_for(device)
        start = time.perf_counter()
        a @ b
        _wait_for(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _matmul_error(device: torch.device) -> float:
    """Largest error of an fp32 product against float64, over the RMS."""
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0)).to(device)
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).abs().max() / exact.square().mean().sqrt())


def choose_matmul(choice: str, device: torch.device) -> tuple[str, str]:
    """Set how fp32 matrix products are made -> what was set, and why if that is not torch's
    default.

    On some processors torch's default library for them reaches half of what another one, oneDNN,
    does; torch.set_float32_matmul_precision("medium") leads there. What "medium" means depends on
    the processor: with bf16 matrix units oneDNN really computes in bf16, without them in fp32. So
    `auto` measures: it takes "medium" on a CPU where that is 1.6 times as fast and as exact as
    fp32, and else leaves "highest".

    Args: choice  auto, highest, high or medium.
    """
    if choice != "auto" or device.type != "cpu":
        chosen = "highest" if choice == "auto" else choice
        torch.set_float32_matmul_precision(chosen)
        return chosen, ""
    speed = {"highest": 0.0, "medium": 0.0}
    for _ in range(3):  # in turns
        for name in speed:
            torch.set_float32_matmul_precision(name)
            speed[name] = max(speed[name], matmul_flops(device, "fp32", rounds=5))
    gain, error = speed["medium"] / speed["highest"], _matmul_error(device)  # of "medium", the last
    chosen = "medium" if gain >= WORTH_SWITCHING and error < EXACT else "highest"
    torch.set_float32_matmul_precision(chosen)
    why = f"medium is {gain:.2f} times as fast, largest error {error:.0e} of the RMS"
    if chosen == "highest":
        return chosen, ""
    return chosen, f"fp32 matrix products: {chosen} ({why}; --fp32-matmul)"


# ------------------------------------------------------------------------------------------ compile


def check_fast(
    mode: str, device: torch.device, loss_names: list[str], recomputes_noise: bool = False
) -> None:
    """Can this machine and this run have that mode of --fast?

    Args:   recomputes_noise  activation checkpointing with dropout.
    Raises: ValueError when not.
    """
    if mode == "graph" and device.type != "cuda":
        raise ValueError(
            "--fast graph captures CUDA graphs and this machine has no CUDA device: "
            "use --fast none or compile"
        )
    if mode == "graph" and "ctc" in loss_names:
        raise ValueError(
            "--fast graph: PyTorch's CTC waits for the host, which a CUDA graph cannot: "
            "use --fast compile"
        )
    if mode == "graph" and recomputes_noise:
        raise ValueError(
            "--fast graph with --activation-checkpointing cannot draw dropout twice alike: "
            "use --fast compile, or --dropout 0"
        )
    compilers = (os.environ.get("CXX") or "g++", "g++", "clang++")
    if mode == "compile" and device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise ValueError(
            "--fast compile needs a C++ compiler on CPU (g++, clang++ or $CXX) and found none: "
            "use --fast none"
        )


def compile_blocks(model: nn.Module, mode: str) -> None:
    """Compile each Conformer block in place, unless mode is `none`; parameter names stay.

    A block and not the model: all blocks share what is compiled, so a shape costs the compilation
    of one block, not of 24, and nearly all the time is spent in blocks.
    """
    if mode == "none":
        return
    torch._dynamo.config.recompile_limit = MOST_COMPILED
    for stack in _stacks(model):
        for block in stack.blocks:
            block.compile(dynamic=False, fullgraph=True)


def checkpoint_blocks(model: nn.Module, wanted: bool) -> None:
    """Turn activation checkpointing (conformer.ConformerStack) on or off everywhere."""
    for stack in _stacks(model):
        stack.checkpointing = wanted


def _stacks(model: nn.Module) -> Iterator[nn.Module]:
    """The piles of Conformer blocks in a model, known by their switch: this file imports none."""
    return (part for part in model.modules() if hasattr(part, "checkpointing"))


def compilations() -> int:
    """How many graphs torch.compile has made in this process."""
    if "torch._dynamo" not in sys.modules:  # its import takes a second: not for an eager run
        return 0
    return sys.modules["torch._dynamo"].utils.counters["stats"]["unique_graphs"]


def uncompiled(mode: str) -> contextlib.AbstractContextManager:
    """Within it nothing compiled is used: held-out batches have any shape."""
    if mode == "none":
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


# ------------------------------------------------------------------------------------ micro-batches


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """bf16 autocast, or nothing for fp32 and fp64."""
    if dtype == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def _average_in_bf16(state, bucket):  # DistributedDataParallel takes no postponed annotations
    """How DistributedDataParallel averages a bucket of gradients, halved in transit.

    torch has such a hook, but for NCCL alone.
    """
    wide = bucket.buffer()
    short = (wide / dist.get_world_size()).bfloat16()
    sent = dist.all_reduce(short, async_op=True).get_future()
    return sent.then(lambda done: wide.copy_(done.value()[0]))


class MicroStep:
    """Forward and backward of one micro-batch after the other; gradients add up in `.grad`.

    Over several ranks DistributedDataParallel averages them, while backward is still going on: in
    the last micro-batch of a step only, the others run under its no_sync.

    Args: reduce_dtype  bf16 halves what travels between ranks, at the price of its rounding.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        dtype: str = "fp32",
        world_size: int = 1,
        reduce_dtype: str = "fp32",
    ) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.world_size, self.replicas = world_size, model
        if world_size > 1:
            self.replicas = self._replicate(reduce_dtype)

    def _replicate(self, reduce_dtype: str) -> nn.Module:
        # Of the depthwise weights, a few thousand numbers that come with strides of their own.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        replicas = DistributedDataParallel(self.model, forward_sync_buffers=False)
        if reduce_dtype == "bf16":
            replicas.register_comm_hook(None, _average_in_bf16)
        return replicas

    def __call__(
        self, batch: Any, scales: dict[str, Tensor], last: bool = True
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Losses and statistics of a micro-batch, whose objective's gradient has been added.

        Args: batch   on any device; scales  {loss name: ()}, see training.loss_scales;
              last    of its step.
        """
        alone = last or self.world_size == 1
        with contextlib.nullcontext() if alone else self.replicas.no_sync():
            return self._forward_backward(batch.to(self.device, non_blocking=True), scales)

    def _forward_backward(
        self, batch: Any, scales: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        with autocast(self.device, self.dtype):
            losses, statistics = self.replicas(batch)
        total = sum(loss.sum * scales[name].to(loss.sum.dtype) for name, loss in losses.items())
        total.backward()
        detached = {name: loss.detached() for name, loss in losses.items()}
        return detached, {name: value.detach() for name, value in statistics.items()}

    def reduce(self) -> None:
        """Average gradients over ranks after the last micro-batch, where that is still to do."""

    def zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the next step's first micro-batch."""
        optimizer.zero_grad(set_to_none=True)


Record = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


class GraphedMicroStep(MicroStep):
    """The same, replayed from a CUDA graph for each shape of batch.

    A shape runs as usual twice, which compiles and warms up whatever needs it; the third time it is
    recorded. A recorded graph reads and writes fixed memory: its batch and scales are copied in,
    gradients are added in place (so they are zeroed, never replaced), and what it returns is valid
    until the next replay. All graphs use one pool of memory; they are replayed one at a time and
    keep nothing for each other. Noise is drawn from the default generator, whose seed counts at
    replay: training.seed_micro_batch works as in `none`.

    DistributedDataParallel works in hooks, which a replay does not call. So gradients are reduced
    after the last micro-batch, without overlap. The optimiser stays outside: its few large kernels
    wait for nobody.

    Args: record  (function) -> (replay, what function returned): how to record. Tests on a CPU have
                  another than CUDA graphs.
    """

    def __init__(self, *args: Any, record: Record | None = None, **how: Any) -> None:
        super().__init__(*args, **how)
        self.record = record or self._cuda_graph
        self.shapes: Counter[tuple] = Counter()
        self.recorded: dict[tuple, tuple[Any, dict[str, Tensor], Callable[[], None], Any]] = {}
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        if self.device.type == "cuda":
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def _replicate(self, reduce_dtype: str) -> nn.Module:
        self.reduce_dtype = DTYPES[reduce_dtype]
        for tensor in self.model.state_dict().values():
            dist.broadcast(tensor, 0)
        return self.model

    def __call__(
        self, batch: Any, scales: dict[str, Tensor], last: bool = True
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """As MicroStep; what is returned is valid until the next call."""
        batch = batch.to(self.device, non_blocking=True)
        shape = tuple(tensor.shape for tensor in batch.tensors())
        self.shapes[shape] += 1
        if self.shapes[shape] <= WARM_UP:
            with self._on_side_stream():
                return self._forward_backward(batch, scales)
        if shape not in self.recorded:
            its_batch = batch.clone()
            its_scales = {name: scale.clone() for name, scale in scales.items()}
            replay, out = self.record(lambda: self._forward_backward(its_batch, its_scales))
            self.recorded[shape] = its_batch, its_scales, replay, out
        its_batch, its_scales, replay, out = self.recorded[shape]
        for mine, new in zip(its_batch.tensors(), batch.tensors()):
            mine.copy_(new)
        for name, scale in scales.items():
            its_scales[name].copy_(scale)
        replay()
        return out

    @contextlib.contextmanager
    def _on_side_stream(self) -> Iterator[None]:
        """Where graphs are recorded, autograd must have run before: it remembers streams."""
        if self.device.type != "cuda":
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def _cuda_graph(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls count: loader threads go on pinning memory.
        how = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, **how):
            out = function()
        return graph.replay, out

    def reduce(self) -> None:
        """Average gradients over ranks, a bucket at a time."""
        if self.world_size == 1:
            return
        bucket: list[Tensor] = []
        for i, parameter in enumerate(self.parameters):
            bucket.append(parameter.grad)
            if i + 1 == len(self.parameters) or sum(map(Tensor.numel, bucket)) >= BUCKET:
                flat = torch.cat([grad.reshape(-1) for grad in bucket]) / self.world_size
                if self.reduce_dtype == torch.bfloat16:
                    flat = flat.bfloat16()
                dist.all_reduce(flat)
                for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket])):
                    grad.copy_(part.view_as(grad))
                bucket = []

    def zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """In place: the graphs add to this memory."""
        optimizer.zero_grad(set_to_none=False)


def make_micro_step(mode: str, *args: Any, **how: Any) -> MicroStep:
    """What --fast asks for. Arguments are MicroStep's."""
    return (GraphedMicroStep if mode == "graph" else MicroStep)(*args, **how)


def peak_memory_mib(device: torch.device) -> float:
    """Most memory so far: allocated by tensors on an accelerator, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts KiB, macOS bytes
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
