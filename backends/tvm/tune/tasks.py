"""The tasks of a model: the functions of its graph, as the compiler fused them, for which kernels have choices.

Equal functions are one task, in a model and across models. Where a product or a convolution has several algorithms, the
model is imported once for each, and the functions that come of it compete under the name of the problem.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import ir, relax, tirx

from graphopt.backend import refuse
from graphopt.backends.tvm.backend import tvm_target
from graphopt.backends.tvm.importer import import_model
from graphopt.backends.tvm.kernels import written
from graphopt.backends.tvm.kernels.choices import Tuned, linear_problem, task_key, window_problem
from graphopt.backends.tvm.kernels.fused import Fused, read_chain, read_fused
from graphopt.backends.tvm.kernels.geometry import Window
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.rows import Rows
from graphopt.backends.tvm.lower import fused
from graphopt.backends.tvm.tune.measuring import Argument
from graphopt.backends.tvm.work import work_of

if TYPE_CHECKING:
    from graphopt.model import Model
    from graphopt.target import Target

__all__ = ["Task", "Tasks", "extract", "model_key"]

_KINDS = {"product", "strassen", "convolution", "winograd", "expanded", "depthwise", "matmul", "attention"}

_ALGORITHMS = {"product": ("plain", "strassen"), "convolution": ("direct", "squares of 2", "squares of 4")}
"""Of a problem, by the first word of its name."""


@dataclass(frozen=True)
class Task:
    """A function to find the best choices for.

    Attributes:
        key: of its structure.
        kind: the rule that writes its kernel.
        problem, algorithm: where several algorithms compete; else empty.
        function: TVM's JSON of it.
        arguments: (shape, dtype, role) of each parameter, the result last; see `measuring`.
        flops, bytes: of a call.
    """

    key: str
    kind: str
    problem: str
    algorithm: str
    function: str
    arguments: tuple[Argument, ...]
    flops: int
    bytes: int

    @property
    def weights(self) -> int:
        """Bytes of the weights of a call."""
        return sum(
            math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype, role in self.arguments if role != "data"
        )

    def __str__(self) -> str:
        shapes = ["x".join(map(str, shape)) for shape, _, _ in self.arguments]
        return f"{self.kind} {shapes[0]} to {shapes[-1]}"


@dataclass(frozen=True)
class Tasks:
    """What there is to tune in a model.

    Attributes:
        known: every task by its key, those of other algorithms too.
        calls: how often each function is called, as the rules would have the model.
        others: by problem and algorithm, the calls that would take the place of those of the problem.
        left: what is not tuned, and why: functions without choices are not listed.
        model: key of the model.
    """

    known: Mapping[str, Task]
    calls: Mapping[str, int]
    others: Mapping[str, Mapping[str, Mapping[str, int]]]
    left: tuple[str, ...]
    model: str

    @property
    def weights(self) -> int:
        """Bytes of weights that the calls of the model read."""
        return sum(calls * self.known[key].weights for key, calls in self.calls.items())

    def of_problem(self, problem: str) -> dict[str, int]:
        """The calls for a problem as the rules would have them."""
        return {key: calls for key, calls in self.calls.items() if self.known[key].problem == problem}


def extract(model: Model, target: Target, machine: Machine) -> Tasks:
    """Import and fuse a model, as the rules choose and with every other algorithm.

    Raises:
        UnsupportedError: naming everything that the backend cannot run.
    """
    found = _Found.of(model, target, machine)
    known, others = dict(found.tasks), dict[str, dict[str, dict[str, int]]]()
    alternatives = {
        task.problem: [name for name in _ALGORITHMS[task.problem.split()[0]] if name != task.algorithm]
        for task in found.tasks.values()
        if task.problem and task.problem not in found.chained
    }
    for turn in range(0 if machine.exact else max(map(len, alternatives.values()), default=0)):
        chosen = {problem: names[turn] for problem, names in alternatives.items() if turn < len(names)}
        other = _Found.of(model, target, replace(machine, tuned=Tuned(chosen)))
        for problem, algorithm in chosen.items():
            calls = {k: n for k, n in other.calls.items() if _is(other.tasks[k], problem, algorithm)}
            if sum(calls.values()) == sum(n for k, n in found.calls.items() if known[k].problem == problem):
                others.setdefault(problem, {})[algorithm] = calls
                known |= {key: other.tasks[key] for key in calls}
    return Tasks(known, found.calls, others, tuple(found.left), found.model)


def _is(task: Task, problem: str, algorithm: str) -> bool:
    return task.problem == problem and task.algorithm == algorithm


def function_calls(model: Model, target: Target, machine: Machine) -> dict[str, int]:
    """How often each function of a model is called, as the rules would have it, by the key of the function."""
    module, weights = _fused(model, target, machine)
    every = Counter[str]()
    for place, (calls, _) in _calls(module, weights).items():
        every[task_key(module[place])] += calls
    return dict(every)


def _fused(model: Model, target: Target, machine: Machine) -> tuple[Any, int]:
    """The functions of a model, and how many weights `main` takes."""
    imported = import_model(model, machine)
    if imported.unsupported:
        raise refuse("tvm", imported.unsupported)
    module, weights = fused(imported.module, tvm_target(target), machine)
    return module, len(weights)


def model_key(calls: Mapping[str, int]) -> str:
    """One name for the functions of a model, as the rules would have it."""
    return hashlib.sha256(repr(sorted(calls.items())).encode()).hexdigest()[:16]


@dataclass
class _Found:
    tasks: dict[str, Task]
    calls: dict[str, int]
    chained: set[str]
    left: list[str]
    model: str

    @classmethod
    def of(cls, model: Model, target: Target, machine: Machine) -> _Found:
        module, weights = _fused(model, target, machine)
        found = cls({}, {}, set(), [], "")
        every = Counter[str]()
        for place, (calls, stored) in _calls(module, weights).items():
            function = module[place]
            key = task_key(function)
            every[key] += calls
            found._add(place.name_hint, key, function, stored, calls, machine)
        found.model = model_key(every)
        return found

    def _add(self, name: str, key: str, function: Any, stored: list[bool], calls: int, machine: Machine) -> None:
        kind, _ = written(function, machine)
        if kind not in _KINDS:
            return
        if kind == "expanded":
            chain = read_chain(function)
            self.chained.add(_problem(chain[0])[0] if chain else "")
        shapes = [tuple(parameter.ty.shape) for parameter in function.params]
        if not all(isinstance(size, tirx.IntImm) for shape in shapes for size in shape):
            self.left.append(f"{name}: its sizes are known at run time only")
            return
        one = read_fused(function)
        problem, algorithm = _problem(one) if one is not None else ("", "")
        roles = ["weight" if weight else "data" for weight in [*stored, False]]
        if one is not None and kind == "strassen":
            place = next(i for i, parameter in enumerate(function.params) if parameter.same_as(one.reads[2]))
            roles[place] = f"quarters of {int(one.result.shape[-1])}"
        arguments = tuple(
            (tuple(int(size) for size in shape), str(parameter.dtype), role)
            for shape, parameter, role in zip(shapes, function.params, roles, strict=True)
        )
        work = work_of(function)
        task = Task(key, kind, problem, algorithm, ir.save_json(function), arguments, int(work.flops), int(work.bytes))
        self.tasks.setdefault(key, task)
        self.calls[key] = self.calls.get(key, 0) + calls


def _calls(module: Any, weights: int) -> dict[Any, tuple[int, list[bool]]]:
    """How often `main` calls each function, and which of its arguments are weights."""
    main, found = module["main"], dict[Any, tuple[int, list[bool]]]()
    stored = list(main.params)[len(main.params) - weights :]

    def is_weight(value: Any) -> bool:
        return isinstance(value, ir.GenericConst) or any(value.same_as(weight) for weight in stored)

    for block in main.body.blocks:
        for binding in block.bindings:
            call = binding.value
            if isinstance(call, ir.Call) and call.op.same_as(ir.Op.get("relax.call_tir")) and len(call.args) == 2:
                place, operands = call.args
                times, _ = found.get(place, (0, []))
                if isinstance(module[place], tirx.PrimFunc) and isinstance(call.ty, relax.TensorType):
                    found[place] = times + 1, [is_weight(operand) for operand in operands.fields]
    return found


def _problem(one: Fused) -> tuple[str, str]:
    """The problem that a kernel solves, and by which algorithm; empty where there is one algorithm only."""
    kind, outputs = str(one.notes["kernel"]), int(one.result.shape[-1]) if one.result.shape else 0
    if kind in ("product", "strassen"):
        shape = one.reads[0].shape
        if not isinstance(shape[-1], tirx.IntImm):
            return "", ""
        return linear_problem(Rows.of(shape).count, int(shape[-1]), outputs), "plain" if kind == "product" else kind
    if kind not in ("convolution", "winograd") or int(one.notes.get("groups", 1)) != 1:
        return "", ""
    window = Window.read(one.notes)
    if window.kernel != (3, 3) or window.stride != (1, 1) or window.dilation != (1, 1):
        return "", ""
    if kind == "winograd":
        inputs, algorithm = int(one.reads[2].shape[2]), f"squares of {int(one.notes['square'])}"
    else:
        inputs, algorithm = int(one.reads[1].shape[3]), "direct"
    return window_problem(window, inputs, outputs), algorithm
