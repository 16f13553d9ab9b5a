"""Targets that stay coded until they are on the device, or are learnt in the basis of their encoding."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molkd.cache_schema.codebook import Codebook, decode_rows
from molkd.cache_schema.fields import FieldSpec
from molkd.cache_schema.reader import Cache
from molkd.pipeline.config import KDTerm
from molkd.pipeline.errors import ConfigError


class Coded(NamedTuple):
    """Rows of a signal as they are stored."""

    codes: Tensor  # (N, ..., B)
    scale: Tensor  # (N,)
    codebook: Codebook
    rotate: bool  # back from the basis of the encoding

    def map(self, change: Callable[[Tensor], Tensor]) -> "Coded":
        """Apply a change of place to the tensors."""
        return self._replace(codes=change(self.codes), scale=change(self.scale))

    def decode(self) -> Tensor:
        """Return the values (N, ..., C), or components (N, ..., K), float32, on the device of the codes."""
        values: Tensor = decode_rows(self.codes, self.scale, self.codebook, rotate=self.rotate)
        return values


class CodedParts(NamedTuple):
    """Rows of a signal from several stores, each as it is stored there."""

    parts: tuple[Tensor | Coded, ...]

    def map(self, change: Callable[[Tensor], Tensor]) -> "CodedParts":
        """Apply a change of place to the tensors."""
        return CodedParts(tuple(p.map(change) if isinstance(p, Coded) else change(p) for p in self.parts))

    def decode(self) -> Tensor:
        """Return the values (N, ..., C), float32, on the device of the parts."""
        return torch.cat([p.decode() if isinstance(p, Coded) else p for p in self.parts])


def join_rows(parts: Sequence[Tensor | Coded]) -> Tensor | CodedParts:
    """Put the rows of several stores one behind the other; what is coded stays so until it is decoded."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return torch.cat(tensors) if len(tensors) == len(parts) else CodedParts(tuple(parts))


def rotated_bases(cache: Cache, teacher: str | None, terms: tuple[KDTerm, ...]) -> dict[str, Codebook]:
    """Return the codebooks of the signals that can be learnt in the basis of their encoding.

    An orthonormal basis changes neither squared errors nor what a linear head can reach: the loss against K
    components, times K / C, is the loss against the C decoded channels of a head that stays in their span.

    Raises
    ------
    ConfigError
        If a loss is none of that kind, or no signal is stored in such a basis.
    """
    found: dict[str, Codebook] = {}
    for term in terms:
        if teacher is None or not term.student_taps:
            continue
        known = cache.teachers[teacher].signals
        if term.teacher_tap not in known:
            continue  # reported where heads are made
        if known[term.teacher_tap].spec.axis == "edge":
            continue  # decoded on the host, where edges are put in the student's order
        book = cache.signal(teacher, term.teacher_tap).codebook
        if book is None or book.basis is None:
            continue
        if term.head != "linear" or term.loss != "mse":
            raise ConfigError(
                f"--kd {term.label}: rotated_targets needs a linear head and the MSE, this term has head "
                f"{term.head} and loss {term.loss}; leave rotated_targets out"
            )
        found[term.teacher_tap] = book
    if not found:
        raise ConfigError(
            "rotated_targets: no loss on features of atoms reads a signal stored as pca:BYTES; leave it out"
        )
    return found


def in_basis(specs: Mapping[str, FieldSpec], rotated: Mapping[str, Codebook]) -> dict[str, FieldSpec]:
    """Return the specs with the shapes of the components where signals are learnt in their basis."""
    return {
        name: replace(s, shape=(*s.shape[:-1], len(rotated[name].step))) if name in rotated else s
        for name, s in specs.items()
    }


def ratios(rotated: Mapping[str, Codebook]) -> dict[str, float]:
    """Return K / C, which makes a mean over components the mean over channels."""
    return {name: len(book.step) / book.n_channels for name, book in rotated.items()}


def coded_signals(cache: Cache, teacher: str | None, signals: tuple[str, ...]) -> dict[str, Codebook]:
    """Return the codebooks of those signals that have one."""
    books: dict[str, Any] = {s: cache.signal(teacher, s).codebook for s in signals} if teacher else {}
    return {name: book for name, book in books.items() if book is not None}
