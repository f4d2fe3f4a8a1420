"""The border to `torch.export`: an ExportedProgram becomes a Model, and a Model an ExportedProgram.

One of the two files that use torch API below the public line (the other is `fake.py`): unlifted modules without
guards, pytree code generation, range constraints, the cache of fake tensors.
"""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch._dynamo import config as dynamo_config
from torch.export import Dim, ExportedProgram
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from graphopt.errors import GraphoptError, UnsupportedError
from graphopt.fake import Shapes, dim_of, dtype_name
from graphopt.frontends.conditions import conditions, squeezed
from graphopt.frontends.functionalize import functionalize
from graphopt.frontends.outputs import output_names, refuse_data_dependent
from graphopt.frontends.regions import inline_regions, refuse_control_flow
from graphopt.mode import is_running_statistic, note_fixed_flags, unchain_counters
from graphopt.model import Mode, Model, empty_module, output_leaves
from graphopt.ops import is_in_place, is_pure
from graphopt.params import ParamKind
from graphopt.signature import ConstSpec, Range, Signature, TensorSpec, ValueSpec, size_of

__all__ = ["example_sizes", "export", "from_exported_program", "make_codegen", "to_exported_program", "usual_sizes"]

aten = torch.ops.aten


def export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any) -> ExportedProgram:
    """`torch.export.export` as it is called here: not strict, and without warnings.

    Args:
        dynamic: what torch calls `dynamic_shapes`.
    """
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        if any(spec is not None for spec in pytree.tree_leaves(dynamic)):
            # With free sizes the cache of fake tensors takes longer, a quarter of the whole, than what it saves.
            stack.enter_context(dynamo_config.patch(fake_tensor_cache_enabled=False))
        return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic, strict=False)


def from_exported_program(
    program: ExportedProgram,
    *,
    mode: Mode,
    dim_names: Mapping[tuple[int, int], str] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Model:
    """Make a Model that shares nothing with `program`: functional graph, own tensors, signature.

    Args:
        mode: whether the graph was traced in training or in evaluation mode.
        dim_names: names of symbolic sizes by (flat tensor input, axis); the others are named after their input.
        input_names, output_names: names for the flat inputs and outputs; torch's names by default.

    Raises:
        UnsupportedError: for control flow, writes to inputs, and what else the IR cannot hold.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about buffers it registers itself
        unlifted = program.module(check_guards=False)
    assert isinstance(unlifted, fx.GraphModule)
    graph = unlifted.graph
    refuse_control_flow(graph, unlifted)
    inline_regions(graph, unlifted)
    _rename_inputs(graph, input_names)
    shapes = _shapes_of(graph, dim_names or {})
    _drop_assertions(graph)
    for node in graph.nodes:
        if node.op == "call_function" and "val" in node.meta and not is_in_place(node):
            shapes.learn(node)  # torch.export has propagated the same operators, which takes long
    unchain_counters(graph)
    functionalize(graph, shapes, may_write=is_running_statistic)
    _one_node_per_tensor(graph)
    _drop_dead(graph)

    module = empty_module()
    module.graph = graph
    signature = _signature(graph, shapes, program, output_names)
    model = Model(module, signature, shapes, mode=mode, example=_example(program))
    _require_free(signature, dim_names or {})
    _copy_tensors(unlifted, model)
    for node in graph.nodes:
        if node.op == "get_attr":
            node.meta["val"] = shapes.fake(model.params[str(node.target)])
        elif node.op == "call_function":
            node.meta["val"] = shapes.propagate(node)
        node.meta = {key: node.meta[key] for key in ("val", "stack_trace", "nn_module_stack") if key in node.meta}
    note_fixed_flags(model)
    model.touch()
    return model


def to_exported_program(model: Model) -> ExportedProgram:
    """Export the model again: the same undecomposed graph, sizes that are free stay free.

    Raises:
        GraphoptError: when torch cannot export the graph.
    """
    dims = {name: Dim(name, min=r.min or None, max=r.max) for name, r in model.signature.ranges.items()}
    sizes = example_sizes(model)
    leaves: list[Any] = []
    specs: list[Any] = []
    examples = iter(model.example)
    for spec in model.signature.inputs:
        if isinstance(spec, ConstSpec):
            leaves.append(spec.value)
            specs.append(None)
            continue
        shape = [dim if isinstance(dim, int) else size_of(dim, sizes) for dim in spec.dims]
        example = next(examples, None)
        fits = example is not None and list(example.shape) == shape
        leaves.append(example if fits else torch.zeros(shape, dtype=getattr(torch, spec.dtype)))
        free = {axis: size_of(dim, dims) for axis, dim in enumerate(spec.dims) if isinstance(dim, str)}
        specs.append(free or None)
    args, kwargs = pytree.tree_unflatten(leaves, model.in_spec)
    dynamic = pytree.tree_unflatten(specs, model.in_spec)
    names = list(model.graph._codegen.pytree_info.orig_args)  # type: ignore[attr-defined]  # set by export
    by_name = None  # torch wants its own spelling of the structure for other containers, so none where nothing varies
    if any(specs):
        by_name = dict(zip(names, (*dynamic[0], *dynamic[1].values()), strict=True))
    try:
        return _export_again(model, args, kwargs, by_name)
    except Exception as error:
        raise GraphoptError(
            "torch.export refuses the graph", why=str(error).strip().splitlines()[0] if str(error) else repr(error)
        ) from error


def _export_again(model: Model, args: Any, kwargs: Any, specs: dict[str, Any] | None) -> ExportedProgram:
    try:
        return export(model.module, args, kwargs, specs)
    except Exception as error:
        hints = hinted(specs) if is_unprovable(error) else None
        if hints is None:
            raise
        return export(model.module, args, kwargs, hints)


def is_unprovable(error: Exception) -> bool:
    """Whether torch has met a condition on free sizes that it can neither prove nor suggest a remedy for, such as
    `1 % (1 + (w - 1) // 8) != 0`: the strides of intermediate tensors give rise to these."""
    text = str(error)
    return "Constraints violated" in text and "Suggested fixes" not in text and "Specializations" not in text


def hinted(specs: Any) -> Any | None:
    """`specs` with dims that torch keeps free without proving anything; None where names tie sizes to each other."""
    dims = [leaf for leaf in pytree.tree_leaves(specs) if isinstance(leaf, Dim)]
    if len({dim.__name__ for dim in dims}) < len(dims) or any("root" in vars(dim) for dim in dims):
        return None
    return pytree.tree_map(lambda d: Dim.DYNAMIC(min=d.min, max=_bound(d.max)) if isinstance(d, Dim) else d, specs)


def _bound(size: Any) -> int | None:
    return int(size) if bool(size < 2**40) else None


def make_codegen(arguments: Sequence[str], in_spec: pytree.TreeSpec, out_spec: pytree.TreeSpec) -> Any:
    """The code generator of a graph whose inputs and outputs are structures."""
    return _PyTreeCodeGen(_PyTreeInfo(list(arguments), in_spec, out_spec))


def example_sizes(model: Model) -> dict[str, int]:
    """One legal size for every named dim: the size it had at capture, or the smallest that is no special case."""
    sizes = {
        name: max(r.min, 2) if r.max is None else min(max(r.min, 2), r.max)
        for name, r in model.signature.ranges.items()
    }
    for spec, example in zip(model.signature.tensor_inputs, model.example, strict=False):
        for dim, size in zip(spec.dims, example.shape, strict=True):
            if isinstance(dim, str) and dim in sizes and size > 1:
                sizes[dim] = int(size)
    return sizes


def usual_sizes(model: Model) -> dict[str, int]:
    """The size that every named dim had in the user's example: what costs and times are given for."""
    single = (model.shapes.names[symbol] for symbol in model.shapes.single)
    return example_sizes(model) | dict.fromkeys(single, 1)


def _rename_inputs(graph: fx.Graph, names: Sequence[str] | None) -> None:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, names or [str(n.target) for n in placeholders], strict=True):
        node.meta["input_name"] = name


def _shapes_of(graph: fx.Graph, dim_names: Mapping[tuple[int, int], str]) -> Shapes:
    """The fake mode of the graph, with a name for each symbol that an input has as a size."""
    tensors = [node for node in graph.nodes if node.op == "placeholder" and isinstance(node.meta["val"], torch.Tensor)]
    fakes = [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    names: dict[sympy.Symbol, str] = {}
    for wanted in (True, False):  # names that were asked for come first
        for position, node in enumerate(tensors):
            for axis, size in enumerate(node.meta["val"].shape):
                symbols = size.node.expr.free_symbols if isinstance(size, torch.SymInt) else ()
                asked = dim_names.get((position, axis))
                for symbol in symbols:
                    if symbol not in names and (asked is not None or not wanted):
                        names[symbol] = asked or _fresh(f"{node.name}_{axis}", names)
    return Shapes(fakes[0].fake_mode if fakes else None, names)


def _fresh(name: str, taken: Mapping[sympy.Symbol, str]) -> str:
    while name in taken.values():
        name += "_"
    return name


def _require_free(signature: Signature, dim_names: Mapping[tuple[int, int], str]) -> None:
    for (position, axis), name in dim_names.items():
        spec = signature.tensor_inputs[position]
        if isinstance(spec.dims[axis], int):
            raise UnsupportedError(
                f"the size '{name}' of input '{spec.name}' (axis {axis}) is fixed to {spec.dims[axis]} by the model",
                todo="leave it out of `dynamic`, or rewrite the step that needs this size",
            )


def _drop_assertions(graph: fx.Graph) -> None:
    """Remove what only repeats what the verifier checks, and the copies that `torch.tensor` literals come with."""
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target is aten.lift_fresh_copy.default:
            source = node.args[0]
            for user in list(node.users):
                if user.target is aten.detach_.default:
                    user.replace_all_uses_with(node)
                    graph.erase_node(user)
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _one_node_per_tensor(graph: fx.Graph) -> None:
    """Merge the get_attr nodes of one name."""
    first: dict[str, fx.Node] = {}
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        keeper = first.setdefault(str(node.target), node)
        if keeper is not node:
            node.replace_all_uses_with(keeper)
            graph.erase_node(node)


def _drop_dead(graph: fx.Graph) -> None:
    """Remove what computes nothing that is used, and then the tensors that only this has read."""
    for node in reversed(list(graph.nodes)):
        if not node.users and is_pure(node):
            graph.erase_node(node)


def _copy_tensors(source: nn.Module, model: Model) -> None:
    """Give `model` copies of the tensors of `source`, ties kept; unused ones of the user's state stay as `kept`."""
    copies: dict[Hashable, torch.Tensor] = {}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        parameter = isinstance(tensor, nn.Parameter)
        key = (parameter, _place(tensor))
        if key not in copies:
            made = tensor.detach().clone()
            copies[key] = nn.Parameter(made, requires_grad=tensor.requires_grad) if parameter else made
        return copies[key]

    state = set(source.state_dict())
    used = {str(node.target) for node in model.graph.nodes if node.op == "get_attr"}
    named = dict(source.named_parameters(remove_duplicate=False))
    named |= dict(source.named_buffers(remove_duplicate=False))  # type: ignore[arg-type]  # both are tensors
    for name, tensor in named.items():
        if name not in used and name not in state:
            continue
        kind = ParamKind.BUFFER if name in state else ParamKind.CONSTANT
        model.params.add(name, copy(tensor), ParamKind.PARAMETER if isinstance(tensor, nn.Parameter) else kind)
    for name in sorted(used - named.keys()):
        path, _, leaf = name.rpartition(".")
        model.params.add(name, copy(getattr(source.get_submodule(path), leaf)), ParamKind.CONSTANT)
    model.kept = {name for name in named if name in state and name not in used}


def _place(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors that are one, also when a file's reader made two objects of them."""
    if not tensor.numel() or tensor.device.type == "meta":  # neither has an address
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _example(program: ExportedProgram) -> list[torch.Tensor]:
    if program.example_inputs is None:
        return []
    return [
        leaf.detach().clone() for leaf in pytree.tree_leaves(program.example_inputs) if isinstance(leaf, torch.Tensor)
    ]


def _signature(graph: fx.Graph, shapes: Shapes, program: ExportedProgram, named: Sequence[str] | None) -> Signature:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = [_spec(node.meta["input_name"], node.meta["val"], shapes) for node in placeholders]
    info = graph._codegen.pytree_info  # type: ignore[attr-defined]  # set by torch.export
    names = named or output_names(info.out_spec)
    refuse_data_dependent(graph, shapes, names)
    outputs = [
        _spec(name, leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf, shapes)
        for name, leaf in zip(names, output_leaves(graph), strict=True)
    ]
    ranges = {}
    for symbol, name in shapes.names.items():
        found = program.range_constraints.get(symbol)
        low = int(found.lower) if found is not None else 0
        high = int(found.upper) if found is not None and found.upper.is_finite and found.upper < 2**40 else None
        ranges[name] = Range(low, high)
    for spec in (info.in_spec, info.out_spec):
        _register_namedtuples(spec)
    trees = (pytree.treespec_dumps(info.in_spec), pytree.treespec_dumps(info.out_spec))
    signature = Signature(tuple(inputs), tuple(outputs), ranges, *trees)
    assumed = conditions(program._guards_code, signature, info.in_spec, info.orig_args)
    return replace(signature, conditions=(*assumed, *squeezed(graph, shapes, ranges)))


def _register_namedtuples(spec: pytree.TreeSpec) -> None:
    """Give every namedtuple class in `spec` a name under which torch can write its structure."""
    if spec.type is namedtuple and spec.context not in pytree.SUPPORTED_SERIALIZED_TYPES:
        cls = spec.context
        pytree._register_namedtuple(cls, serialized_type_name=f"{cls.__module__}.{cls.__qualname__}")
    for child in spec.children():
        _register_namedtuples(child)


def _spec(name: str, value: Any, shapes: Shapes) -> ValueSpec:
    if isinstance(value, torch.Tensor):
        return TensorSpec(name, dtype_name(value.dtype), tuple(dim_of(size, shapes) for size in value.shape))
    if isinstance(value, torch.SymInt):
        return ConstSpec(name, shapes.name(value))
    return ConstSpec(name, value)
