"""Whole parameters of which each process has a part of the gradient: those between a column- and a row-parallel product."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.errors import UserError
from ....kernels.ops.linear import Linear
from ....kernels.parallel.collectives import TensorParallel, sum_gradient_over
from ....kernels.parallel.sharding import is_sharded

_COLUMN_PRODUCT = f"{Linear.__name__}Backward"  # in the graph of autograd


class PartialGradients:
    """Sums the gradients of a layer's parameters that act on this process's heads or columns alone.

    names: of those that are known, in the layer. The others are found in the graph of the first pass with gradients, behind
    each row-parallel product. Kept are their owners, because copies of the layer have other parameters.
    """

    def __init__(self, layer: nn.Module, names: Iterable[str], parallel: TensorParallel) -> None:
        self._layer, self._parallel = layer, parallel
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        self._add(names)
        self._frozen: dict[
            str, list[str]
        ] = {}  # by row-parallel product that was looked behind: what no graph had then

    def _add(self, names: Iterable[str]) -> None:
        for name in names:
            owner, _, own = name.rpartition(".")
            self._owners[name] = self._layer.get_submodule(owner), own

    def sum_known(self, *_: Any) -> None:
        """Do so for the known ones. A forward pre-hook of the layer: parameters of a copy have no hooks yet."""
        for owner, name in self._owners.values():
            parameter: Any = owner._parameters.get(name)
            if parameter is not None and not getattr(parameter, "sequence_parallel", False):
                sum_gradient_over(parameter, self._parallel.group)

    def look_behind(self, product: str, x: Tensor) -> None:
        """Find parameters that x, the input of a row-parallel product, depends on through no column-parallel one.

        Raises ValueError where hidden states reach the product around the column-parallel ones: the gradients of all parameters
        before them are then sums of whole gradients and parts.
        """
        if torch.compiler.is_compiling() or x.grad_fn is None:
            return
        frozen = self._frozen.get(product)
        if frozen is not None and not any(self._layer.get_parameter(name).requires_grad for name in frozen):
            return
        whole = {id(p): name for name, p in self._layer.named_parameters() if not is_sharded(p)}
        between, columns = _leaves([x.grad_fn], _COLUMN_PRODUCT)
        if between:
            before, _ = _leaves([node for column in columns for node, _ in column.next_functions], None)
            names = {whole.get(id(one), f"a parameter {tuple(one.shape)} outside of the layer") for one in between}
            if {id(one) for one in before} & {id(one) for one in between} or any(
                id(one) not in whole for one in between
            ):
                raise UserError(
                    f"{product}: a row-parallel product of {type(self._layer).__name__} depends on "
                    f"{', '.join(sorted(names)[:4])}, around its column-parallel ones, so that each process has a part of the "
                    f"gradients; let attn_qkv() or mlp_in() of the policy name what takes hidden states there"
                )
            self._add(names)
            self.sum_known()
        self._frozen[product] = [name for name in whole.values() if not self._layer.get_parameter(name).requires_grad]


def _leaves(nodes: list[Any], border: str | None) -> tuple[list[Tensor], list[Any]]:
    """Return the whole parameters that these nodes of a graph depend on, and the nodes of the border where the search ended."""
    leaves: list[Tensor] = []
    ends, seen = [], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == border:
            ends.append(node)
            continue
        leaf = getattr(node, "variable", None)  # of an AccumulateGrad
        if isinstance(leaf, nn.Parameter) and not is_sharded(leaf):
            leaves.append(leaf)
        nodes += [following for following, _ in node.next_functions]
    return leaves, ends
