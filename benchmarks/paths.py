"""Paths through control-flow graphs."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import networkx as nx

Node = TypeVar("Node", bound=Hashable)


def reachable(start: Node, successors: Callable[[Node], Iterable[Node]]) -> Any:
    """The directed graph of what start may lead to."""
    graph, pending = nx.DiGraph(), [start]
    graph.add_node(start)
    while pending:
        node = pending.pop()
        for to in successors(node):
            if to not in graph:
                pending.append(to)
            graph.add_edge(node, to)
    return graph


def loops(graph: Any, start: Node) -> dict[tuple[Node, Node], set[Node]]:
    """Each natural loop, by the edge (latch, header) that closes it: what reaches the latch without the header."""
    found, open_nodes = {}, set()
    for node, to, kind in nx.dfs_labeled_edges(graph, start):
        if kind == "forward":
            open_nodes.add(to)
        elif kind == "reverse":
            open_nodes.discard(to)
        elif to in open_nodes:
            others = nx.restricted_view(graph, [to], [])
            found[node, to] = {to, node} | (nx.ancestors(others, node) if node != to else set())
    return found


def unrolled_once(graph: Any, loops: dict[tuple[Node, Node], set[Node]]) -> Any:
    """The graph without the edges that close loops; a latch with no other edge goes on to where its loop is left."""
    forward = graph.copy()
    forward.remove_edges_from(loops)
    for (latch, _), members in loops.items():
        if not forward[latch]:
            forward.add_edges_from((latch, to) for node in members for to in graph[node] if to not in members)
    return forward


def shortest_heavy(graph: Any, start: Node, weight: Callable[[Node], int]) -> list[Node]:
    """The shortest of the paths from start to an end that are nearer in weight to the heaviest than to the lightest."""
    # node -> total weight of a path from it -> (length of the path, next node, total weight from there)
    ways: dict[Node, dict[int, tuple[int, Node | None, int]]] = {}
    least: dict[Node, int] = {}
    for node in nx.dfs_postorder_nodes(graph, start):
        here = weight(node)
        least[node] = here + min((least[to] for to in graph[node] if to in least), default=0)
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
    total = min(total for total in ways[start] if 2 * total > most + least[start] or total == most)
    path = []
    place: Node | None = start
    while place is not None:
        path.append(place)
        _, place, total = ways[place][total]
    return path
