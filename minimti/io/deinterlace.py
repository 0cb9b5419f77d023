"""Interlaced frames, which hold two moments in alternate rows, as frames of one moment."""

from collections import deque
from collections.abc import Iterator
from fractions import Fraction

import av

TICK = Fraction(1, 1000)  # unit of the times that the filter demands; nothing reads them


def deinterlaced(timed: Iterator[tuple[float, av.VideoFrame]]) -> Iterator[tuple[float, av.VideoFrame]]:
    """One whole frame for each interlaced one (bwdif), at the same time; others as they are."""
    graph: av.filter.Graph | None = None
    times: deque[float] = deque()  # when the frames in the graph are shown; it holds back one
    shape: tuple[int, int, str] | None = None
    for time, frame in timed:
        this = (frame.width, frame.height, frame.format.name)
        if graph and this != shape:
            yield from _flushed(graph, times)
            graph = None
        if not graph and not frame.interlaced_frame:
            yield time, frame
            continue
        if not graph:
            shape = this
            graph = av.filter.Graph()
            source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=TICK)
            graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink"))
            graph.configure()
        times.append(time)
        frame.pts, frame.time_base = len(times), TICK
        graph.vpush(frame)
        yield from _pulled(graph, times)
    if graph:
        yield from _flushed(graph, times)


def _flushed(graph: av.filter.Graph, times: deque[float]) -> Iterator[tuple[float, av.VideoFrame]]:
    graph.vpush(None)
    yield from _pulled(graph, times)


def _pulled(graph: av.filter.Graph, times: deque[float]) -> Iterator[tuple[float, av.VideoFrame]]:
    while times:
        try:
            frame = graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return
        yield times.popleft(), frame
