"""The fitting loop: one for everything that is trained here.

A step is a function of the state before it, the seed and its number: its rows and its random draws (dropout) come from
the seed and the number alone. What a checkpoint holds is therefore enough to go on, and a run that was killed
at any moment and resumed ends, on a CPU with the same number of threads, in the same bits as one that was not.

The learning rate warms up, stays, and falls to zero over the last fifth of the steps (Hu et al., 2024,
arXiv:2404.06395). What was there before the fall is kept, so that a finished run can be continued with more steps: it
takes the same path as if they had been asked for at once.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exeunt.files import written

__all__ = ["Checkpoint", "adamw", "fit", "muon", "schedule"]

FORMAT = "exeunt.checkpoint.1"


def schedule(step: int, steps: int, warmup: int = 100, fall: float = 0.2) -> float:
    """Learning rate of a 0-based step as a share of its peak: warm-up, plateau, linear fall to almost zero.

    Examples
    --------
    >>> from exeunt.training import schedule
    >>> [schedule(step, 10, warmup=2, fall=0.4) for step in (0, 1, 5, 6, 7, 9)]
    [0.5, 1.0, 1.0, 1.0, 0.75, 0.25]
    """
    left = (steps - step) / max(1, fall_length(steps, fall))
    return min(1.0, (step + 1) / max(1, warmup), left)


def fall_length(steps: int, fall: float = 0.2) -> int:
    """Number of the last steps over which the learning rate falls."""
    return max(1, round(steps * fall))


def adamw(module: nn.Module, learning_rate: float, weight_decay: float = 0.0) -> list[torch.optim.Optimizer]:
    """AdamW for all trainable parameters.

    Parameters
    ----------
    module : nn.Module
    learning_rate : float
        Its peak.
    weight_decay : float, default 0.0
        On matrices only.

    Examples
    --------
    >>> import torch
    >>> from exeunt.training import adamw
    >>> [optimizer] = adamw(torch.nn.Linear(4, 2), 1e-3, weight_decay=0.1)
    >>> [group["weight_decay"] for group in optimizer.param_groups]
    [0.1, 0.0]
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [torch.optim.AdamW([g for g in groups if g["params"]], learning_rate, betas=(0.9, 0.95), fused=True)]


def muon(module: nn.Module, learning_rate: float, weight_decay: float = 0.1) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the matrices inside of layers (lists of modules), AdamW for all other parameters.

    Muon learns more from a token than AdamW, which is what counts where tokens cost minutes.

    Parameters
    ----------
    module : nn.Module
    learning_rate : float
        Its peak; Muon's updates are scaled to the size of AdamW's, so that one rate serves both.
    weight_decay : float, default 0.1

    Examples
    --------
    >>> import torch
    >>> from exeunt.training import muon
    >>> module = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    >>> [type(optimizer).__name__ for optimizer in muon(module, 1e-3)]
    ['Muon', 'AdamW']
    """
    layers = {id(p) for stack in module.modules() if isinstance(stack, nn.ModuleList) for p in stack.parameters()}
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() == 2 and id(p) in layers]
    rest = [p for p in trained if p.dim() != 2 or id(p) not in layers]
    chosen: list[torch.optim.Optimizer] = []
    if matrices:
        chosen.append(
            torch.optim.Muon(matrices, learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    if rest:
        chosen.append(torch.optim.AdamW(rest, learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True))
    return chosen


def fit(
    module: nn.Module,
    batches: Callable[[int], Any],
    checkpoint: str | os.PathLike[str],
    *,
    steps: int,
    optimizers: list[torch.optim.Optimizer],
    identity: Mapping[str, Any],
    pieces: int = 1,
    warmup: int = 100,
    fall: float = 0.2,
    clip: float = 1.0,
    seed: int = 0,
    every: float = 60.0,
    progress: bool = True,
    title: str = "Training",
) -> dict[str, Any]:
    """Train the parameters of a module that ask for gradients; go on where an earlier call was stopped.

    Uses accelerate where it is installed: GPUs, and several processes started by torchrun, each of which takes its
    share of the rows of a batch.

    Parameters
    ----------
    module : nn.Module
        ``module(batch)`` returns the scalar loss.
    batches : callable
        ``batches(step)``: the batch of a 0-based step, a tensor or a tuple of tensors with rows first. Must be a
        function of the number alone.
    checkpoint : path
        File for the state of the run, replaced as a whole every `every` seconds and at the end. Beside it,
        ``<name>.plateau`` holds the state before the learning rate fell.
    steps : int
        In all, those of earlier calls included.
    optimizers : list of torch.optim.Optimizer
        Over the trainable parameters, for example from `adamw`.
    identity : Mapping
        What the run is: data, objective, sizes; JSON. A checkpoint of another run is refused.
    pieces : int, default 1
        Forward and backward a batch in so many pieces: less memory, the same step.
    warmup : int, default 100
        Steps over which the learning rate rises.
    fall : float, default 0.2
        Share of the steps over which it falls to zero; 0: not at all, where another run goes on from the result.
    clip : float, default 1.0
        Largest norm of the gradient.
    seed : int, default 0
        For dropout.
    every : float, default 60.0
        Seconds between checkpoints.
    progress : bool, default True
        Show a bar with the loss and the time left.
    title : str, default "Training"
        Beside the bar.

    Returns
    -------
    dict
        ``steps``, ``loss`` (smoothed over some 50 steps) and ``seconds`` (in all calls together).

    Raises
    ------
    FloatingPointError
        At a loss that is not finite: names the batch; the last checkpoint stays.
    ValueError
        If `checkpoint` belongs to another run.
    OSError
        If a checkpoint cannot be written; the last one stays.

    Examples
    --------
    >>> import torch, tempfile
    >>> from exeunt.training import adamw, fit
    >>> class Square(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(x).square().mean()
    >>> square = Square(4, 1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     outcome = fit(square, lambda step: torch.ones(2, 4), f"{folder}/run", steps=50, warmup=5,
    ...                   optimizers=adamw(square, 0.1), identity={}, progress=False)
    >>> outcome["steps"], bool(square(torch.ones(2, 4)) < 0.1)
    (50, True)
    """
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    accelerator = _accelerator()
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = accelerator.device if accelerator else torch.device("cpu")
    module.to(device)
    bare, peaks = module, [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    run = Checkpoint(Path(checkpoint), bare, optimizers, {**identity, "seed": seed, "processes": world}, fall)
    run.resume(steps)
    run.restart_clock()
    if accelerator:
        module, *optimizers = accelerator.prepare(module, *optimizers)
    bare.train()
    try:
        with _bar(progress and rank == 0, title, steps, run) as show:
            for step in range(run.step, steps):
                if step == steps - fall_length(steps, fall) and rank == 0:
                    run.write(run.plateau)
                share = schedule(step, steps, warmup, fall)
                for optimizer, rates in zip(optimizers, peaks, strict=True):
                    for group, peak in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = peak * share
                loss = 0.0
                with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                    torch.manual_seed(_number(seed, step, rank))
                    parts = list(_split(batches(step), rank, world, pieces, device))
                    for k, part in enumerate(parts):
                        last = k == len(parts) - 1
                        with nullcontext() if last or not accelerator else accelerator.no_sync(module):
                            value = module(part) / len(parts)
                            _finite(value, step, steps, run.path)
                            accelerator.backward(value) if accelerator else value.backward()
                        loss += value.item()
                norm = torch.nn.utils.clip_grad_norm_([p for p in bare.parameters() if p.grad is not None], clip)
                _finite(norm, step, steps, run.path)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                run.advance(loss)
                show(run.loss)
                if rank == 0 and run.due(every):
                    run.write(run.path)
        if rank == 0:
            run.write(run.path)
        if accelerator:
            accelerator.wait_for_everyone()
    finally:
        bare.eval()
    return {"steps": run.step, "loss": run.loss, "seconds": run.seconds}


class Checkpoint:
    """The state of a run in one file: trainable parameters, optimizers, number of steps done, smoothed loss.

    Examples
    --------
    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> from exeunt.training.loop import Checkpoint, adamw
    >>> module = torch.nn.Linear(2, 1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     runs = [Checkpoint(Path(folder, "run"), module, adamw(module, 1e-3), {"data": "a"}) for _ in range(2)]
    ...     runs[0].resume(steps=10)  # there is nothing yet
    ...     runs[0].advance(loss=0.5)
    ...     runs[0].write(runs[0].path)
    ...     runs[1].resume(steps=10)
    >>> runs[1].step, runs[1].loss
    (1, 0.5)
    """

    def __init__(
        self,
        path: Path,
        module: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        identity: Mapping[str, Any],
        fall: float = 0.2,
    ) -> None:
        self.path, self.plateau = path, path.with_name(f"{path.name}.plateau")
        self.step, self.loss, self.seconds = 0, float("nan"), 0.0
        self._module, self._optimizers, self._fall = module, optimizers, fall
        self._identity = json.loads(json.dumps(identity))
        self.restart_clock()

    def restart_clock(self) -> None:
        """Count the seconds of this process from now."""
        self._since = self._written = time.monotonic()

    def resume(self, steps: int) -> None:
        """Read the furthest state that lies on the way to `steps`, if there is one."""
        self._asked = steps
        found = [self._read(path) for path in (self.path, self.plateau) if path.exists()]
        for state in found:
            asked = state["steps_asked"]
            # Once the rate falls towards one number of steps, what follows is not on the way to another.
            if asked == steps or state["step"] <= min(*(n - fall_length(n, self._fall) for n in (asked, steps))):
                self._take(state)
                return
        if found:
            asked, done = found[0]["steps_asked"], found[0]["step"]
            raise ValueError(f"{self.path} has gone {done} of {asked} steps: expected more than that, got {steps}")

    def _read(self, path: Path) -> dict[str, Any]:
        whole = zipfile.is_zipfile(path)  # torch fails on other files in too many ways
        state = torch.load(path, weights_only=True, map_location="cpu") if whole else None
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"{path} is not a checkpoint of this version of exeunt")
        stored = state["identity"]
        differing = [k for k in stored | self._identity if stored.get(k) != self._identity.get(k)]
        if differing:
            fields = "; ".join(f"{k} {stored.get(k)}, got {self._identity.get(k)}" for k in differing)
            raise ValueError(f"{path} belongs to another run: expected {fields}")
        return state

    def _take(self, state: dict[str, Any]) -> None:
        trainable = _trainable(self._module)
        if state["parameters"].keys() != trainable.keys():
            raise ValueError(f"{self.path} holds other parameters than the run trains")
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(state["parameters"][name])
        for optimizer, stored in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.step, self.loss, self.seconds = state["step"], state["loss"], state["seconds"]

    def advance(self, loss: float) -> None:
        """Count a step."""
        self.step += 1
        self.loss = loss if self.loss != self.loss else 0.98 * self.loss + 0.02 * loss

    def due(self, every: float) -> bool:
        """Whether the last write lies `every` seconds back."""
        return time.monotonic() - self._written >= every

    def write(self, path: Path) -> None:
        """Replace the file as a whole."""
        now = time.monotonic()
        self.seconds += now - self._since
        self._since = now
        state = {
            "format": FORMAT,
            "identity": self._identity,
            "steps_asked": self._asked,
            "step": self.step,
            "loss": self.loss,
            "seconds": self.seconds,
            "parameters": {name: p.detach() for name, p in _trainable(self._module).items()},
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        content = io.BytesIO()  # torch.save on a file tells of a full disk in another way each time
        torch.save(state, content)
        with written(path) as unfinished:
            unfinished.write_bytes(content.getbuffer())
        self._written = time.monotonic()


def digest(*parts: Any) -> str:
    """Fingerprint of arrays and JSON values: 16 hexadecimal digits."""
    state = hashlib.sha256()
    for part in parts:
        state.update(memoryview(part).cast("B") if hasattr(part, "__array_interface__") else json.dumps(part).encode())
    return state.hexdigest()[:16]


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _number(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")


def _split(batch: Any, rank: int, world: int, pieces: int, device: torch.device) -> Iterator[Any]:
    """The rows of this process, piece by piece, on its device."""
    tensors: Iterable[Tensor] = batch if isinstance(batch, tuple) else (batch,)
    mine = [t[rank::world].to(device).chunk(pieces) for t in tensors]
    for part in zip(*mine, strict=True):
        yield part if isinstance(batch, tuple) else part[0]


def _finite(value: Tensor, step: int, steps: int, path: Path) -> None:
    if not torch.isfinite(value):
        kept = f"the checkpoint {path} is kept" if path.exists() else "there is no checkpoint yet"
        raise FloatingPointError(f"the loss of batch {step} of {steps} is {value.item()}, {kept}")


def processes() -> tuple[int, int, Callable[[], None]]:
    """Rank and number of the processes of a run (torchrun starts several), and what waits for all of them."""
    shared = _accelerator() if "WORLD_SIZE" in os.environ else None
    if shared is None:
        return 0, 1, lambda: None
    return shared.process_index, shared.num_processes, shared.wait_for_everyone


def _accelerator() -> Any:
    try:
        from accelerate import Accelerator
    except ImportError:
        return None
    return Accelerator()


@contextmanager
def _bar(wanted: bool, title: str, steps: int, run: Checkpoint) -> Iterator[Callable[[float], None]]:
    """A progress bar on standard error; the function that moves it on takes the smoothed loss."""
    with ExitStack() as stack:
        if not wanted:
            yield lambda loss: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (
            TextColumn(title), BarColumn(), MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True), TextColumn("loss {task.fields[loss]:.4f}"),
        )  # fmt: skip
        bar = stack.enter_context(Progress(*columns, console=console, disable=not console.is_terminal))
        task = bar.add_task("", total=steps, completed=run.step, loss=run.loss)
        reported = time.monotonic()

        def show(loss: float) -> None:
            nonlocal reported
            bar.update(task, advance=1, loss=loss)
            if not console.is_terminal and (time.monotonic() - reported > 60 or run.step == steps):  # a log file
                reported = time.monotonic()
                console.print(f"{title} {run.step}/{steps} loss {loss:.4f}", highlight=False)

        yield show
