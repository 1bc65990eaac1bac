"""The layers of a model in order: what backward computes again, FP8, shares of the tokens, and capture in CUDA graphs."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import UserError
from ..ops.attention.attention import AttentionMask
from ..ops.choices import ActivationCheckpointing
from ..ops.dropout import draw_seed
from ..ops.region import active_region
from ..parallel.collectives import ONE_PROCESS, TensorParallel, gather_from_group, scatter_to_group
from .cache import KeyValueCache
from .config import LayerConfig
from .inner_modules import has_hooks
from .layer import TransformerLayer, invertible_norms
from .recomputation import recompute_in_backward

_WARM_UPS = 3  # compile the kernels and let the matrix libraries choose theirs, which a capture forbids


class LayerStack(nn.ModuleList):
    """Layers in order, which are its items: `depth` of one config, or one of each config of a sequence.

    A sequence mixes kinds of layers, as local and global attention, of one hidden size.
    cuda_graph: in training on a GPU, capture forward and backward of the whole stack in two CUDA graphs when a shape first
        comes, and replay them from then on: one launch each in place of dozens per layer, which is what a small batch waits
        for. It needs parameters that stay where they are (not ZeRO stage 3), padded batches without additive bias, and the
        backward pass of each call before the next call of that shape, once; and it holds one more copy of the layers'
        gradients. Seeds of dropout are inputs, so every replay draws fresh masks, the same ones as without the graph.
    fp8: FP8 products with `Float8CurrentScaling` in all layers, whatever region is around the stack. False leaves the layers to
        such a region.
    activation_checkpointing: what backward computes again. `selective`: the attention core, scores, softmax and dropout, whose
        B * N * S * S probabilities are large and cheap; where they are not kept anyway, on the Triton path and without dropout,
        it changes nothing. `full`: all of a layer but its input; it costs a second forward pass.
    parallel: the processes that share the layers, and with `sequence` the rows of tokens between their products: see
        `TransformerLayer`. What goes in and comes out is replicated.

    Raises ValueError for what does not go together, and with fp8 for sizes per process that are no multiples of 16.
    """

    def __init__(
        self,
        config: LayerConfig | Sequence[LayerConfig],
        depth: int | None = None,
        *,
        cuda_graph: bool = False,
        fp8: bool = False,
        activation_checkpointing: ActivationCheckpointing = "none",
        parallel: TensorParallel = ONE_PROCESS,
    ) -> None:
        if cuda_graph and parallel.size > 1:
            raise UserError(
                f"cuda_graph=True captures no collectives, which {parallel.size} processes that share a layer need; turn it off"
            )
        if activation_checkpointing not in get_args(ActivationCheckpointing):
            raise UserError(
                f"activation_checkpointing={activation_checkpointing!r} is unknown; use 'none', 'selective' or 'full'"
            )
        if cuda_graph and activation_checkpointing == "full":
            raise UserError(
                "activation_checkpointing='full' computes layers again in backward, but cuda_graph=True holds the memory of "
                "all that a graph computes; turn one off"
            )
        configs = _one_per_layer(config, depth)
        super().__init__(TransformerLayer(each, parallel) for each in configs)
        if fp8:
            from .fp8_products import check_fp8

            for each in dict.fromkeys(configs):
                check_fp8(each, parallel)
        self.cuda_graph, self.fp8, self.parallel = cuda_graph, fp8, parallel
        self.activation_checkpointing = activation_checkpointing
        self._graphs: dict[Any, _Graph] = {}

    def forward(self, hidden_states: Tensor, mask: AttentionMask, cache: KeyValueCache | None = None) -> Tensor:
        """Return the last layer's output, in shape and dtype of hidden_states: (B, S, H), or (T, H) if the mask has cu_seqlens.

        cache: the tokens follow those in it, and theirs are added; the mask is causal, its key_mask over all of them. In eval()
        and without gradients alone.
        Raises ValueError for what a CUDA graph cannot take, in backward too, and with parallel.sequence for tokens that the
        processes cannot share equally.
        """
        layers: list[Any] = list(self)  # or what wraps them, as FSDP does
        if cache is not None:
            return self._run_with_cache(layers, hidden_states, mask, cache)
        invertible = invertible_norms(layers)
        drops = any(layer.drops for layer in layers)
        seeds = draw_seed(hidden_states.device, (len(layers),)) if drops else None
        region = active_region()
        if self.cuda_graph and not self.fp8 and region is not None and region.enabled:
            raise UserError("cuda_graph=True takes no fp8_autocast region around the stack; build it with fp8=True")
        if self.cuda_graph:
            self._check_hooks()
        with self._region():
            if self.cuda_graph and hidden_states.is_cuda and self.training and torch.is_grad_enabled():
                return self._replay(layers, invertible, hidden_states, seeds, mask)
            if not self.parallel.divides_tokens:
                return self._run(layers, invertible, hidden_states, seeds, mask)
            rows = scatter_to_group(self._rows(hidden_states), self.parallel.group, 0)
            rows = self._run(layers, invertible, rows, seeds, mask, hidden_states.shape[:-1])
            return gather_from_group(rows, self.parallel.group, 0).view(hidden_states.shape)

    def _run_with_cache(
        self, layers: Sequence[Any], hidden_states: Tensor, mask: AttentionMask, cache: KeyValueCache
    ) -> Tensor:
        """Return the last layer's output for tokens behind those in the cache, to which theirs are added."""
        if self.training or torch.is_grad_enabled():
            gradients = "on" if torch.is_grad_enabled() else "off"
            raise UserError(
                f"a cache is given with training={self.training} and gradients {gradients}; it passes no gradient, so call "
                f"eval() and use torch.no_grad()"
            )
        if self.parallel.divides_tokens:
            raise UserError(
                "sequence parallelism divides tokens that a cache holds together; build the stack without it"
            )
        cache.check(hidden_states, mask)
        with self._region():
            for number, layer in enumerate(layers):
                of_layer = cache.of_layer(number, hidden_states.shape[1])
                hidden_states = layer(hidden_states, mask, invertible=(False, False), cache=of_layer)
        cache.length += hidden_states.shape[1]
        return hidden_states

    def _region(self) -> AbstractContextManager[None]:
        """Return what encloses the layers."""
        if not self.fp8:
            return nullcontext()
        from ..fp8.scaling import Float8CurrentScaling, fp8_autocast

        return fp8_autocast(fp8_recipe=Float8CurrentScaling())

    def _check_hooks(self) -> None:
        """Raise ValueError for hooks on layers or on modules inside them: a replay runs kernels, and no Python."""
        for number, layer in self._modules.items():
            for name, module in (("", layer), *layer._modules.items()):  # type: ignore[union-attr]
                if module is not None and has_hooks(module):
                    raise UserError(
                        f"layer {number} has hooks{f' on {name}' if name else ''}, which a replayed CUDA graph would not run; "
                        f"remove them, or build the stack with cuda_graph=False"
                    )

    def __getitem__(self, index: Any) -> Any:
        """Return a layer, or for a slice an nn.ModuleList of layers, which does nothing of what the stack does around them."""
        return nn.ModuleList(list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_graphs": {}}  # a copy has parameters of its own

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._graphs.clear()  # parameters move
        return super()._apply(*args, **kwargs)

    def _rows(self, hidden_states: Tensor) -> Tensor:
        """Return the hidden states, a row a token, (T, H); raises ValueError if the processes cannot share them equally."""
        rows = hidden_states.flatten(0, -2)
        if len(rows) % self.parallel.size:
            *leading, _ = hidden_states.shape
            sizes = f"T={leading[0]}" if len(leading) == 1 else f"B={leading[0]} times S={leading[1]}"
            raise UserError(
                f"{sizes} tokens are not divisible by the t={self.parallel.size} processes of sequence parallelism; pad the "
                f"batch, or turn sequence parallelism off"
            )
        return rows

    def _replay(
        self,
        layers: Sequence[TransformerLayer],
        invertible: list[tuple[bool, bool]],
        hidden_states: Tensor,
        seeds: Tensor | None,
        mask: AttentionMask,
    ) -> Tensor:
        """Return the layers' output by the CUDA graph of this shape, which is captured when the shape first comes."""
        if mask.cu_seqlens is not None or mask.bias is not None:
            raise UserError("cuda_graph=True needs masks of causal, key_mask and segment_ids alone; turn it off")
        given = {"seeds": seeds, "key_mask": mask.key_mask, "segment_ids": mask.segment_ids}
        inputs = {name: tensor for name, tensor in given.items() if tensor is not None}
        modules = tuple(module for layer in layers for module in layer._modules.values())  # adapters may come later
        key = (hidden_states.shape, hidden_states.dtype, mask.causal, tuple(inputs), tuple(invertible), modules)
        if key not in self._graphs:

            def run(hidden: Tensor, *tensors: Tensor) -> Tensor:
                named = dict(zip(inputs, tensors, strict=True))
                padded = AttentionMask(mask.causal, named.get("key_mask"), named.get("segment_ids"))
                return self._run(layers, invertible, hidden, named.get("seeds"), padded)

            parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
            with torch.cuda.device(hidden_states.device):
                self._graphs[key] = _Graph(run, [hidden_states, *inputs.values()], parameters)
        graph = self._graphs[key]
        return _Replay.apply(  # type: ignore[no-any-return, no-untyped-call]
            graph, hidden_states, *inputs.values(), *graph.parameters
        )

    def _run(
        self,
        layers: Sequence[TransformerLayer],
        invertible: Sequence[tuple[bool, bool]],
        hidden_states: Tensor,
        seeds: Tensor | None,
        mask: AttentionMask,
        token_shape: torch.Size | None = None,
    ) -> Tensor:
        each = [None] * len(layers) if seeds is None else seeds.unbind()
        selective, full = (self.activation_checkpointing == choice for choice in ("selective", "full"))
        call = _run_layer_with_own_mask if full and torch.compiler.is_compiling() else _run_layer
        for layer, seed, allowed in zip(layers, each, invertible, strict=True):
            options = {"invertible": allowed, "token_shape": token_shape, "recompute_attention": selective}
            run = functools.partial(call, layer, mask, options)
            hidden_states = recompute_in_backward(run, hidden_states, seed) if full else run(hidden_states, seed)
        return hidden_states


def _one_per_layer(config: LayerConfig | Sequence[LayerConfig], depth: int | None) -> list[LayerConfig]:
    if isinstance(config, LayerConfig):
        if depth is None:
            raise ValueError("depth is not given with one config for all layers; give it, or a sequence of configs")
        return [config] * depth
    if depth is not None and depth != len(config):
        raise ValueError(f"depth={depth} with {len(config)} configs, one per layer; leave depth out")
    sizes = {each.hidden_size for each in config}
    if len(sizes) > 1:
        raise UserError(
            f"hidden_size differs between layers, {sorted(sizes)}; the layers of a stack have one residual stream"
        )
    return list(config)


def _run_layer(
    layer: TransformerLayer, mask: AttentionMask, options: dict[str, Any], hidden_states: Tensor, seed: Tensor | None
) -> Any:
    return layer(hidden_states, mask, seed=seed, **options)


def _run_layer_with_own_mask(layer: TransformerLayer, mask: AttentionMask, *rest: Any) -> Any:
    # torch.compile lets a recomputed function change nothing from outside, and a mask keeps what it makes
    return _run_layer(layer, dataclasses.replace(mask, _made={}), *rest)


class _Graph:
    """Forward and backward of `run`, captured on copies of `inputs`, of which only the first has a gradient."""

    def __init__(self, run: Callable[..., Tensor], inputs: list[Tensor], parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.last_pass: Any = None  # the one whose tensors the backward graph would read now
        self.inputs = [tensor.detach().clone() for tensor in inputs]
        self.inputs[0].requires_grad_()
        leaves = [self.inputs[0], *parameters]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                output = run(*self.inputs)
                torch.autograd.grad(output, leaves, torch.zeros_like(output))
        torch.cuda.current_stream().wait_stream(stream)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # thread_local, because the data loader's thread pins memory meanwhile
        with torch.cuda.graph(self.forward, capture_error_mode="thread_local"):
            output = run(*self.inputs)
        self.output, self.doutput = output.detach(), torch.empty_like(output)
        with torch.cuda.graph(self.backward, pool=self.forward.pool(), capture_error_mode="thread_local"):
            self.gradients = torch.autograd.grad(output, leaves, self.doutput)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, *tensors: Tensor) -> Tensor:
        for static, given in zip(graph.inputs, tensors, strict=False):
            static.copy_(given)
        graph.forward.replay()
        ctx.graph = graph
        ctx.own_pass = graph.last_pass = object()
        return graph.output.clone()  # the next replay overwrites it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, doutput: Tensor) -> tuple[Tensor | None, ...]:
        graph: _Graph = ctx.graph
        if graph.last_pass is not ctx.own_pass:
            raise UserError(
                "cuda_graph=True keeps the tensors of one call of the layers, and this one's are gone: the layers were called "
                "again, or its backward pass has run; run backward once after each call, or turn cuda_graph off"
            )
        graph.last_pass = None
        graph.doutput.copy_(doutput)
        graph.backward.replay()
        dhidden, *gradients = graph.gradients
        # autograd copies gradients that are referenced from elsewhere, as these are, in place of taking them for .grad
        return None, dhidden.clone(), *[None] * (len(graph.inputs) - 1), *gradients
