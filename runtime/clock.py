"""Marks in time: on a GPU events in its stream, which cost no wait; the CPU's clock otherwise."""

import time

import torch


class Clock:
    """``mark`` notes now and gives its number; ``seconds`` turns all marks into seconds since the first."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[float | torch.cuda.Event] = []

    def mark(self) -> int:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())
        return len(self.marks) - 1

    def wait(self, mark: int) -> None:
        """Until the GPU has come to ``mark``."""
        if self.on_gpu:
            self.marks[mark].synchronize()  # type: ignore[union-attr]

    def seconds(self) -> list[float]:
        """Of every mark. Waits for the GPU."""
        if not self.on_gpu:
            return [float(mark) - float(self.marks[0]) for mark in self.marks]  # type: ignore[arg-type]
        torch.cuda.synchronize()
        first = self.marks[0]
        return [first.elapsed_time(mark) / 1000 for mark in self.marks]  # type: ignore[union-attr, arg-type]
