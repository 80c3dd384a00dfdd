"""The order in which basic blocks are given the word, so that a diverged warp comes together where compilers expect it."""

from __future__ import annotations

from collections.abc import Collection


def _components(nodes: Collection[int], successors: dict[int, list[int]]) -> list[list[int]]:
    """Strongly connected components of the subgraph of ``nodes``, in topological order (Tarjan 1972, iterative)."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found: list[list[int]] = []
    for root in nodes:
        if root in index:
            continue
        work = [(root, iter(successors[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, rest = work[-1]
            for other in rest:
                if other not in nodes:
                    continue
                if other not in index:
                    index[other] = low[other] = len(index)
                    stack.append(other)
                    on_stack.add(other)
                    work.append((other, iter(successors[other])))
                    break
                if other in on_stack:
                    low[node] = min(low[node], index[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    component: list[int] = []
                    while not component or component[-1] != node:
                        component.append(stack.pop())
                        on_stack.discard(component[-1])
                    found.append(component)
    return found[::-1]


def ranks(entry: int, successors: dict[int, list[int]]) -> dict[int, int]:
    """A number for each block: smaller goes first.

    Blocks before what they lead to; a loop's blocks together, its header first and what follows the loop after all of
    them. Threads that left a loop or an arm of a branch thus wait for those that are still in it.
    """
    order: list[int] = []

    def place(nodes: set[int], first: int, edges: dict[int, list[int]]) -> None:
        for component in _components(dict.fromkeys(sorted(nodes, key=lambda n: (n != first, n))), edges):
            if len(component) == 1:
                order.append(component[0])
                continue
            inside = set(component)
            entered = {o for n in nodes - inside for o in edges[n] if o in inside} | ({first} & inside)
            header = min(entered or inside)
            place(inside, header, {n: [o for o in edges[n] if o in inside and o != header] for n in inside})

    place(set(successors), entry, successors)
    return {block: number for number, block in enumerate(order)}
