"""The same model under other names and with its independent nodes in another order."""

from __future__ import annotations

import random

from graphopt.model import Model, empty_module
from graphopt.rewriter import Node
from graphopt.verify import verify

__all__ = ["disguised"]


def disguised(model: Model, seed: int, *, rename: bool = True, reorder: bool = True, swap: bool = True) -> Model:
    """A copy: nodes and tensors renamed, independent nodes shuffled, operands of commutative calls swapped."""
    chance = random.Random(seed)
    module = empty_module()
    copy = Model(module, model.signature, model.shapes, mode=model.mode, example=model.example, history=model.history)
    made: dict[Node, Node] = {}
    for number, node in enumerate(_order(model, chance) if reorder else list(model.graph.nodes)):
        new = module.graph.node_copy(node, made.__getitem__)
        made[node] = new
        if node.op == "get_attr":
            name = f"tensors.t{chance.randrange(10**9)}_{number}" if rename else str(node.target)
            copy.params.add(name, model.params[str(node.target)], model.params.kind(str(node.target)))
            new.target = name
        if rename and node.op in ("call_function", "get_attr"):
            new._rename(f"n{chance.randrange(10**9)}_{number}")
            new.meta.pop("nn_module_stack", None)
            new.meta["path"] = f"m{chance.randrange(5)}"
        if swap and "add.Tensor" in str(node.target) and len(new.args) == 2 and isinstance(new.args[1], Node):
            new.args = tuple(reversed(new.args)) if chance.random() < 0.5 else new.args
    module.graph._codegen = model.graph._codegen
    for name in model.kept:
        copy.params.add(name, model.params[name], model.params.kind(name))
    copy.kept = set(model.kept)
    for node in module.graph.nodes:
        if node.op == "call_function":
            node.meta["val"] = copy.shapes.propagate(node)
    copy.touch()
    verify(copy)
    return copy


def _order(model: Model, chance: random.Random) -> list[Node]:
    """A random topological order, inputs first as they were and the output last."""
    nodes = list(model.graph.nodes)
    order = [node for node in nodes if node.op == "placeholder"]
    waiting = {node: len(node.all_input_nodes) for node in nodes if node.op not in ("placeholder", "output")}
    ready = [node for node, count in waiting.items() if count == 0]

    def release(node: Node) -> None:
        for user in node.users:
            if user in waiting:
                waiting[user] -= 1
                if waiting[user] == 0:
                    ready.append(user)

    for node in order:
        release(node)
    while ready:
        node = ready.pop(chance.randrange(len(ready)))
        order.append(node)
        release(node)
    return [*order, nodes[-1]]
