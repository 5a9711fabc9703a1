"""Reads cuobjdump's listing of machine code: instructions, the main loop, and what runs in it."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple


class Instruction(NamedTuple):
    """A line of machine code."""

    address: int
    opcode: str
    text: str


def parse_listing(listing: str) -> list[Instruction]:
    """Returns the instructions of cuobjdump's listing, without padding (NOP) at the end."""
    pattern = r"/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)[^;]*);"
    code = [
        Instruction(int(place, 16), name, text)
        for place, text, name in re.findall(pattern, listing)
    ]
    return [instruction for instruction in code if instruction.opcode != "NOP"]


def main_loop(code: list[Instruction], chunks: int) -> Counter[str]:
    """Counts the instructions of a round of the main loop, {opcode: count}.

    code: instructions of the kernel.
    chunks: how often an inner loop runs in a round.
    """
    return _main_loop(code, chunks)[1]


def covered_exponentials(code: list[Instruction]) -> int:
    """Returns how many exponentials of the main loop are issued while a warpgroup's products run.

    Products run from their instruction (HGMMA) to the wait for all of them.
    """
    loop = [code[i] for i in sorted(_main_loop(code, 1)[0])]
    running, count = False, 0
    # Products at the end of a round may run on into the next round: two rounds, the second counts.
    for instruction in [*loop, *loop]:
        if instruction is loop[0]:
            count = 0
        running |= instruction.opcode == "HGMMA"
        running &= "WARPGROUP.DEPBAR.LE gsb0, 0x0" not in instruction.text
        count += running and instruction.opcode == "MUFU"
    return count


# Bytes of a thread: {suffix of a load or store in the listing: bytes}. Without one: 4.
WIDTHS = {".128": 16, ".64": 8, ".U16": 2, ".U8": 1}


def shared_bytes(code: list[Instruction]) -> float:
    """Returns the bytes of shared memory that a warp moves in a round of the main loop.

    Inner loops count once. A product of a warpgroup (HGMMA) reads its second operand for four
    warps, and its first operand too unless a register holds it.
    """
    total = 0.0
    for _, name, text in (code[i] for i in _main_loop(code, 1)[0]):
        if name == "HGMMA":
            m, n = re.findall(r"\d+", text.split(".")[1])[:2]
            in_registers = re.search(r"HGMMA\S* R\d+, R\d+", text) is not None
            total += 32 * (int(n) + (0 if in_registers else int(m))) / 4  # 32 bytes of every row
        elif name == "LDSM":  # matrices of 8 x 8 numbers of 16 bits
            found = re.search(r"88\.(\d)", text)
            total += 128 * int(found[1] if found else 1)
        elif name in ("LDS", "STS", "LDGSTS"):
            mnemonic = text[text.index(name) :].split()[0]
            total += 32 * next((width for part, width in WIDTHS.items() if part in mnemonic), 4)
    return total


def _main_loop(code: list[Instruction], chunks: int) -> tuple[set[int], Counter[str]]:
    """Returns the places of the main loop's instructions, and what a round of it counts.

    The main loop is the loop with most exponentials, and the shortest of equal loops: the last
    negatives, which do not fill a tile, have a loop of their own with narrower tiles and masks.
    """
    following = _successors(code)
    counted: list[tuple[set[int], Counter[str]]] = [(set(), Counter())]
    for loop in _cycles(set(following), following):
        entries = {j for i in set(following) - loop for j in following[i]} & loop
        inner = set().union(*_cycles(loop - entries, following))
        count: Counter[str] = Counter()
        for i in loop:
            count[code[i].opcode] += chunks if i in inner else 1
        counted.append((loop, count))
    # The empty loop is for code without loops.
    return max(counted, key=lambda found: (found[1]["MUFU"], bool(found[0]), -found[1].total()))


def _successors(code: list[Instruction]) -> dict[int, list[int]]:
    """Returns {index of an instruction: indices of possible next instructions}.

    Subroutines belong to no loop: calls are not followed.
    """
    index = {instruction.address: i for i, instruction in enumerate(code)}
    following = {}
    for i, (_, name, text) in enumerate(code):
        # A conditional call never returns: ptxas jumps out of a loop with such a call.
        jump = name == "BRA" or (name == "CALL" and text.startswith("@"))
        target = re.search(r"0x([0-9a-f]+)\s*$", text) if jump else None
        # Conditions stand before the opcode (@P0) or after the opcode (BRA.U UP3, BRA.DIV UR4).
        ends = re.match(r"BRA\S* 0x|EXIT|RET", text) is not None
        jumps = [index[int(target[1], 16)]] if target and int(target[1], 16) in index else []
        following[i] = jumps + ([] if ends or i + 1 == len(code) else [i + 1])
    return following


def _cycles(nodes: set[int], following: dict[int, list[int]]) -> list[set[int]]:
    """Returns the strongly connected components with more than one node (Tarjan 1972).

    Does not use recursion: the graph may be deeper than Python's stack.
    """
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    result = []
    # Depth-first search from every node. `path` replaces recursion.
    for root in sorted(nodes):
        path = [(root, iter(following[root]))] if root not in order else []
        while path:
            node, edges = path[-1]
            if node not in order:
                order[node] = low[node] = len(order)
                stack.append(node)
                on_stack.add(node)
            for target in edges:
                if target not in nodes:
                    continue
                if target not in order:
                    path.append((target, iter(following[target])))
                    break
                if target in on_stack:
                    low[node] = min(low[node], order[target])
            else:
                # All edges of the node are done: the component of a root is complete.
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[node])
                if low[node] == order[node]:
                    place = stack.index(node)
                    component = set(stack[place:])
                    del stack[place:]
                    on_stack -= component
                    if len(component) > 1:
                        result.append(component)
    return result
