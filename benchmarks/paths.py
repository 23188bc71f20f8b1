"""Paths through control-flow graphs, each given as node -> the nodes it may lead to."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)


def reachable(start: Node, successors: Callable[[Node], Iterable[Node]]) -> dict[Node, list[Node]]:
    graph: dict[Node, list[Node]] = {}
    pending = [start]
    while pending:
        node = pending.pop()
        if node not in graph:
            graph[node] = list(successors(node))
            pending += graph[node]
    return graph


def loops(graph: Mapping[Node, list[Node]], start: Node) -> dict[tuple[Node, Node], set[Node]]:
    """Each natural loop, by the edge (latch, header) that closes it: what reaches the latch without the header."""
    sources = defaultdict(list)
    for node, successors in graph.items():
        for successor in successors:
            sources[successor].append(node)
    found = {}
    for latch, header in _depth_first(graph, start)[1]:
        members, pending = {header}, [latch]
        while pending:
            node = pending.pop()
            if node not in members:
                members.add(node)
                pending += sources[node]
        found[latch, header] = members
    return found


def unrolled_once(
    graph: Mapping[Node, list[Node]], loops: Mapping[tuple[Node, Node], set[Node]]
) -> dict[Node, list[Node]]:
    """The graph without the edges that close loops; a latch with no other edge goes on to where its loop is left."""
    forward = {node: [to for to in successors if (node, to) not in loops] for node, successors in graph.items()}
    for (latch, _), members in loops.items():
        if not forward[latch]:
            forward[latch] = [to for node in members for to in graph[node] if to not in members]
    return forward


def shortest_heavy(graph: Mapping[Node, list[Node]], start: Node, weight: Callable[[Node], int]) -> list[Node]:
    """Of the paths from start to an end that weigh more than half of what the heaviest one does, the shortest."""
    # node -> total weight of a path from it -> (length of the path, next node, total weight from there)
    ways: dict[Node, dict[int, tuple[int, Node | None, int]]] = {}
    for node in _depth_first(graph, start)[0]:
        here = weight(node)
        onward: list[tuple[int, int, Node | None, int]] = [
            (here + rest, length + 1, to, rest)
            for to in graph[node]
            for rest, (length, _, _) in ways.get(to, {}).items()
        ]
        ways[node] = kept = {}
        shortest = math.inf
        for total, length, to, rest in sorted(onward or [(here, 1, None, 0)], key=lambda way: (-way[0], way[1])):
            if length < shortest:  # no other path is both heavier and shorter
                kept[total] = (length, to, rest)
                shortest = length
    most = max(ways[start])
    total = min(total for total in ways[start] if 2 * total > most or total == most)
    path = []
    place: Node | None = start
    while place is not None:
        path.append(place)
        _, place, total = ways[place][total]
    return path


def _depth_first(graph: Mapping[Node, list[Node]], start: Node) -> tuple[list[Node], list[tuple[Node, Node]]]:
    """The nodes, each after those it leads to, and the edges that close a cycle."""
    finished: dict[Node, None] = {}  # in order
    closing = []
    opened = {start}
    stack = [(start, iter(graph[start]))]
    while stack:
        node, successors = stack[-1]
        for to in successors:
            if to not in opened:
                opened.add(to)
                stack.append((to, iter(graph[to])))
                break
            if to not in finished:
                closing.append((node, to))
        else:
            stack.pop()
            finished[node] = None
    return list(finished), closing
