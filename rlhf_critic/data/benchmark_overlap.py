"""Overlap of training rows with the texts of benchmarks, by n-grams of words.

The rule is that of GPT-3 (Brown et al., 2020, appendix C): a word is in lower case, separated by white space and
without punctuation, and a row that shares an n-gram with a benchmark is contaminated. An example of a benchmark with
fewer words matches as a whole, as in their section 4. They cut a window around the n-gram out of a document, and keep
n-grams of more than ten documents. A response cannot be cut, so here the whole row is contaminated, and all n-grams
count.

Memory depends on the benchmarks alone: 8 bytes for each n-gram, and their vocabulary. Knows nothing about tokens or
models.

Shape legend: W words of a text, G n-grams.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, StrictStr

from rlhf_critic.data.conversation import Turns, text_of
from rlhf_critic.data.layouts import ParsedRow, parse
from rlhf_critic.data.pointwise_schema import Pointwise
from rlhf_critic.data.preference_schema import Response
from rlhf_critic.data.rows import validate_row
from rlhf_critic.data.sources import fingerprint_of, read_rows
from rlhf_critic.errors import DataError

NGRAM_WORDS = 13
PUNCTUATION = re.compile(r"[^\w\s]|_")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of a word is lost
UNKNOWN = 0  # number of all words that no benchmark has
SEPARATOR = ""  # no word, so that no n-gram that spans it is one of a benchmark
Responses = Annotated[tuple[Response, ...], BeforeValidator(lambda given: [given] if isinstance(given, str) else given)]


class BenchmarkNgrams:
    """N-grams of the words of benchmarks.

    Two different n-grams have the same hash, of 64 bits, with a probability of about 5e-20.

    Args:
        size: Number of words of an n-gram.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._numbers: dict[str, int] = {}  # random number of each word
        self._wholes: set[str] = set()  # texts with fewer words than an n-gram
        self._hashes_G: NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)  # sorted

    def __len__(self) -> int:
        return len(self._hashes_G) + len(self._wholes)

    def add(self, conversations: Iterable[tuple[str, Sequence[str]]]) -> None:
        """Adds prompts, each with its responses. The texts of a benchmark are its prompts and its conversations."""
        hashes = [self._hashes_G]
        for prompt, responses in conversations:
            before = words_of(prompt)
            texts = [before, *(before + words_of(response) for response in responses)]
            for words in texts:
                for word in words:
                    if word not in self._numbers:
                        self._numbers[word] = _number_of(word)
                if len(words) >= self.size:
                    hashes.append(self._hash(words))
                elif words:
                    self._wholes.add(" ".join(words))
        self._hashes_G = np.unique(np.concatenate(hashes))

    def overlaps(self, prompt: str, responses: Sequence[str]) -> bool:
        """Returns whether a prompt with some of its responses shares an n-gram with a benchmark.

        A text of a benchmark that is shorter than an n-gram must be the whole prompt, response or conversation.
        """
        before = words_of(prompt)
        joined = list(before)
        if self._is_whole(before):
            return True
        end = before[max(len(before) - self.size + 1, 0) :]  # the other n-grams of a conversation are the prompt's
        for response in responses:
            words = words_of(response)
            if self._is_whole(words) or self._is_whole(before + words):
                return True
            joined += [SEPARATOR, *end, *words]
        return self._shares(joined)  # once, because a call of numpy takes longer than an n-gram

    def _is_whole(self, words: list[str]) -> bool:
        return len(words) < self.size and " ".join(words) in self._wholes

    def _shares(self, words: list[str]) -> bool:
        if len(words) < self.size or not len(self._hashes_G):
            return False
        hashes = self._hash(words)
        place = np.searchsorted(self._hashes_G, hashes).clip(max=len(self._hashes_G) - 1)
        return bool((self._hashes_G[place] == hashes).any())

    def _hash(self, words: list[str]) -> NDArray[np.uint64]:
        """Hashes all n-grams of some words by a polynomial of the numbers of their words, modulo 2**64."""
        get = self._numbers.get
        numbers_W = np.array([get(word, UNKNOWN) for word in words], dtype=np.uint64)
        count = len(words) - self.size + 1
        hashes = np.zeros(count, dtype=np.uint64)
        for place in range(self.size):
            hashes = hashes * MULTIPLIER + numbers_W[place : place + count]
        return hashes


def words_of(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation and symbols."""
    return PUNCTUATION.sub("", text.lower()).split()


def _number_of(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class BenchmarkRow(BaseModel):
    """Fields of a row that is no training data: a text, or a prompt with some responses or with none."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    text: StrictStr | None = None
    prompt: StrictStr | Turns | None = None
    response: Responses = ()
    responses: Responses = ()
    chosen: Responses = ()
    rejected: Responses = ()


def read_benchmarks(sources: Sequence[str], size: int) -> BenchmarkNgrams:
    """Reads the n-grams of benchmarks. Their rows have a layout of training data, or those of `BenchmarkRow`.

    Args:
        sources: At least one source; see `rlhf_critic.data.sources`.
        size: Number of words of an n-gram.

    Raises:
        DataError: A source cannot be read, or a row has no text. Names the option, the file and the line.
    """
    ngrams = BenchmarkNgrams(size)
    try:
        ngrams.add(texts for source in sources for line, row in read_rows(source) for texts in _read(source, line, row))
    except DataError as error:
        raise DataError(f"data.decontaminate: {error}") from error
    if not len(ngrams):
        raise DataError(f"data.decontaminate: {', '.join(sources)}: has no words; give the texts of a benchmark")
    return ngrams


def fingerprint_of_benchmarks(sources: Sequence[str], size: int) -> str:
    """Hashes what decides the n-grams: the contents of the sources and the size.

    Raises:
        DataError: A source is missing or cannot be read. Names the option and the source.
    """
    try:
        return ":".join([f"{size}-grams", *map(fingerprint_of, sources)])
    except DataError as error:
        raise DataError(f"data.decontaminate: {error}") from error


def texts_of(row: ParsedRow) -> tuple[str, list[str]]:
    """Returns the text of a prompt and those of its responses.

    Turns of the system are left out, because all rows may have the same one. Calls of tools have no text.
    """
    responses = (row.response,) if isinstance(row, Pointwise) else row.responses
    return _text(row.prompt), [_text(response) for response in responses]


def _text(content: Any) -> str:
    """Returns the text of a text, of one turn as a mapping, or of turns."""
    if isinstance(content, str | Mapping):
        return text_of(content)
    return "\n".join(turn.text for turn in content if turn.role != "system")


def _read(source: str, line: int, row: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    place = f"{source}:{line}"
    try:
        parsed = parse(place, row, {})
    except DataError:
        other = validate_row(BenchmarkRow, row, place, {})
    else:
        yield from map(texts_of, parsed)
        return
    responses = [_text(one) for one in (*other.response, *other.responses, *other.chosen, *other.rejected)]
    if other.text is not None:
        responses.append(other.text)
    if not responses and other.prompt is None:
        raise DataError(
            f"{place}: a row of a benchmark needs 'text', 'prompt' or the fields of a row of training data; give rows "
            'such as {"text": "..."}'
        )
    yield _text(other.prompt or ""), responses
