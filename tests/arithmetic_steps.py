"""Arithmetic problems solved step by step, with labels from a program that checks every step.

    problem   6+2-4=
    solution  6+2=8
              8-4=5        (wrong: the program computes 4)

A solution has an error in half of the problems: a wrong result, or a number that was copied wrongly. The steps after
the first wrong one have no label, as in ProcessBench.
"""

from __future__ import annotations

import random
import re
from typing import Any

STEP = re.compile(r"(\d+)([+-])(\d+)=(\d+)")
LARGEST = 9  # of a result: one digit, so that a small model learns it in minutes


def make_problems(count: int, seed: int = 0, steps: tuple[int, int] = (3, 5)) -> list[dict[str, Any]]:
    """Returns rows with ``prompt`` and ``steps``; each number of steps from the range is equally frequent."""
    rng = random.Random(seed)
    return [labelled(*_solution(rng, rng.randint(*steps), has_error=index % 2 == 1)) for index in range(count)]


def labelled(problem: str, texts: list[str]) -> dict[str, Any]:
    """Returns a row with the labels of a program that checks the steps."""
    wrong = first_wrong_step(problem, texts)
    labels = [None if 0 <= wrong < index else index != wrong for index in range(len(texts))]
    steps = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    return {"prompt": problem, "steps": steps}


def first_wrong_step(problem: str, texts: list[str]) -> int:
    """Returns the index of the first step that does not follow from the problem and the steps before it, or -1."""
    before, operations = int(re.match(r"\d+", problem)[0]), re.findall(r"([+-])(\d+)", problem)
    for index, (text, (sign, operand)) in enumerate(zip(texts, operations, strict=True)):
        found = STEP.fullmatch(text)
        result = before + int(operand) if sign == "+" else before - int(operand)
        if found is None or found.groups() != (str(before), sign, operand, str(result)):
            return index
        before = result
    return -1


def outcomes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the same solutions with one label each: whether all steps are right."""
    return [
        {
            "prompt": row["prompt"],
            "response": "\n".join(step["text"] for step in row["steps"]),
            "label": all(step["label"] for step in row["steps"]),
        }
        for row in rows
    ]


def _solution(rng: random.Random, steps: int, has_error: bool) -> tuple[str, list[str]]:
    numbers = [rng.randint(0, 9)]
    operations = []
    for _ in range(steps):
        sign, operand = rng.choice(_possible(numbers[-1]))
        operations.append((sign, operand))
        numbers.append(numbers[-1] + operand if sign == "+" else numbers[-1] - operand)
    problem = f"{numbers[0]}" + "".join(f"{sign}{operand}" for sign, operand in operations)
    wrong = rng.randrange(steps) if has_error else -1
    texts, before = [], numbers[0]
    for index, (sign, operand) in enumerate(operations):
        low, high = (0, LARGEST - operand) if sign == "+" else (operand, LARGEST)
        others = [number for number in range(low, high + 1) if number != before]
        is_copied = index == wrong and index > 0 and bool(others) and rng.random() < 0.3
        if is_copied:  # the number before is copied wrongly
            before = rng.choice(others)
        result = max(0, before + operand if sign == "+" else before - operand)
        if index == wrong and not is_copied:
            result = rng.choice([number for number in range(LARGEST + 1) if number != result])
        texts.append(f"{before}{sign}{operand}={result}")
        before = result
    return f"{problem}=\n", texts


def _possible(number: int) -> list[tuple[str, int]]:
    added = [("+", operand) for operand in range(1, 10) if number + operand <= LARGEST]
    return added + [("-", operand) for operand in range(1, 10) if number >= operand]
