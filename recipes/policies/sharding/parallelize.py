"""Inference over several processes by one call: the model object answers as before, and processes compute its shards.

The processes are spawned, so a script must call `parallelize` below `if __name__ == "__main__":`, and policies and replacement
classes of one's own must stand in a module that can be imported. The model goes to them through a temporary file, not through
shared memory, which containers are short of; TMPDIR says where.
"""

import contextlib
import functools
import pickle
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ....kernels.errors import UserError
from ....kernels.parallel.collectives import TensorParallel
from ..catalog.lookup import Policies
from ..catalog.paths import join, owner_of
from ..swapping.fused_layer import CACHE_NAMES
from .plan import make_plan
from .shard import apply_plan

_MODEL = "model.pt"
_PROXIED = ("forward", "generate")
_UNGUARDED = ", because of what it printed above; a script must call parallelize below if __name__ == '__main__':"
_GRACE_S = 10  # for the others to answer when one has failed: they may wait for it in a collective


def parallelize(model: nn.Module, num_gpus: int, fp16: bool = False, policy: Policies = None) -> "Workers":
    """Lets `num_gpus` processes, each with a shard of the model on its GPU, answer `model(...)` and `model.generate(...)`.

    model: on the CPU, where it stays as it is; without a GPU in the machine the processes compute on its CPU.
    fp16: the processes' weights in half precision. policy: as in `shard`.
    Results come to the CPU, without gradients and cache; attention weights are those of the first process's heads.
    Random numbers of a call follow from torch's default generator here. `model.cpu()`, or `close()` of what is returned, which
    is a context manager too, ends the processes.

    Raises ValueError for a model that is not on the CPU, for fewer GPUs than asked for, and as `shard` does.
    Raises RuntimeError, with the traceback, for what happens in a process; if only some of them answer, or the call is
    interrupted, all are ended. Threads may call at the same time and take turns.
    """
    if isinstance(num_gpus, bool) or num_gpus < 1:
        raise UserError(f"num_gpus is {num_gpus}; it must be a number, 1 or more, and stands before fp16")
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {"cpu"}:
        raise UserError(f"the model is on {', '.join(sorted(devices))}; call model.cpu() before parallelize")
    available = torch.cuda.device_count()
    if 0 < available < num_gpus:
        raise UserError(f"num_gpus is {num_gpus}, this machine has {available}; give at most {available}")
    if "forward" in vars(model):
        raise UserError("the model is parallelized already; call model.cpu() first")
    make_plan(model, policy, num_gpus).warn()  # here, so that its errors come before processes do
    return Workers(model, num_gpus, fp16, policy)


@dataclass(frozen=True)
class _Answer:
    """What a process made of a request. error: a traceback, or how the process ended; None: all went well."""

    value: Any = None
    error: str | None = None
    cause: BaseException | None = None
    ended: bool = False


@dataclass(frozen=True)
class Portable:
    """A model as it goes to another process.

    One of transformers is built there once more from its config, because the hooks with which it records hidden states cannot
    be pickled, and building registers its class; tensors: its parameters, buffers and tensors among attributes, by name. Any
    other is pickled: `model`.
    """

    model: nn.Module | None = None
    cls: Any = None
    config: Any = None
    generation_config: Any = None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module) -> "Portable":
        if not any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__):
            return Portable(model)
        tensors = {
            join(path, name): value
            for path, module in model.named_modules()
            for name, value in (*module._parameters.items(), *module._buffers.items(), *vars(module).items())
            if isinstance(value, Tensor)
        }
        generation: Any = getattr(model, "generation_config", None)
        return Portable(None, type(model), model.config, generation, tensors)  # type: ignore[arg-type]

    def build(self) -> nn.Module:
        if self.model is not None:
            return self.model
        with torch.device("meta"):
            model: nn.Module = self.cls(self.config)
        for path, tensor in self.tensors.items():
            owner, name = owner_of(model, path)
            setattr(owner, name, tensor)
        if self.generation_config is not None:
            model.generation_config = self.generation_config
        return model


class Workers:
    """The processes of a model that `parallelize` started."""

    def __init__(self, model: nn.Module, size: int, fp16: bool, policy: Policies) -> None:
        self._model = model
        self._folder = tempfile.TemporaryDirectory(prefix="parallelize-")
        self._connections: list[connection.Connection] = []
        self._processes: list[SpawnProcess] = []
        self._lock = threading.RLock()  # of one request and its answers
        context = get_context("spawn")
        try:
            torch.save(Portable.of(model), Path(self._folder.name, _MODEL))
            for rank in range(size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_work, args=(theirs, Path(self._folder.name), rank, size, fp16, policy), daemon=True
                )
                process.start()
                theirs.close()
                self._connections.append(ours)
                self._processes.append(process)
            self._answer()
        except BaseException:
            self.close()
            raise
        for name in _PROXIED:
            if hasattr(model, name):
                setattr(model, name, self._proxy(name))
        model.cpu = self._cpu  # type: ignore[method-assign]

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes, when they have answered, and gives the model its own methods back; a second call does nothing."""
        with self._lock:
            for name in (*_PROXIED, "cpu"):
                vars(self._model).pop(name, None)
            for ours in self._connections:
                ours.close()  # which ends the loop at the other end
            for process in self._processes:
                process.join(_GRACE_S)
                process.kill()
            self._connections, self._processes = [], []
            self._folder.cleanup()

    def _cpu(self) -> nn.Module:
        self.close()
        return self._model.cpu()

    def _proxy(self, name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(self._model, name))
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                if not self._processes:  # another thread has ended them
                    return getattr(self._model, name)(*args, **kwargs)
                seed = int(torch.randint(2**63 - 1, ()))
                return self._answer(pickle.dumps((name, args, kwargs, seed)))

        return call

    def _answer(self, request: bytes | None = None) -> Any:
        """The first process's answer to a request, or to its start, when all have answered."""
        try:
            answers, complete = self._collect(request)
        except BaseException:  # as by Ctrl-C: answers still to come would be taken for those of the next request
            self._kill()
            raise
        # First those that ended, because of which others may have failed.
        for rank, answer in sorted(answers.items(), key=lambda item: (not item[1].ended, item[0])):
            if answer.error is None:
                continue
            if not complete or any(one.ended for one in answers.values()):
                self._kill()  # they may wait for one that will not come
            name = type(self._model).__name__
            raise RuntimeError(f"process {rank} of the parallelized {name} failed:\n{answer.error}") from answer.cause
        return answers[0].value

    def _collect(self, request: bytes | None) -> tuple[dict[int, _Answer], bool]:
        """Answers by rank, and whether these are all: when one has failed, the others get some time."""
        if request is not None:
            for ours in self._connections:
                with contextlib.suppress(OSError):  # it has ended, which its answer will say
                    ours.send_bytes(request)
        pending = dict(enumerate(self._connections))
        answers: dict[int, _Answer] = {}
        while pending:
            failed = any(answer.error for answer in answers.values())
            ready = connection.wait(pending.values(), _GRACE_S if failed else None)
            if not ready:
                break
            for rank in [rank for rank, ours in pending.items() if ours in ready]:
                answers[rank] = self._receive(rank, pending.pop(rank))
        return answers, not pending

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        self.close()

    def _receive(self, rank: int, ours: connection.Connection) -> _Answer:
        try:
            answer: _Answer = pickle.loads(ours.recv_bytes())
        except (EOFError, OSError):
            process = self._processes[rank]
            process.join(_GRACE_S)
            starting = process.exitcode == 1 and "forward" not in vars(self._model)
            return _Answer(
                error=f"it ended with exit code {process.exitcode}{_UNGUARDED if starting else ''}", ended=True
            )
        return answer


def _work(requests: connection.Connection, folder: Path, rank: int, size: int, fp16: bool, policy: Policies) -> None:
    """A process: takes its shard, and answers until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes; the first ends the others
    try:
        model, device = _load(folder, rank, size, fp16, policy)
    except Exception as error:
        requests.send_bytes(_failure(error))
        return
    requests.send_bytes(pickle.dumps(_Answer()))
    while True:
        try:
            name, args, kwargs, seed = pickle.loads(requests.recv_bytes())
        except (EOFError, ConnectionError):
            break
        try:
            args, kwargs = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, (args, kwargs))
            torch.manual_seed(seed)
            with torch.inference_mode():
                result = getattr(model, name)(*args, **kwargs)
            requests.send_bytes(pickle.dumps(_Answer(_for_parent(result) if rank == 0 else None)))
        except Exception as error:
            requests.send_bytes(_failure(error))
    dist.destroy_process_group()


def _load(folder: Path, rank: int, size: int, fp16: bool, policy: Policies) -> tuple[nn.Module, torch.device]:
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
    dist.init_process_group(backend, init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=size)
    saved: Portable = torch.load(folder / _MODEL, mmap=True, weights_only=False)
    model = saved.build()
    model.eval().requires_grad_(False)
    if fp16:
        model.half()
    assert dist.group.WORLD is not None
    apply_plan(model, make_plan(model, policy, size), TensorParallel(dist.group.WORLD))
    return model.to(device), device


def _for_parent(result: Any) -> Any:
    """A model's output on the CPU, without the cache of keys and values, of which each process has its heads."""
    if isinstance(result, Mapping) and any(name in CACHE_NAMES for name in result):
        result = type(result)(**{name: value for name, value in result.items() if name not in CACHE_NAMES})
    return tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, result)


def _failure(error: Exception) -> bytes:
    text = traceback.format_exc()
    try:
        answer = pickle.dumps(_Answer(error=text, cause=error))
        pickle.loads(answer)  # an exception may be pickled and yet not come back
        return answer
    except Exception:  # whatever the error holds
        return pickle.dumps(_Answer(error=text))
