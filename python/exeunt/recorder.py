"""What records the work of a device as a graph that is launched at once: the one place that knows CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["Recorder", "Unrecordable", "reads_on_host", "recorder_for"]


class Unrecordable(RuntimeError):
    """Why something cannot be in a graph.

    Examples
    --------
    >>> from exeunt.recorder import Unrecordable
    >>> try:
    ...     raise Unrecordable("layers that read values on the host")
    ... except RuntimeError as reason:
    ...     print(reason)
    layers that read values on the host
    """


def reads_on_host(op: Any, args: Sequence[Any]) -> bool:
    """Whether a torch op takes values between host and device, to return them or to know how much it returns.

    Examples
    --------
    >>> import torch
    >>> from exeunt.recorder import reads_on_host
    >>> aten = torch.ops.aten
    >>> reads_on_host(aten.nonzero.default, [torch.ones(2)]), reads_on_host(aten.add.Tensor, [torch.ones(2)] * 2)
    (True, False)
    """
    if op is torch.ops.aten.lift_fresh.default:  # torch.tensor of numbers; a single one goes along with each launch
        return args[0].dim() > 0
    if op.overloadpacket in _INDEXED:  # by integers they read nothing
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    return bool(_READ & set(op.tags))


_READ = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXED = {getattr(torch.ops.aten, name) for name in ("index", "index_put", "index_put_", "_index_put_impl_")}


class Recorder:
    """CUDA graphs of one device, all in one memory pool: no two of them may run at the same time.

    Parameters
    ----------
    device : torch.device
        A CUDA device.

    Examples
    --------
    >>> import torch
    >>> from exeunt.recorder import recorder_for
    >>> device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    >>> recorder, x = recorder_for(device), torch.zeros(2, device=device)
    >>> def body():
    ...     x.add_(1)
    >>> if recorder is None:  # a device without graphs
    ...     body()
    ...     body()
    ... else:
    ...     recorder.run(body)
    ...     recorder.replay(recorder.record(body))
    >>> x.tolist()
    [2.0, 2.0]
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._last: Any = None  # the stream of the last replay

    def run(self, body: Callable[[], None]) -> None:
        """Run something as it is, where it will be recorded: libraries make their plans and workspaces."""
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            body()
        here.wait_stream(self._stream)

    def record(self, body: Callable[[], None]) -> Any:
        """Record something that has been run before."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may allocate meanwhile.
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                body()
        except RuntimeError as error:
            raise Unrecordable(f"layers that cannot be recorded ({str(error).splitlines()[0]})") from error
        return graph

    def replay(self, graph: Any) -> None:
        """Launch a graph on the current stream."""
        graph.replay()

    def follow(self) -> None:
        """From here on the current stream is behind all that ran before, wherever that was."""
        here = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != here:
            here.wait_stream(self._last)
        self._last = here

    def wait(self) -> None:
        """Return once all graphs have run, so that their memory can be let go."""
        torch.cuda.synchronize(self._device)


def recorder_for(device: torch.device) -> Recorder | None:
    """The recorder of a device; None where there are no graphs.

    Examples
    --------
    >>> import torch
    >>> from exeunt.recorder import recorder_for
    >>> recorder_for(torch.device("cpu")) is None
    True
    """
    return Recorder(device) if device.type == "cuda" else None
