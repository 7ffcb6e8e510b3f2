"""Arithmetic problems solved step by step, with labels from a program that checks every step.

    problem   6+9-4
    solution  6+9=15
              15-4=12      (wrong: the program computes 11)

A solution has an error in half of the problems: a wrong result, or a number that was copied wrongly. The steps after
the first wrong one have no label, as in ProcessBench.
"""

from __future__ import annotations

import random
import re
from typing import Any

STEP = re.compile(r"(\d+)([+-])(\d+)=(\d+)")
LARGEST = 19  # of a result


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
        if index == wrong and index and rng.random() < 0.3:  # the number before is copied wrongly
            before = _another(rng, before, operand if sign == "-" else 0, LARGEST - (operand if sign == "+" else 0))
            result = before + operand if sign == "+" else before - operand
        else:
            result = before + operand if sign == "+" else before - operand
            if index == wrong:
                result = _another(rng, result, 0, LARGEST)
        result = max(0, result)
        texts.append(f"{before}{sign}{operand}={result}")
        before = result
    return problem, texts


def _possible(number: int) -> list[tuple[str, int]]:
    added = [("+", operand) for operand in range(1, 10) if number + operand <= LARGEST]
    return added + [("-", operand) for operand in range(1, 10) if number >= operand]


def _another(rng: random.Random, number: int, low: int, high: int) -> int:
    return rng.choice([other for other in range(low, high + 1) if other != number and abs(other - number) <= 5])
