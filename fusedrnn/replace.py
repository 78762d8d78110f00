"""Swapping the recurrent modules of a finished model, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from fusedrnn import keras_loop, modules

OURS: dict[str, type[nn.Module]] = {name: getattr(modules, name) for name in modules.TORCH_CLASSES}


class Report(NamedTuple):
    """Which modules were swapped, and which were left and why; prints as a list.

    Attributes:
        swapped: name inside the model -> what became of it.
        left: name inside the model -> the reason.
    """

    swapped: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} module(s) swapped, {len(self.left)} left"]
        lines += [f"  {name or '(the model)'}: {what}" for name, what in self.swapped.items()]
        lines += [f"  {name or '(the model)'}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def replace_modules(model: nn.Module) -> Report:
    """Turns every LSTM, GRU, RNN and cell of torch.nn inside `model` into fusedrnn's, in place.

    The module objects stay the same objects and get another class: parameters, hooks, buffers,
    the training flag and every reference to them are untouched. Built layers LSTM, GRU and
    SimpleRNN of Keras 3 on its torch backend stay Keras's and get our time loop.

    Args:
        model: any module, which may itself be one of them.
    Returns:
        what was swapped, and what was left and why.
    Raises:
        TypeError: `model` is not a Module.
    """
    report = _swap(model, modules.TORCH_CLASSES, OURS)
    for layer in keras_loop.layers_of(model):
        if "inner_loop" not in vars(layer):
            try:
                report.swapped[layer.path] = keras_loop.put_in(layer)
            except ValueError as error:
                report.left[layer.path] = str(error)
    return report


def restore_modules(model: nn.Module) -> Report:
    """Undoes `replace_modules`: every module of fusedrnn becomes torch.nn's again, in place.

    One with heads, or with a cell that torch does not have, is left. So is one with regularizers,
    which torch.nn's would not apply; but not in evaluation mode, where only zoneout acts. (It is
    nothing but torch.nn's then, in training mode too.) Layers of Keras get their own loop back.
    """
    report = _swap(model, {**OURS, "Recurrent": modules.Recurrent}, modules.TORCH_CLASSES)
    for layer in keras_loop.layers_of(model):
        if "inner_loop" in vars(layer):
            report.swapped[layer.path] = keras_loop.take_out(layer)
    return report


def _swap(model, sources: dict[str, type], targets: dict[str, type]) -> Report:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    swapped, left = {}, {}
    other = (*targets.values(), modules.Recurrent)
    module: Any
    for name, module in model.named_modules():
        class_name = next((k for k, source in sources.items() if type(module) is source), None)
        regularizers = getattr(module, "regularizers", None)
        needed = regularizers and regularizers.needed(training=module.training)
        lacking = getattr(module, "_torch_lacks", lambda: None)()
        if class_name is not None and lacking:
            left[name] = lacking
        elif class_name is not None and needed:
            left[name] = f"torch.nn's {class_name} has no {needed}"
        elif class_name is not None:
            target = targets.get(class_name) or modules.torch_class(module.mode.lower())
            module.__class__ = target
            if target is modules.TORCH_CLASSES["RNN"]:  # a Recurrent has it in its mode alone
                module.nonlinearity = module.mode.lower().removeprefix("rnn_")
            swapped[name] = f"{_path(sources[class_name])} -> {_path(target)}"
        elif type(module) in other or not isinstance(module, (*sources.values(), nn.RNNBase)):
            continue
        elif nn.utils.parametrize.is_parametrized(module):
            left[name] = "it is parametrized: swap first, then register parametrizations"
        else:
            left[name] = f"{_path(type(module))} is a subclass with a forward of its own"
    return Report(swapped, left)


def _path(cls: type) -> str:
    module = "torch.nn" if cls.__module__.startswith("torch.nn") else cls.__module__
    return f"{module.removesuffix('.modules')}.{cls.__name__}"
